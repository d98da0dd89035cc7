"""The promises R1 to R26: for each the command that shows it,
and how its figure is read from what the command says.

A row whose promise is not built yet, or cannot be had on this machine,
has a reason instead of a command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Output(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    text: str
    seconds: float
    chaos: list[dict[str, Any]]  # the reports of `tests.chaos`, by run


class Figure(NamedTuple):
    """What goes into the table."""

    text: str
    holds: bool


Read = Callable[[Output], Figure]


class Row(NamedTuple):
    """One promise. ``command`` is what is run; empty where ``why_not`` says why there is none."""

    number: int
    promise: str
    command: str = ""
    read: Read | None = None
    why_not: str = ""


SIM = "python -m tests.sim --count 4000 --jobs 2"
CHAOS = "python -m tests.chaos --rounds 1 --keep-going"
NEAR = f"{CHAOS} --near"
DETECTION = "python -m tests.reliability.detection"
ALARMS = "python -m tests.reliability.alarms"
PYTEST = "python -m pytest -q -p no:cacheprovider"
JSON_FLAG = "--json"  # how the chaos harness is asked for its reports, by whoever runs a row


# --- Reading --------------------------------------------------------------------------------------


def figure_line(output: Output) -> Figure:
    """Of the measurements of this folder."""
    found = re.findall(r"^figure: (.*)$", output.text, re.M)
    return Figure(found[-1] if found else last_line(output.text), output.code == 0 and bool(found))


def part(*numbers: int) -> Read:
    """Some of the parts of a figure, which semicolons divide."""

    def read(output: Output) -> Figure:
        text, holds = figure_line(output)
        parts = text.split("; ")
        return Figure("; ".join(parts[n] for n in numbers if n < len(parts)), holds)

    return read


def tests(what: str) -> Read:
    """So many of pytest's tests; none may have been left out."""

    def read(output: Output) -> Figure:
        passed, failed, skipped = (
            sum(map(int, re.findall(rf"(\d+) {word}", output.text)))
            for word in ("passed", "(?:failed|errors?)", "skipped")
        )
        text = f"{passed} {what}, {failed} failed" + (f", {skipped} skipped" if skipped else "")
        return Figure(text, output.code == 0 and passed > 0)

    return read


def sim(output: Output) -> Figure:
    """The simulator's closing line."""
    found = re.search(r"^\d+ runs, \d+ failed", output.text, re.M)
    return Figure(found[0] if found else last_line(output.text), output.code == 0)


