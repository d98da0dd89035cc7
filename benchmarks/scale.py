"""What a broker costs with many sessions and long queues, and where one ends: ``make scale``.

Three parts, each with its results checked: the cores alone with up to 10,000 simulated workers and
1,000,000 queued tasks (`benchmarks.crowd`); a real broker with up to 500 real sessions
(`benchmarks.fleet`), over ipc and over TCP with CURVE; and bytes through that broker. What counts
is CPU time, which other load of the machine hardly changes; wall clock is printed, too. Charts and
tables go to ``--output``; ``--docs`` puts them into docs/scaling.md.
A figure that is missed is printed as missed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks import fakes, plots
from benchmarks.cluster import Cluster
from benchmarks.crowd import Crowd
from benchmarks.environments import ROOT
from benchmarks.fakes import ALONE, MIB, SHORT, TENS, Load, WrongResult
from benchmarks.fleet import Client
from benchmarks.plots import number
from benchmarks.stats import Summary, summarize
from benchmarks.systems import descendants
from benchmarks.tables import cell, markdown, with_block
from benchmarks.workloads import cpu_seconds, resident_bytes

DOCS = ROOT / "docs" / "scaling.md"
CHARTS = ROOT / "docs" / "scaling"
GROWTH_MAX = 1.25  # of the cost a task, from the smallest to the largest
IDLE_MAX = 0.05  # of a core, with the largest fleet
JOIN_MAX = 10.0  # seconds, for the largest fleet
CLOCK = 0.01  # seconds: how finely the kernel counts; nothing costs less here
BUSY = 0.7  # how busy a broker may be in the arithmetic
IPC, TCP = "ipc", "TCP with CURVE"
NAMES = {ALONE: "tasks that travel alone", TENS: "ten tasks together", SHORT: "no-ops"}

Line = dict[float, Summary]


class Size(NamedTuple):
    """How much there is to do. ``crowd``: simulated workers; ``fleet``: real ones;
    ``payloads``: MiB.
    """

    queues: tuple[int, ...] = (100, 1_000, 10_000, 100_000, 1_000_000)
    crowd: tuple[int, ...] = (1, 10, 100, 1_000, 5_000, 10_000)
    clients: tuple[int, ...] = (1, 10, 100, 1_000)
    tasks: int = 5_000
    rounds: int = 3
    fleet: tuple[int, ...] = (1, 10, 100, 500)
    payloads: tuple[int, ...] = (1, 64)
    seconds: float = 1.0


TINY = Size((100, 200), (1, 3), (1, 2), 50, 1, (1, 3), (1,), 0.05)


# --- The cores alone ------------------------------------------------------------------------------


class Core(NamedTuple):
    """CPU microseconds of the broker's cores, by what grows; ``idle``: its share of a core."""

    queue: dict[Load, Line]
    workers: dict[Load, Line]
    few: Line  # one task after the other, while all other workers idle
    clients: Line
    joins: Line
    idle: Line


