"""The figures that the project must hold, in one run: ``python -m benchmarks.quick``.

Each is a ratio against ProcessPoolExecutor with as many processes, measured in turns in the same
run, because absolute times mean little on a shared machine. Exits 1 if one is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import psutil

from achilles import DistributedExecutor
from benchmarks.cluster import Cluster
from benchmarks.work import noop, tell_and_wait

SUBMITS = 20_000
TRIPS = 2_000
ROUNDS = 3
ITEMS = 1_000_000
MIB = 1 << 20


def submit_rate(executor: Executor) -> float:
    """No-op tasks a second: `SUBMITS` submitted and waited for."""
    start = time.perf_counter()
    futures = [executor.submit(noop, index) for index in range(SUBMITS)]
    wait(futures)
    seconds = time.perf_counter() - start
    assert [future.result() for future in futures] == list(range(SUBMITS))
    return SUBMITS / seconds


def round_trips(executor: Executor) -> list[float]:
    """Seconds of single no-op tasks, one after the other, sorted."""
    times = []
    for index in range(TRIPS):
        start = time.perf_counter()
        assert executor.submit(noop, index).result() == index
        times.append(time.perf_counter() - start)
    return sorted(times)


@contextmanager
def clustered(*, tcp: bool = False) -> Iterator[DistributedExecutor]:
    """An executor on a broker and a worker of two slots."""
    with Cluster(tcp=tcp) as cluster:
        os.environ["ACHILLES_HOME"] = cluster.home
        try:
            with DistributedExecutor(address=cluster.address) as executor:
                yield executor
        finally:
            del os.environ["ACHILLES_HOME"]


def compare() -> dict[str, dict[str, list[float]]]:
    """Rates and median round trips of all contestants, in interleaved rounds."""
    figures: dict[str, dict[str, list[float]]] = {}
    with (
        ProcessPoolExecutor(2) as pool,
        DistributedExecutor(2) as embedded,
        clustered() as cluster,
    ):
        contestants: dict[str, Executor] = {
            "ProcessPoolExecutor": pool,
            "achilles, embedded": embedded,
            "achilles, broker and worker": cluster,
        }
        for executor in contestants.values():
            wait([executor.submit(noop) for _ in range(100)])
        for _ in range(ROUNDS):
            for name, executor in contestants.items():
                row = figures.setdefault(name, {"rate": [], "p50": [], "p99": []})
                row["rate"].append(submit_rate(executor))
                trips = round_trips(executor)
                row["p50"].append(trips[len(trips) // 2])
                row["p99"].append(trips[len(trips) * 99 // 100])
    return figures


def million(address: str) -> None:
    """Map `ITEMS` no-ops over a generator; print the seconds and this process's peak memory."""
    start = time.perf_counter()
    total = 0
    with DistributedExecutor(2, address=address or None) as executor:
        for value in executor.map(noop, (index for index in range(ITEMS)), buffersize=10_000):
            total += value  # type: ignore[operator]
    assert total == ITEMS * (ITEMS - 1) // 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(time.perf_counter() - start, peak)


def run_million(address: str = "", home: str = "") -> tuple[float, float]:
    """`million` in a process of its own: its seconds, and its peak memory in MiB."""
    environ = {**os.environ, **({"ACHILLES_HOME": home} if home else {})}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quick", "--million", address],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak / MIB


def recovery(
    executor: DistributedExecutor, kills: int, victim: Callable[[int], int]
) -> list[float]:
    """Seconds from the SIGKILL of ``victim(pid of the runner)`` to the task running elsewhere,
    sorted.
    """
    times = []
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as directory:
            future = executor.submit(tell_and_wait, directory, 0.5)
            first = _await_files(directory, 1)[0]
            pid = victim(int(first.split("-")[0]))
            killed_at = time.monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            again = _await_files(directory, 2)[1]
            times.append((int(again.split("-")[1]) - killed_at) / 1e9)
            future.result()
    return sorted(times)