def last_line(text: str) -> str:
    """What a command that failed said last."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing was said"


def chaos(
    say: Callable[[Mapping[str, int], list[dict[str, Any]]], str],
    *names: str,
    soon: Callable[[dict[str, Any]], bool] = lambda run: True,
) -> Read:
    """Of the runs with these nemeses, or of all:
    ``say`` is given the sums of their buckets and effects, and the runs.

    ``soon``: whether a run kept the promise's time.
    """

    def read(output: Output) -> Figure:
        runs = [run for run in output.chaos if not names or run["nemesis"] in names]
        missing = set(names) - {run["nemesis"] for run in runs if run["verdict"] == "ok"}
        if not runs:
            return Figure(last_line(output.text), False)
        sums: dict[str, int] = {}
        for run in runs:
            for name, count in {**run["effects"], **run["buckets"]}.items():
                sums[name] = sums.get(name, 0) + count
        holds = not missing and all(run["verdict"] == "ok" and soon(run) for run in runs)
        return Figure(say(sums, runs), holds)

    return read


def _lost(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return (
        f"{sums['lost']} lost of {sums['submitted']:,} futures in {len(runs)} runs, {sums['faults']} faults; "
        f"all resolved at most {max(run['drain_seconds'] for run in runs):.1f} s after the last fault"
    )


def _near(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"{_lost(sums, runs)}; {sums['unexpected']} wrong, {sums['duplicated']} resolved twice"


def _twice(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return (
        f"{sums['duplicated']} resolved twice, while {sums['requeued']:,} executions were repeated and {sums['late']} "
        "results came late"
    )


def _wrong(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"{sums['unexpected']} wrong of {sums['compared']:,} values compared"


def _zombies(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return (
        f"{sums['stopped']} processes stopped and continued (workers {sums.get('stop worker', 0)}), "
        f"{sums['duplicated']} duplicates, slots as at the start"
    )


def _broker(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    after = [seconds for run in runs for seconds in run["first_after_kill"]]
    return (
        f"{sums['kill broker']} kills, {sums['lost']} lost, a result at most {max(after, default=0):.1f} s after each; "
        f"{sums['requeued']} executions repeated"
    )


def _partitions(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    cuts = sums.get("partition", 0) + sums.get("reset", 0) + sums.get("flap", 0)
    back = max(run["recovery_seconds"] for run in runs)
    return (
        f"{cuts} cuts of 7 shapes, {sums['lost']} lost, results again {back:.1f} s after the last"
    )


def _everything(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"{sums['faults']} faults of all kinds, {sums['lost']} lost, {sums['unexpected']} wrong"


def _hangs(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"0 clients hung in {len(runs)} runs; a test that takes 60 s fails, with the stacks of all threads"


def _drains(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"{sums['drain worker']} drains, {sums['lost']} lost, {sums['charged']} attempts charged"


def _jumps(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"{sums['clock']} jumps of up to a year, {sums['charged']} attempts charged"


def _descriptors(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return (
        f"{sums['no descriptors']} times without descriptors, {sums['acknowledged']:,} tasks done"
    )


def _disks(sums: Mapping[str, int], runs: list[dict[str, Any]]) -> str:
    return f"{sums['full disk']} times full, logs always; {sums['lost']} lost, {sums['unexpected']} wrong"


# --- The table ------------------------------------------------------------------------------------

ROWS = (
    Row(1, "No accepted future is lost or stays unresolved once faults stop", CHAOS, chaos(_lost)),
    Row(2, "Each future resolves exactly once", CHAOS, chaos(_twice)),
    Row(3, "Right answers under chaos, `map` in order", CHAOS, chaos(_wrong)),
    Row(
        4,
        "Fast detection: runner 250 ms p99, worker 3 s, frozen host 17 s",
        DETECTION,
        figure_line,
    ),
    Row(5, "No live worker is declared lost", ALARMS, part(0, 2)),
    Row(6, "A call that holds the GIL for four times the lost-timeout runs once", ALARMS, part(1)),
    Row(
        7,
        "A task that ends its process fails alone, after three attempts at most",
        "python -m tests.reliability.crashes",
        figure_line,
    ),
    Row(
        8,
        "A worker that fails everything at once takes 20 tasks of 10,000 at most, and fails none",
        "python -m tests.reliability.blackhole",
        figure_line,
    ),
    Row(
        9,
        "A worker that was stopped and continues harms nothing",
        CHAOS,
        chaos(_zombies, "N5"),
    ),
    Row(
        10,
        "The broker may be killed at any time: nothing lost, a result within 5 s",
        CHAOS,
        chaos(_broker, "N3", soon=lambda run: 0 < max(run["first_after_kill"], default=0) <= 5),
    ),
    Row(
        11,
        "A killed client's tasks end within 35 s, the broker's memory is back in 60 s",
        "python -m tests.reliability.clients",
        figure_line,
    ),
    Row(
        12,
        "Partitions of all shapes: nothing lost, results within 2 s of the end",
        CHAOS,
        chaos(_partitions, "N7", "N8", "N9", soon=lambda run: run["recovery_seconds"] <= 2),
    ),
    Row(13, "All faults at once", CHAOS, chaos(_everything, "N18")),
    Row(
        14,
        "The broker's memory is bounded by a budget in bytes",
        f"{PYTEST} tests/integration/test_limits.py tests/unit/core/test_budget.py",
        tests("tests"),
    ),
    Row(
        15,
        "A hostile or slow client leaves others 80 % of their throughput",
        "python -m tests.reliability.isolation",
        figure_line,
    ),
    Row(
        16,
        "A program's end, however it comes, leaves no process, socket or file",
        f"{PYTEST} tests/integration/test_ends.py tests/integration/test_scripts.py",
        tests("ways to end"),
    ),
    Row(17, "Nothing hangs", CHAOS, chaos(_hangs)),
    Row(
        18,
        "A rolling restart of all workers loses and charges nothing",
        CHAOS,
        chaos(_drains, "N6"),
    ),
    Row(19, "Jumps of the wall clock have no effect", CHAOS, chaos(_jumps, "N16")),
    Row(
        20,
        "1,000 sessions are back 10 s after the broker",
        "python -m tests.reliability.storm",
        figure_line,
    ),
    Row(21, "Without free descriptors the broker still serves", CHAOS, chaos(_descriptors, "N12")),
    Row(22, "Full disks lose no work", CHAOS, chaos(_disks, "N13")),
    Row(
        23,
        "No mutated frame is more than refused",
        "python -m tests.reliability.frames",
        figure_line,
    ),
    Row(
        24,
        "The same seed gives the same simulation",
        f"{PYTEST} tests/sim/test_simulation.py -k hashes",
        tests("comparison of 60 seeds under two hash seeds"),
    ),
    Row(
        25,
        "Each planted mistake is caught within 2,000 seeds, by its rule",
        f"{PYTEST} tests/sim/test_mutants.py",
        tests("mutants caught"),
    ),
    Row(
        26,
        "CPython's own tests of executors pass; deviations are in docs/conformance.md",
        f"{PYTEST} tests/conformance/test_cpython.py",
        tests("tests"),
    ),
    Row(27, "Nothing is lost where all meet over ipc, in pipes", NEAR, chaos(_near)),
)

BESIDES = (Row(1, "The same, simulated", SIM, sim),)  # more to a row than one command shows


def parse_chaos(text: str) -> list[dict[str, Any]]:
    """What `tests.chaos --json` has written."""
    found: list[dict[str, Any]] = json.loads(text) if text else []
    return found