def core(size: Size) -> Core:
    """Everything that is measured without a socket."""
    queue: dict[Load, Line] = {TENS: {}, ALONE: {}}
    for load, line in queue.items():
        for count in size.queues:
            line[count] = _each(Crowd(1), load, size, count)
            say(f"core, {NAMES[load]}, {count:,} queued", line[count], "µs a task")
    workers: dict[Load, Line] = {TENS: {}, ALONE: {}}
    found = Core(queue, workers, {}, {}, {}, {})
    for count in size.crowd:
        for load, line in workers.items():
            # So many queued that they are not cut into smaller chunks.
            line[count] = _each(Crowd(count), load, size, count * (40 if load is TENS else 4))
            say(f"core, {NAMES[load]}, {count:,} workers", line[count], "µs a task")
        crowd = Crowd(count)
        found.joins[count] = Summary(
            crowd.join_cpu * 1e6, crowd.join_cpu * 1e6, crowd.join_cpu * 1e6, 1
        )
        found.few[count] = _each(crowd, ALONE, size._replace(tasks=max(1, size.tasks // 4)), 1)
        share = crowd.idle(5.0)
        found.idle[count] = Summary(share, share, share, 1)
        crowd.sessions.check_invariants()
        say(f"core, one task at a time, {count:,} workers", found.few[count], "µs a task")
        say(f"core, a join, {count:,} workers", found.joins[count], "µs")
    for count in size.clients:
        found.clients[count] = _each(Crowd(4, clients=count), ALONE, size, max(1_000, 10 * count))
        say(f"core, {count:,} clients that wait", found.clients[count], "µs a task")
    return found


def _each(crowd: Crowd, load: Load, size: Size, queue: int) -> Summary:
    return _summary([crowd.run(load, size.tasks, queue) * 1e6 for _ in range(size.rounds)])


def _summary(values: list[float]) -> Summary:
    found = summarize(values)
    assert found is not None
    return found


# --- Real sockets ---------------------------------------------------------------------------------


class Fleets(NamedTuple):
    """Of one transport, by the number of workers."""

    joins: Line  # seconds
    memory: Line  # bytes a session
    idle: Line  # of a core
    cpu: dict[Load, Line]  # microseconds a task
    rate: dict[Load, Line]  # 1/s


class Bytes(NamedTuple):
    """Of one transport, by MiB of a payload."""

    rate: Line  # MiB/s
    cpu: Line  # seconds a GiB


class Site:
    """A broker and a process with ``workers`` workers."""

    def __init__(self, cluster: Cluster, workers: int) -> None:
        assert cluster.broker is not None
        self._pids = {"broker": descendants(cluster.broker.pid)}
        before = self.resident
        self.workers = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fleet", cluster.home, str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.workers.stdout is not None
        self.join_seconds = float(self.workers.stdout.readline())
        self.session_bytes = (self.resident - before) / workers

    @property
    def cpu(self) -> float:
        """Seconds of the process that serves."""
        return cpu_seconds(self._pids)["broker"]

    @property
    def resident(self) -> float:
        """Its bytes."""
        return resident_bytes(self._pids)["broker"]

    def idle(self, seconds: float) -> float:
        """Its share of a core while nothing is to be done."""
        before = self.cpu
        time.sleep(seconds)
        return (self.cpu - before) / seconds

    def end(self, done: int) -> None:
        """End the workers.

        Raises:
            WrongResult: they have not had as many tasks as are done.
        """
        assert self.workers.stdin is not None
        assert self.workers.stdout is not None
        self.workers.stdin.close()
        had = int(self.workers.stdout.read())
        if had != done:
            raise WrongResult(f"workers have had {had} tasks, and {done} are done")


@contextmanager
def _site(transport: str, workers: int) -> Iterator[tuple[Site, Client]]:
    with Cluster(workers=0, tcp=transport == TCP) as cluster:
        site = Site(cluster, workers)
        try:
            with Client(cluster.home) as client:
                yield site, client
                client.drain()
                site.end(client.asker.done)
        finally:
            site.workers.kill()
            site.workers.wait()
            for pipe in (site.workers.stdin, site.workers.stdout):
                if pipe is not None:
                    pipe.close()


def sockets(size: Size, transport: str) -> Fleets:
    """A broker with more and more workers."""
    loads = (ALONE, SHORT)
    found = Fleets({}, {}, {}, {load: {} for load in loads}, {load: {} for load in loads})
    for count in size.fleet:
        with _site(transport, count) as (site, client):
            found.joins[count] = _summary([site.join_seconds])
            found.memory[count] = _summary([site.session_bytes])
            found.idle[count] = _summary([site.idle(2 * size.seconds)])
            for load in loads:
                costs, rates = [], []
                queue = max(1_000, 4 * count) if load is ALONE else 20_000
                client.drain()
                client.run(load, queue, size.seconds / 4)
                for _ in range(size.rounds):
                    before = site.cpu
                    done, seconds = client.run(load, queue, size.seconds)
                    costs.append(max(site.cpu - before, CLOCK) / done * 1e6)
                    rates.append(done / seconds)
                found.cpu[load][count] = _summary(costs)
                found.rate[load][count] = _summary(rates)
                what = f"{transport}, {count} workers, {NAMES[load]}"
                say(what, found.cpu[load][count], "µs a task")
                say(what, found.rate[load][count], "tasks/s")
        say(f"{transport}, {count} workers, join", found.joins[count], "s")
    return found


def payloads(size: Size, transport: str) -> Bytes:
    """Arguments through a broker, from a client to a worker."""
    found = Bytes({}, {})
    with _site(transport, 2) as (site, client):
        for mib in size.payloads:
            load = fakes.of_size(mib * MIB)
            client.drain()
            client.run(load, 8, size.seconds / 4)
            rates, costs = [], []
            for _ in range(size.rounds):
                before = site.cpu
                done, seconds = client.run(load, 8, size.seconds, least=2)
                rates.append(done * mib / seconds)
                costs.append(max(site.cpu - before, CLOCK) / (done * mib) * 1024)
            found.rate[mib], found.cpu[mib] = _summary(rates), _summary(costs)
            say(f"{transport}, {mib} MiB arguments", found.rate[mib], "MiB/s")
            say(f"{transport}, {mib} MiB arguments", found.cpu[mib], "s of CPU a GiB")
    return found


# --- What is told of it ---------------------------------------------------------------------------


class Found(NamedTuple):
    """All of it."""

    core: Core
    fleets: dict[str, Fleets]
    bytes: dict[str, Bytes]


class Verdict(NamedTuple):
    """Whether a figure holds."""

    what: str
    limit: str
    measured: str
    holds: bool


def say(what: str, figure: Summary, unit: str) -> None:
    """A line while it goes on."""
    print(f"{what:<62} {cell(figure):>14} {unit}", flush=True)


def growth(line: Mapping[float, Summary]) -> float:
    """How much more the largest costs than the smallest of those that are at least ten,
    in their best rounds.
    """
    return line[max(line)].low / line[_smallest(line)].low


def _smallest(line: Mapping[float, Summary]) -> float:
    sizes = sorted(line)
    return next((size for size in sizes if size >= 10), sizes[0])


def verdicts(found: Found) -> list[Verdict]:
    """What must hold, and whether it does."""
    flat = {f"cores, queue, {NAMES[load]}": line for load, line in found.core.queue.items()}
    flat |= {f"cores, workers, {NAMES[load]}": line for load, line in found.core.workers.items()}
    flat["cores, workers that idle, one task at a time"] = found.core.few
    flat["cores, workers that join"] = found.core.joins
    flat["cores, clients that wait"] = found.core.clients
    flat |= {
        f"{transport}, workers, {NAMES[ALONE]}": fleets.cpu[ALONE]
        for transport, fleets in found.fleets.items()
    }
    told = []
    for what, line in flat.items():
        times = growth(line)
        low, high = (f"{value:,.0f}" for value in (_smallest(line), max(line)))
        told.append(
            Verdict(
                f"{what}: {low} to {high}",
                f"≤ {GROWTH_MAX} x",
                f"{times:.2f} x",
                times <= GROWTH_MAX,
            )
        )
    for transport, fleets in found.fleets.items():
        for what, line, limit, unit in (
            ("share of a core while they idle", fleets.idle, IDLE_MAX, ""),
            ("until all have joined", fleets.joins, JOIN_MAX, " s"),
        ):
            count = max(line)
            value = line[count].median
            text = f"{transport}, {count:,.0f} workers: {what}"
            told.append(Verdict(text, f"≤ {limit:g}{unit}", f"{value:.3g}{unit}", value <= limit))
    return told


def tables(found: Found) -> str:
    """Everything, in Markdown."""
    parts = [
        "### What must hold",
        markdown(
            ["cost from the smallest to the largest", "limit", "measured", "verdict"],
            [
                [one.what, one.limit, one.measured, "met" if one.holds else "**missed**"]
                for one in verdicts(found)
            ],
        ),
        "### The cores alone: CPU µs of the broker a task",
        _table(
            "tasks in the queue", {NAMES[load]: line for load, line in found.core.queue.items()}
        ),
        _table(
            "simulated workers",
            {
                **{NAMES[load]: line for load, line in found.core.workers.items()},
                "one at a time": found.core.few,
                "a worker's join, µs": found.core.joins,
                "heartbeats, of a core": found.core.idle,
            },
        ),
        _table("clients that wait for 4 slots", {NAMES[ALONE]: found.core.clients}),
    ]
    for transport, fleets in found.fleets.items():
        parts += [
            f"### Real sessions over {transport}",
            _table(
                "workers",
                {
                    **{f"{NAMES[load]}, CPU µs a task": line for load, line in fleets.cpu.items()},
                    **{f"{NAMES[load]}, 1/s": line for load, line in fleets.rate.items()},
                    "all joined, s": fleets.joins,
                    "B a session": fleets.memory,
                    "idle, of a core": fleets.idle,
                },
            ),
        ]
    through = {
        name: line
        for transport, one in found.bytes.items()
        for name, line in (
            (f"{transport}, MiB/s", one.rate),
            (f"{transport}, s of CPU a GiB", one.cpu),
        )
    }
    parts += ["### Bytes through the broker", _table("MiB of an argument", through)]
    return "\n".join(
        [*parts, "### Where one broker ends", ends(found), "### Larger sites", sites(found)]
    )


def _table(grows: str, columns: Mapping[str, Line]) -> str:
    sizes = sorted({size for line in columns.values() for size in line})
    rows = [
        [f"{size:,.0f}", *(cell(line.get(size)) for line in columns.values())] for size in sizes
    ]
    return markdown([grows, *columns], rows)


def alone_rate(found: Found, transport: str) -> float:
    """Tasks a second of a broker that has a core for itself, with the largest fleet."""
    line = found.fleets[transport].cpu[ALONE]
    return 1e6 / line[max(line)].low


def best_bytes(found: Found, transport: str) -> float:
    """MiB a second, in the best round of all sizes."""
    return max(one.high for one in found.bytes[transport].rate.values())


def ends(found: Found) -> str:
    """What one broker can do when it has a core for itself,
    by arithmetic from what was measured.
    """
    rows = []
    for transport, fleets in found.fleets.items():
        count = max(fleets.idle)
        short = fleets.cpu[SHORT]
        idle = max(fleets.idle[count].median, 1e-4) / count
        rows.append(
            [
                transport,
                number(alone_rate(found, transport)),
                number(1e6 / min(one.low for one in short.values())),
                number(BUSY / idle),
                number(best_bytes(found, transport)),
                f"{best_bytes(found, transport) * 1024 / alone_rate(found, transport):,.0f} KiB",
            ]
        )
    header = [
        "one broker, one core",
        f"tasks/s alone, {max(max(one.idle) for one in found.fleets.values()):,.0f} workers",
        "no-ops/s in chunks",
        f"sessions whose heartbeats take {BUSY:.0%}",
        "MiB/s",
        "bytes end before tasks from",
    ]
    return markdown(header, rows)


def sites(found: Found) -> str:
    """How many brokers a site wants, each busy by `BUSY`."""
    rate = alone_rate(found, TCP) * BUSY
    bytes_rate = best_bytes(found, TCP) * BUSY
    rows = []
    for cores in (100, 1_000, 10_000, 100_000):
        row = [f"{cores:,}"]
        row += [_brokers(cores / seconds / rate) for seconds in (0.01, 0.1, 1.0, 10.0)]
        row.append(_brokers(cores * 1.0 / bytes_rate))
        rows.append(row)
    header = ["cores", *(f"tasks of {text}" for text in ("10 ms", "100 ms", "1 s", "10 s"))]
    return markdown([*header, "of 1 s with 1 MiB of its own"], rows)


def _brokers(share: float) -> str:
    return f"{math.ceil(share):,} ({share:.1%} of one)" if share <= 1 else f"{math.ceil(share):,}"


def charts(found: Found) -> dict[str, str]:
    """By file name."""
    real = {
        f"{NAMES[load]}, {transport}": line
        for transport, fleets in found.fleets.items()
        for load, line in fleets.cpu.items()
    }
    return {
        "queue.svg": plots.lines(
            "The broker's cores: cost of a task, by the queue's length",
            "tasks in the queue",
            "CPU µs a task",
            {NAMES[load]: line for load, line in found.core.queue.items()},
        ),
        "workers.svg": plots.lines(
            "The broker's cores: cost of a task, by simulated workers",
            "workers",
            "CPU µs a task",
            {
                **{NAMES[load]: line for load, line in found.core.workers.items()},
                "one at a time, the others idle": found.core.few,
            },
        ),
        "sockets.svg": plots.lines(
            "A real broker: cost of a task, by real worker sessions",
            "workers",
            "CPU µs a task",
            real,
        ),
    }


def measure(size: Size) -> Found:
    """Everything."""
    return Found(
        core(size),
        {transport: sockets(size, transport) for transport in (IPC, TCP)},
        {transport: payloads(size, transport) for transport in (IPC, TCP)},
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "scale")
    parser.add_argument("--docs", action="store_true", help="write tables and charts into the docs")
    parser.add_argument("--tiny", action="store_true", help="see that it runs; measures nothing")
    options = parser.parse_args(arguments)
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"load average {os.getloadavg()[2]:.1f} when it began"
    )
    print(machine, flush=True)
    found = measure(TINY if options.tiny else Size())
    text = f"{machine}.\n\n{tables(found)}"
    folders = [options.output, *([CHARTS] if options.docs else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in charts(found).items():
            (folder / name).write_text(drawing, "utf-8")
    (options.output / "scale.md").write_text(text, "utf-8")
    print(f"\n{text}\n{options.output}: charts and scale.md")
    if options.docs:
        DOCS.write_text(with_block(DOCS.read_text("utf-8"), "scale", text), "utf-8")
    missed = [one for one in verdicts(found) if not one.holds]
    for one in missed:
        print(
            f"MISSED: {one.what}: {one.measured}, where the limit is {one.limit}", file=sys.stderr
        )
    return 1 if missed and not options.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
