"""How many tasks travel together.

Theory
    A dispatch costs some 100 µs wherever it is decided, so tasks that are shorter than that must share
    one; a task that runs long must not, or others wait behind it. Durations are not known in advance:
    they are measured per function, as a moving average over tasks (not over chunks, so that one early
    slow call, which pays for an import, is soon outweighed).

    A chunk holds about `CHUNK_SECONDS` of work. At the tail, where there is less left than would keep
    every slot busy, chunks shrink with what is left (guided self-scheduling: Polychronopoulos and Kuck, 1987),
    but not below `SHARE_SECONDS` of work: a slot that idles for so long costs less than one more dispatch. Short tasks
    that are submitted as fast as they are done are all tail, and would otherwise travel alone.
"""

from __future__ import annotations

from achilles.core.protocol import TASKS_MAX

CHUNK_SECONDS = 0.005
SHARE_SECONDS = 0.0005
PREFETCH_SECONDS_MAX = 0.1
_MEMORY_TASKS = 64  # the average forgets what is older than about so many tasks


class Estimate:
    """The moving average of a function's task durations, in seconds; None until one was measured."""

    __slots__ = ("_tasks", "seconds")

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._tasks = 0

    def observe(self, tasks: int, seconds: float) -> None:
        """Take in that ``tasks`` tasks took ``seconds`` together."""
        mean = max(seconds, 0.0) / tasks
        if self.seconds is None:
            self.seconds = mean
        else:
            self.seconds += (mean - self.seconds) * (tasks / (tasks + self._tasks))
        self._tasks = min(self._tasks + tasks, _MEMORY_TASKS)

    @property
    def is_short(self) -> bool:
        """Whether a chunk may wait behind a running one of this function."""
        return self.seconds is not None and self.seconds <= PREFETCH_SECONDS_MAX

    def __repr__(self) -> str:
        return f"<Estimate {'unknown' if self.seconds is None else f'{self.seconds:.6f} s'}>"


def chunk_size(estimate: Estimate, queued: int, slots: int, chunk_max: int = 0) -> int:
    """How many of ``queued`` tasks to dispatch together where ``slots`` slots share them; at least 1."""
    if estimate.seconds is None:
        return 1
    by_time = int(CHUNK_SECONDS / estimate.seconds) if estimate.seconds > 1e-9 else TASKS_MAX
    by_share = max(
        -(-queued // (2 * max(slots, 1))), int(by_time * (SHARE_SECONDS / CHUNK_SECONDS))
    )
    return max(1, min(by_time, by_share, queued, chunk_max or TASKS_MAX, TASKS_MAX))
