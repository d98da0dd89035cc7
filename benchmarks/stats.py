"""What many rounds say together: medians, spreads, ratios, percentiles,
and idle time in a schedule.

Rounds are paired: a ratio is taken within each round first, because a shared machine is slower for
all in one round than in another; then comes the median over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """One figure over its rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """The distance from the lowest to the highest round, as a part of the median;
        0 if that is 0.
        """
        return (self.high - self.low) / abs(self.median) if self.median else 0.0


def summarize(values: Iterable[float | None]) -> Summary | None:
    """The rounds that have a value, as one; None if none has."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return Summary(statistics.median(found), min(found), max(found), len(found))


def paired_ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Summary | None:
    """``ours / theirs`` in each round that has both; None if no round has.

    A ratio to zero is left out: it says that nothing was measured.
    """
    return summarize(a / b for a, b in zip(ours, theirs) if a is not None and b)


def percentile(values: Iterable[float], part: float) -> float:
    """The smallest value that at least ``part`` (0 to 1) of all do not exceed (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values, no percentile")
    rank = -int(-part * len(ordered) // 1)  # rounded up
    return ordered[min(max(rank, 1), len(ordered)) - 1]


class Span(NamedTuple):
    """When one task ran, in seconds of one clock."""

    start: float
    end: float


def longest_idle(spans: Sequence[Span], slots: int, since: float) -> float:
    """The longest time in seconds that a slot idled while a task was queued.

    All tasks are queued at ``since``; one is queued until it starts. So what counts is up to the
    last start: the longest stretch in which fewer than ``slots`` tasks ran. At one moment, what
    ends makes room before something starts.
    """
    if not spans:
        return 0.0
    last_start = max(span.start for span in spans)
    changes = [(span.start, 1) for span in spans] + [(span.end, -1) for span in spans]
    running, longest = 0, 0.0
    idle_since: float | None = since
    for moment, change in sorted(changes):
        running += change
        if running >= slots:
            if idle_since is not None:
                longest = max(longest, min(moment, last_start) - idle_since)
            idle_since = None
        elif idle_since is None:
            if moment >= last_start:
                break
            idle_since = moment
    if idle_since is not None:
        longest = max(longest, last_start - idle_since)
    return longest


def ideal_seconds(seconds: Sequence[float], slots: int) -> float:
    """A lower bound of what any schedule takes for tasks that long: no slot ever idle,
    no task cut.
    """
    return max(sum(seconds) / slots, max(seconds, default=0.0))
