"""What encryption and the seal cost, in one run: ``python -m benchmarks.security``.

No-op tasks through a broker and a worker of two slots: over ipc without the seal, over ipc with it,
and over TCP with CURVE and the seal, in turns.
Exits 1 if the last is slower than the first by more than it may be.

There is no setting that leaves the seal out;
the baseline's client and worker are made here to have no code key.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from achilles import DistributedExecutor
from achilles.net import client, keys
from benchmarks.cluster import Cluster
from benchmarks.quick import Report, round_trips, submit_rate
from benchmarks.work import noop

ROUNDS = 7
PLAIN, SEALED, ENCRYPTED = "ipc, no seal", "ipc, seal", "TCP with CURVE, seal"
WORKER = "--worker-without-code-key"


@contextmanager
def _without_code_key() -> Iterator[None]:
    """What is connected meanwhile has none."""
    with mock.patch.object(keys, "code_of", _none), mock.patch.object(client, "code_of", _none):
        yield


def _none(join: keys.Join, home: Path) -> None:
    return None


def _unsealed_worker(arguments: list[str]) -> None:
    from achilles.cli import main as cli

    with _without_code_key():
        cli(arguments)


def _executor(name: str, leave: ExitStack) -> DistributedExecutor:
    cluster = Cluster(workers=0, tcp=name == ENCRYPTED)
    if name == PLAIN:
        cluster.worker_command = ("-m", "benchmarks.security", WORKER)
    leave.enter_context(cluster)
    cluster.add_worker(2)
    cluster.wait_until(lambda status: status["workers"] == 1)
    os.environ["ACHILLES_HOME"] = cluster.home
    try:
        if name == PLAIN:
            with _without_code_key():
                executor = DistributedExecutor(address=cluster.address)
        else:
            executor = DistributedExecutor(address=cluster.address)
    finally:
        del os.environ["ACHILLES_HOME"]
    assert (executor._mailbox.sealer is None) is (name == PLAIN)
    return leave.enter_context(executor)


def compare() -> dict[str, dict[str, list[float]]]:
    """Rates and median round trips of the three, in interleaved rounds."""
    figures: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as leave:
        contestants = {name: _executor(name, leave) for name in (PLAIN, SEALED, ENCRYPTED)}
        for executor in contestants.values():
            wait([executor.submit(noop, index) for index in range(5000)])
        for _ in range(ROUNDS):
            for name, executor in contestants.items():
                row = figures.setdefault(name, {"rate": [], "p50": []})
                row["rate"].append(submit_rate(executor))
                row["p50"].append(statistics.median(round_trips(executor)))
    return figures


def main(arguments: list[str]) -> int:
    if arguments[:1] == [WORKER]:
        _unsealed_worker(arguments[1:])
        return 0
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    figures = compare()
    report = Report()
    for name, row in figures.items():
        rate, p50 = statistics.median(row["rate"]), statistics.median(row["p50"])
        print(f"{name:<30} {rate:9,.0f} submits/s   p50 {p50 * 1e6:6.0f} µs")
    print()
    base = figures[PLAIN]
    for name, slower_max, longer_max in ((SEALED, 100, 100), (ENCRYPTED, 35, 25)):
        row = figures[name]
        rate = statistics.median(a / b for a, b in zip(row["rate"], base["rate"], strict=True))
        p50 = statistics.median(a / b for a, b in zip(row["p50"], base["p50"], strict=True))
        report.row(f"{name}: fewer submits/s", 100 * (1 - rate), "%", slower_max, at_least=False)
        report.row(f"{name}: longer p50", 100 * (p50 - 1), "%", longer_max, at_least=False)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