def _await_files(directory: str, count: int) -> list[str]:
    deadline = time.monotonic() + 30
    while len(names := os.listdir(directory)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError("a task did not start again")
        time.sleep(0.001)
    return sorted(names, key=lambda name: int(name.split("-")[1]))


def worker_recovery(kills: int) -> list[float]:
    """The same for whole workers, of which there are two; each kill is followed by a new one."""
    times = []
    with Cluster(workers=2, slots=1) as cluster:
        os.environ["ACHILLES_HOME"] = cluster.home
        try:
            with DistributedExecutor(address=cluster.address) as executor:
                for _ in range(kills):
                    times += recovery(executor, 1, lambda pid: psutil.Process(pid).ppid())
                    cluster.add_worker(1)
                    cluster.wait_until(lambda status: status["workers"] == 2)
        finally:
            del os.environ["ACHILLES_HOME"]
    return sorted(times)


class Report:
    """Prints figures with their limits and remembers whether one was missed."""

    def __init__(self) -> None:
        self.missed = 0

    def row(self, what: str, figure: float, unit: str, limit: float, *, at_least: bool) -> None:
        holds = figure >= limit if at_least else figure <= limit
        self.missed += not holds
        sign = ">=" if at_least else "<="
        verdict = "ok" if holds else "MISSED"
        print(f"{what:<58} {figure:9.2f} {unit:<4} {sign} {limit:<7g} {verdict}", flush=True)


def report_rates(report: Report) -> None:
    figures = compare()
    for name, row in figures.items():
        print(
            f"{name:<30} {statistics.median(row['rate']):9,.0f} submits/s   "
            f"p50 {statistics.median(row['p50']) * 1e6:6.0f} µs   "
            f"p99 {statistics.median(row['p99']) * 1e6:6.0f} µs"
        )
    print()
    base = figures["ProcessPoolExecutor"]
    for name, rate_min, p50_max in (
        ("achilles, embedded", 5.0, 1.0),
        ("achilles, broker and worker", 4.0, 3.0),
    ):
        row = figures[name]
        rate = statistics.median(a / b for a, b in zip(row["rate"], base["rate"], strict=True))
        p50 = statistics.median(a / b for a, b in zip(row["p50"], base["p50"], strict=True))
        report.row(f"{name}: submit rate", rate, "x", rate_min, at_least=True)
        report.row(f"{name}: p50 round trip", p50, "x", p50_max, at_least=False)


def report_millions(report: Report) -> None:
    seconds, peak = run_million()
    print(f"1,000,000 items, embedded: {seconds:.1f} s")
    report.row("1,000,000 items, embedded: client's peak memory", peak, "MiB", 300, at_least=False)
    with Cluster() as cluster:
        seconds, peak = run_million(cluster.address, cluster.home)
        assert cluster.broker is not None
        with open(f"/proc/{cluster.broker.pid}/status") as status:
            high = next(line for line in status if line.startswith("VmHWM"))
        print(f"1,000,000 items, broker and worker: {seconds:.1f} s")
        report.row(
            "1,000,000 items, broker: client's peak memory", peak, "MiB", 300, at_least=False
        )
        broker_peak = int(high.split()[1]) / 1024
        report.row(
            "1,000,000 items, broker: broker's peak memory", broker_peak, "MiB", 300, at_least=False
        )


def report_recovery(report: Report, kills: int) -> None:
    with DistributedExecutor(2) as executor:
        times = recovery(executor, kills, lambda pid: pid)
    p99 = times[min(len(times) - 1, len(times) * 99 // 100)]
    report.row(
        f"SIGKILL of a runner to the task elsewhere, p99 of {kills}",
        p99 * 1e3,
        "ms",
        250,
        at_least=False,
    )
    count = max(3, kills // 10)
    times = worker_recovery(count)
    report.row(
        f"SIGKILL of a worker to the task elsewhere, worst of {count}",
        times[-1],
        "s",
        3,
        at_least=False,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=__doc__)
    parser.add_argument("--million", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=100, help="runners to kill (default 100)")
    options: Any = parser.parse_args(arguments)
    if options.million is not None:
        million(options.million)
        return 0
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    report = Report()
    report_rates(report)
    report_millions(report)
    report_recovery(report, options.kills)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
