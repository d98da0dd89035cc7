"""Where achilles must stand, and whether it does: the goals are here, the figures come from a run.

A goal compares a figure of one contestant with a limit: as a ratio to another contestant's (or
another of its own) in the same round, or by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.stats import Summary, paired_ratio, summarize

Figures = Mapping[
    str, Mapping[str, Sequence[float | None]]
]  # contestant: figure: a value each round

POOL, RAY, DASK = "processpool", "ray", "dask"
EMBEDDED, IPC, TCP = "embedded", "ipc", "tcp"
CLUSTERS = (IPC, TCP)


class Goal(NamedTuple):
    """``figure`` of ``contestant``, divided by ``against`` if there is one,
    must not pass ``limit``.
    """

    what: str
    contestant: str
    figure: str
    limit: float
    unit: str  # what the limit is in; "x" for ratios
    at_least: bool = False
    against: tuple[str, str] | None = None  # a contestant and its figure


class Verdict(NamedTuple):
    goal: Goal
    measured: Summary | None
    reason: str  # why nothing was measured; "" otherwise

    @property
    def is_met(self) -> bool | None:
        """None: nothing was measured."""
        if self.measured is None:
            return None
        if self.goal.at_least:
            return self.measured.median >= self.goal.limit
        return self.measured.median <= self.goal.limit

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.is_met]


def goals() -> list[Goal]:
    """All goals, in the order in which they are shown: embedded, over ipc,
    and the same over TCP with CURVE.
    """
    both = ((EMBEDDED, 0), *((name, 1) for name in CLUSTERS))
    found: list[Goal] = []

    def add(what: str, figure: str, limits: tuple[float, float], unit: str, *against: str) -> None:
        """``limits``: embedded, through a broker."""
        at_least = unit.startswith(">")
        for name, column in both:
            other = (against[0] or name, against[1]) if against else None
            found.append(
                Goal(what, name, figure, limits[column], unit.lstrip(">"), at_least, other)
            )

    def add_peer(what: str, figure: str, limit: float, unit: str, peer: str) -> None:
        """For what goes through a broker, against another system that has one."""
        for name in CLUSTERS:
            at_least = unit.startswith(">")
            other = (peer, figure)
            found.append(Goal(what, name, figure, limit, unit.lstrip(">"), at_least, other))

    add(
        "no-op submit rate, of ProcessPoolExecutor",
        "submit_rate",
        (10, 8),
        ">x",
        POOL,
        "submit_rate",
    )
    add_peer("no-op submit rate, of Ray", "submit_rate", 40, ">x", RAY)
    add_peer("no-op submit rate, of dask", "submit_rate", 100, ">x", DASK)
    add("p50 round trip, of ProcessPoolExecutor", "p50_us", (0.6, 2), "x", POOL, "p50_us")
    add_peer("p50 round trip, of Ray", "p50_us", 0.25, "x", RAY)
    add(
        "map of no-ops, untuned, of ProcessPoolExecutor with its best chunksize",
        *("map_rate", (1, 0.5), ">x", POOL, "map_best_rate"),
    )
    add("1 ms tasks, efficiency", "efficiency_1ms", (97, 95), ">%")
    add("skewed tasks, total of the ideal schedule", "skew_ratio", (1.1, 1.1), "x")
    add("skewed tasks, longest idle with a task queued", "skew_idle_ms", (50, 50), "ms")
    add(
        "64 MiB argument, of ProcessPoolExecutor",
        "argument_ms",
        (0.15, 0.8),
        "x",
        POOL,
        "argument_ms",
    )
    add(
        "the same 64 MiB in 200 tasks, of one transfer",
        "shared_ms",
        (1.5, 1.5),
        "x",
        "",
        "argument_ms",
    )
    add("1,000,000 queued no-ops, client, a task", "million_client_bytes", (1024, 1024), "B")
    for name in CLUSTERS:
        found.append(
            Goal(
                "1,000,000 queued no-ops, broker, a task beyond its payload",
                *(name, "million_broker_bytes", 300, "B"),
            )
        )
    add("start-up to first result", "startup_s", (0.3, 1.5), "s")
    return found


def judge(goal: Goal, figures: Figures) -> Verdict:
    """Whether the goal is met by these rounds; if nothing was measured, whose figure is missing."""
    ours = figures.get(goal.contestant, {}).get(goal.figure, ())
    if summarize(ours) is None:
        return Verdict(goal, None, f"{goal.contestant} has no {goal.figure}")
    if goal.against is None:
        return Verdict(goal, summarize(ours), "")
    name, figure = goal.against
    theirs = figures.get(name, {}).get(figure, ())
    ratio = paired_ratio(ours, theirs)
    if ratio is None:
        return Verdict(goal, None, f"{name} has no {figure} in the same round")
    return Verdict(goal, ratio, "")
