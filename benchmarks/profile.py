"""Where the time goes, in client, broker, worker and runner: ``make profile``.

Two loads, round trips of no-ops and a stream of submits, each embedded and on a broker and worker
over ipc. First they run alone, for the figures: how long a task takes, and how much CPU time of
each process; then again under py-spy, for flame graphs (SVG) and for the part that each function
has in its process's time; and round trips once more with the code of all processes at the same
addresses, for what their cores' branch predictors have to do with it.
``--docs`` puts the tables into docs/performance.md.

py-spy has to be allowed to read other processes: on macOS as root,
in a container with the capability SYS_PTRACE.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks import flames, systems
from benchmarks.environments import ROOT
from benchmarks.floor import SAME_ADDRESSES, floors, output_of
from benchmarks.plots import number
from benchmarks.stats import percentile
from benchmarks.systems import System
from benchmarks.tables import markdown, with_block
from benchmarks.work import noop
from benchmarks.workloads import cpu_seconds

SAMPLES_A_SECOND = 250
STREAM = 2_000  # submits at once
DOCS = ROOT / "docs" / "performance.md"
ROLES = ("client", "broker", "worker", "runner")
FUNCTIONS_SHOWN = 8


class Cost(NamedTuple):
    """Of one task, in microseconds: how long it took (the median),
    and the CPU time of each role.
    """

    wall: float
    cpu: Mapping[str, float]


def trips(system: System, seconds: float) -> list[float]:
    """Round trips for so long, and how long each took."""
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        if system.submit(noop, 7).result() != 7:
            raise RuntimeError("a wrong result")
        times.append(time.perf_counter() - start)
    return times


def stream(system: System, seconds: float) -> list[float]:
    """Many submits at once, again and again; seconds a task."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        results = system.gather([system.submit(noop, index) for index in range(STREAM)])
        if results != list(range(STREAM)):
            raise RuntimeError("wrong results")
        times += [(time.perf_counter() - start) / STREAM] * STREAM
    return times


LOADS: dict[str, Callable[[System, float], list[float]]] = {"trips": trips, "stream": stream}


def cost(system: System, load: str, seconds: float) -> Cost:
    """What a task costs, measured without a profiler."""
    LOADS[load](system, min(seconds, 1.0))  # so that all is imported, and chunk sizes are known
    before = cpu_seconds(system.processes())
    times = LOADS[load](system, seconds)
    after = cpu_seconds(system.processes())
    cpu = {role: (after[role] - before[role]) / len(times) * 1e6 for role in after}
    return Cost(percentile(times, 0.5) * 1e6, cpu)


def record(system: System, load: str, seconds: float) -> dict[str, flames.Stacks]:
    """Stacks by role, sampled while the load runs.

    Raises:
        RuntimeError: py-spy may not read a process, or is not there.
    """
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        watchers = []
        for role, numbers in system.processes().items():
            for pid in numbers:
                path = Path(folder, f"{role}-{pid}")
                watchers.append((role, path, _watch(pid, path, seconds)))
        LOADS[load](system, seconds + 1.0)
        found: dict[str, dict[tuple[str, ...], int]] = {}
        for role, path, watcher in watchers:
            output, _ = watcher.communicate(timeout=30)
            if watcher.returncode or not path.exists():
                raise RuntimeError(f"py-spy cannot look into the {role}: {output.strip()[-300:]}")
            stacks = found.setdefault(role, {})
            for stack, count in flames.parse(path.read_text("utf-8")).items():
                stacks[stack] = stacks.get(stack, 0) + count
    return dict(found)


