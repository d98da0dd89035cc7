"""How many tasks travel together.

Theory
    A dispatch costs some 100 µs wherever it is decided, so tasks that are shorter than that must
    share one; a task that runs long must not, or others wait behind it. Durations are not known in
    advance: they are measured per function, as a moving average over tasks (not over chunks, so
    that one early slow call, which pays for an import, is soon outweighed).

    What was measured first is short, for the shortest tasks are done first. So a chunk holds at
    most `GROWTH` times as many tasks as were measured, until those are `MEASURED_TASKS`: with 16
    slots and lengths of all kinds, whole queues were given out at once by a tenth of their true
    length. Over a slow connection that takes two round trips more, once for each function.

    A chunk holds about `CHUNK_SECONDS` of work; or `BACKLOG_PART` of what is queued for a slot
    where that is more, up to `CHUNK_SECONDS_MAX`: who has that much queued does not miss a result
    for so long, and on busy cores what a chunk costs is taken from the tasks. Not where several
    clients have work: slots go to who holds fewest chunks, so long ones would take most of the
    time. At the tail, where there is less left than would keep every slot busy, chunks shrink with
    what is left (guided self-scheduling: Polychronopoulos and Kuck, 1987), to `SHARE_PART` of what
    is queued for a slot, but not below `SHARE_SECONDS` of work: a slot that idles for so long costs
    less than one more dispatch. Short tasks that are submitted as fast as they are done are all
    tail, and would otherwise travel alone.

    Tasks of one function can take longer than those before them did. A worker gives back what has
    waited behind a task for `LATE_SECONDS` longer than the chunk should have taken, or for
    `STUCK_SECONDS`; or for `IDLE_SECONDS` where it has a runner without work; and what waits at one
    worker while another has a free slot is called back (see `relief`). So nothing is sent ahead, to
    wait behind a running chunk, where a task takes longer than that. Up to `AHEAD_SECONDS` it is
    sent to the worker all the same, if there is one for each slot besides, and waits there for the
    first runner that is free: or each task would pay for a way to the broker and back, 1 ms here
    and a third of its length over a connection of 40 ms.
    Where no task ends for `AHEAD_SECONDS_MAX` it goes back.
"""

from __future__ import annotations

import math

from achilles.core.protocol import TASKS_MAX

CHUNK_SECONDS = 0.005
CHUNK_SECONDS_MAX = 0.08
BACKLOG_PART = 0.5
SHARE_PART = 2 / 3
SHARE_SECONDS = 0.0005
MEASURED_TASKS = 64  # which are enough; the average forgets what is older than about so many
GROWTH = 4
CONTEST_SECONDS = 1.0  # that slots count as contested, from when another client got one
STUCK_SECONDS = 0.095  # since the last known result; later ones may lie in a pipe for 0.086
LATE_SECONDS = 0.02  # later than a chunk should be over, at whose end its results are known
AHEAD_SECONDS = 0.25  # a task that takes longer is sent when a slot is free, and not before
AHEAD_SECONDS_MAX = 2 * AHEAD_SECONDS  # that one waits at a worker where no task ends
IDLE_SECONDS = 0.005  # a runner is idle, with nothing for it on its way


class Estimate:
    """The moving average of a function's task durations, in seconds; None until one was measured.

    ``guess`` is that of tasks that probably take as long:
    the first ones that are measured here replace it.
    """

    __slots__ = ("_weight", "measured", "seconds")

    def __init__(self, guess: Estimate | None = None) -> None:
        self.seconds: float | None = None if guess is None else guess.seconds
        self.measured: int = 0 if guess is None else guess.measured  # tasks, so far as they matter
        self._weight = 0

    def observe(self, tasks: int, seconds: float) -> None:
        """Take in that ``tasks`` tasks took ``seconds`` together."""
        mean = max(seconds, 0.0) / tasks
        if self.seconds is None:
            self.seconds = mean
        else:
            self.seconds += (mean - self.seconds) * (tasks / (tasks + self._weight))
        self._weight = self.measured = min(self._weight + tasks, MEASURED_TASKS)

    @property
    def is_short(self) -> bool:
        """Whether a chunk may wait behind a running one of this function."""
        return self.seconds is not None and self.seconds <= STUCK_SECONDS

    def __repr__(self) -> str:
        return f"<Estimate {'unknown' if self.seconds is None else f'{self.seconds:.6f} s'}>"


def chunk_size(
    estimate: Estimate, queued: int, slots: int, chunk_max: int = 0, *, is_contested: bool = False
) -> int:
    """How many of ``queued`` tasks to dispatch together where ``slots`` slots share them;
    at least 1.
    """
    if estimate.seconds is None or queued == 1:
        return 1
    slots = max(slots, 1)
    each = max(estimate.seconds, 1e-9)
    seconds = CHUNK_SECONDS
    if not is_contested:
        seconds = max(seconds, min(BACKLOG_PART * queued * each / slots, CHUNK_SECONDS_MAX))
    by_time = int(seconds / each)
    if estimate.measured < MEASURED_TASKS:
        by_time = min(by_time, GROWTH * estimate.measured)
    by_share = max(math.ceil(SHARE_PART * queued / slots), int(SHARE_SECONDS / each))
    return max(1, min(by_time, by_share, queued, chunk_max or TASKS_MAX, TASKS_MAX))