def _watch(pid: int, path: Path, seconds: float) -> subprocess.Popen[str]:
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or "py-spy"
    # Without stopping the process: a thread that was stopped while it waited seems to run for a
    # moment.
    options = [
        "--nonblocking",
        "--rate",
        str(SAMPLES_A_SECOND),
        "--duration",
        str(max(1, round(seconds))),
    ]
    return subprocess.Popen(
        [program, "record", "--pid", str(pid), "--format", "raw", "-o", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def _system(mode: str) -> Iterator[System]:
    with (
        tempfile.TemporaryDirectory(prefix="p-") as folder,
        systems.CONTESTANTS[mode].start(folder) as system,
    ):
        yield system


def costs_table(costs: Mapping[tuple[str, str], Cost]) -> str:
    """A row a load and mode."""
    names = {"trips": "round trip", "stream": "stream of submits"}
    rows = []
    for (mode, load), one in costs.items():
        cpu = [number(one.cpu[role]) if role in one.cpu else "-" for role in ROLES]
        total = number(sum(one.cpu.values()))
        rows.append([f"{names[load]}, {mode}", number(one.wall), *cpu, total])
    return markdown(
        ["µs a task", "wall clock", *(f"{role}, CPU" for role in ROLES), "all CPU"], rows
    )


def layouts_table() -> str:
    """Round trips over ipc as they are, and with the code of all processes at the same addresses; a
    dash where that is not to be had.
    """
    rows = []
    for what, prefix in (
        ("as it is", ()),
        ("with their code at the same addresses in all processes", SAME_ADDRESSES),
    ):
        with tempfile.TemporaryDirectory(prefix="p-") as folder:
            path = Path(folder, "found")
            contestant = [sys.executable, "-m", "benchmarks.contestant", "ipc", str(path)]
            output_of([*prefix, *contestant, "--workloads", "trips"])
            lines = path.read_text("utf-8").splitlines() if path.exists() else []
        figures: dict[str, float] = {}
        for line in lines:
            figures.update(json.loads(line)["figures"])
        cells = [number(figures[one]) if one in figures else "-" for one in ("p50_us", "p99_us")]
        rows.append([what, *cells])
    return markdown(["round trip over ipc, µs", "p50", "p99"], rows)


def functions_table(cpu: Mapping[str, float], stacks: Mapping[str, flames.Stacks]) -> str:
    """Each role's CPU time by the function that ran, in microseconds a task."""
    rows = []
    for role in ROLES:
        if role not in stacks or not stacks[role]:
            continue
        parts = flames.by_function(stacks[role])
        shown = list(parts.items())[:FUNCTIONS_SHOWN]
        rest = max(0.0, 1.0 - sum(part for _, part in shown))
        for function, part in [*shown, ("all others", rest)]:
            rows.append([f"{role}: {function}", number(part * cpu.get(role, 0.0)), f"{part:.0%}"])
    return markdown(["process: function that runs", "µs a task", "of its time"], rows)


def measure(seconds: float, folder: Path) -> str:
    """Everything: the drawings go to the folder, the tables are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    costs: dict[tuple[str, str], Cost] = {}
    tables = []
    for mode in ("embedded", "ipc"):
        with _system(mode) as system:
            for load in LOADS:
                costs[mode, load] = cost(system, load, seconds)
                stacks = record(system, load, seconds)
                for role, found in stacks.items():
                    title = f"{role}, {load}, {mode}"
                    path = folder / f"{mode}-{load}-{role}.svg"
                    path.write_text(flames.flame_graph(title, found), "utf-8")
                tables.append(
                    f"### {load}, {mode}\n\n" + functions_table(costs[mode, load].cpu, stacks)
                )
                print(f"{mode}, {load}: done", flush=True)
    floor = markdown(["floor", "µs"], [[what, number(value)] for what, value in floors().items()])
    return "\n".join([floor, costs_table(costs), layouts_table(), *tables])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each load (default 5)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "profile")
    parser.add_argument("--docs", action="store_true", help="write the tables into the docs")
    options = parser.parse_args()
    found = measure(options.seconds, options.output)
    (options.output / "profile.md").write_text(found, "utf-8")
    print(f"\n{found}\n{options.output}: flame graphs and profile.md")
    if options.docs:
        DOCS.write_text(with_block(DOCS.read_text("utf-8"), "profile", found), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
