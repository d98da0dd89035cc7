"""A worker's runners: which of them gets the next chunk, and when one is looked at.

Rules
    1. A runner holds at most two chunks: the one that it runs and one behind it. Nothing is put
       behind a task that is known to take long, or is late:
       that goes to the runner that is free first.
    2. Nothing waits behind one task for more than `STUCK_SECONDS`, for `LATE_SECONDS` longer than
       its chunk should take, or for `IDLE_SECONDS` where a runner is idle:
       what has not started is called back.
    3. There are as many runners as slots, and one more for each task that waits for tasks of its
       own. Nothing waits behind one of those.
       Runners that are too many and idle for long are let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from achilles.core import protocol as p
from achilles.core.chunking import IDLE_SECONDS
from achilles.core.runners import CHUNKS_MAX, Chunk, Runner

SURPLUS_SECONDS = 5.0  # a runner beyond the slots may be idle for so long

To: TypeAlias = Literal["broker", "host"]


class Send(NamedTuple):
    """A message to the broker, or a command to the host of the runners."""

    to: To
    message: p.FromWorker | p.RunnerCommand


_NEVER = None, None


class Crew:
    """Up to ``slots`` runners that work at once, each for at most ``tasks_max`` tasks
    (0: no limit).
    """

    def __init__(self, slots: int, tasks_max: int) -> None:
        self.slots = slots
        self.runners: dict[int, Runner] = {}  # by number
        self.lent: set[int] = set()  # leases whose tasks wait for tasks of their own
        self._has_lent = False
        self._tasks_max = tasks_max
        self._next_number = 1
        self._due: dict[int, float] = {}  # the runners that `tick` has to look at, and when
        self._relieve_at: float | None = None  # when to see what waits although a runner is idle

    @property
    def running(self) -> int:
        """How many runners have work."""
        count = 0
        for runner in self.runners.values():
            if runner.chunks:
                count += 1
        return count

    @property
    def _busy(self) -> int:
        """How many runners work, each in a slot."""
        return self.running - len(self.lent)

    @property
    def free(self) -> int:
        """How many runners have nothing to do, and a slot to do something in; not above 0: none."""
        idle = sum(1 for runner in self.runners.values() if runner.is_open and not runner.chunks)
        return min(idle, self.slots - self._busy)

    def holder(self, chunk: Chunk) -> Runner:
        """The runner that has the chunk."""
        return next(runner for runner in self.runners.values() if chunk in runner.chunks)

    def is_behind(self, chunk: Chunk) -> bool:
        """Whether the chunk waits, behind another one or for a runner."""
        return all(
            not runner.chunks or runner.chunks[0] is not chunk for runner in self.runners.values()
        )

    def lend(self, lease: int) -> None:
        """A task waits for others: its slot is free."""
        self.lent.add(lease)
        self._has_lent = True

    # --- Who gets the next chunk ------------------------------------------------------------------

    def choose(self, run: p.Run, sends: list[Send], now: float) -> Runner | None:
        """Who is to have the chunk: an idle runner, or a new one, or one that works;
        None if it has to wait here.
        """
        tasks = len(run.ids)
        busy = self._busy if len(self.runners) > self.slots else 0
        if busy < self.slots:
            for runner in self.runners.values():
                if runner.is_open and not runner.chunks and self._fits(runner, tasks, sends):
                    return runner
        if len(self.runners) < self.slots + len(self.lent):
            runner = self.runners[self._next_number] = Runner(self._next_number)
            self._next_number += 1
            sends.append(Send("host", p.Spawn(runner.number)))
            return runner
        if any(runner.takes_long(run) for runner in self.runners.values()):
            return None
        # What waits behind a long task would come back.
        for runner in sorted(self.runners.values(), key=lambda runner: -runner.progress_at):
            has_room = runner.is_open and not runner.is_lent and not runner.is_late(now)
            if (
                has_room
                and 0 < len(runner.chunks) < CHUNKS_MAX
                and self._fits(runner, tasks, sends)
            ):
                return runner
        return None

    def _fits(self, runner: Runner, tasks: int, sends: list[Send]) -> bool:
        """Whether the runner may take so many more tasks; if not, it takes none any more."""
        if not self._tasks_max or not runner.given or runner.given + tasks <= self._tasks_max:
            return True
        self._retire(runner, sends)
        return False

    def given(self, runner: Runner) -> None:
        """A runner was given a chunk."""
        if self._relieve_at is not None and self.free <= 0:
            self._relieve_at = None
        self.watch(runner)

    def retire_if_worn(self, runner: Runner, sends: list[Send]) -> None:
        """Let the runner go after what it has, if it has had as many tasks as one may."""
        if self._tasks_max and runner.given >= self._tasks_max:
            self._retire(runner, sends)

    def _retire(self, runner: Runner, sends: list[Send]) -> None:
        runner.is_retiring = True
        sends.append(Send("host", p.Retire(runner.number)))

    def remove(self, number: int) -> Runner | None:
        """A runner has ended, or is about to; None if it was not known."""
        self._due.pop(number, None)
        return self.runners.pop(number, None)

    def clear(self) -> None:
        """All runners are ended."""
        self.runners.clear()
        self.lent.clear()
        self._due.clear()
        self._relieve_at = None

    # --- When one is looked at --------------------------------------------------------------------

    def watch(self, runner: Runner) -> None:
        """Note when `tick` has to look at a runner; after each change of it,
        so that no message costs all runners.
        """
        stuck_at, times_out_at = (runner.stuck_at, runner.times_out_at) if runner.chunks else _NEVER
        if stuck_at is None:
            runner.is_wanted = False  # nothing waits there any more
        if stuck_at is None and times_out_at is None:
            self._due.pop(runner.number, None)
        elif stuck_at is None or (times_out_at is not None and times_out_at < stuck_at):
            self._due[runner.number] = times_out_at  # type: ignore[assignment]
        else:
            self._due[runner.number] = stuck_at

    def plan_relief(self, runner: Runner, now: float) -> None:
        """A runner was done with something: if it has nothing to do now,
        see soon whether something waits elsewhere.
        """
        if self._due and not runner.chunks and (self._relieve_at or 0.0) < now:
            self._relieve_at = now + IDLE_SECONDS

    def tick(self, now: float) -> list[Send]:
        """Call back what waits behind a task that runs long; sentence the task that ran for too
        long; let surplus runners go.
        """
        sends: list[Send] = []
        for runner in self._surplus():
            if now >= runner.progress_at + SURPLUS_SECONDS:
                self._retire(runner, sends)
        if not self._due:
            return sends
        if self._relieve_at is not None and now >= self._relieve_at:
            sends += self._relieve(now)
        for number in [number for number, at in self._due.items() if now >= at]:
            runner = self.runners[number]
            times_out_at = runner.times_out_at
            if times_out_at is not None and now >= times_out_at and runner.has_begun:
                chunk = runner.chunks[0]
                runner.condemned[chunk.seq, min(chunk.open)] = p.TIMEOUT
            runner.recalled_at, runner.is_wanted = now, False
            self.watch(runner)
            sends.append(Send("host", p.Recall(number)))
        return sends

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        wanted = min(self._due.values()) if self._due else None
        if wanted is not None and self._relieve_at is not None:
            wanted = min(wanted, self._relieve_at)
        if len(self.runners) > self.slots and (idle := self._surplus()):
            at = idle[0].progress_at + SURPLUS_SECONDS
            wanted = at if wanted is None else min(at, wanted)
        return wanted

    def _surplus(self) -> Sequence[Runner]:
        """Idle runners, as many as are too many, the longest idle first."""
        if len(self.runners) <= self.slots:
            return ()
        staying = [runner for runner in self.runners.values() if not runner.is_retiring]
        idle = [runner for runner in staying if not runner.chunks and not runner.submitted]
        idle.sort(key=lambda runner: runner.progress_at)
        return idle[: max(0, len(staying) - self.slots - len(self.lent))]

    def _relieve(self, now: float) -> list[Send]:
        """Call back what waits behind tasks that run for long,
        from as many runners as are idle; the longest silent first.
        """
        sends: list[Send] = []
        self._relieve_at = None
        held = [one for one in self.runners.values() if one.results and one.stuck_at is not None]
        for runner in sorted(held, key=lambda one: one.shown_at)[: max(0, self.free)]:
            at = runner.shown_at + IDLE_SECONDS
            if now < at:
                self._relieve_at = at
                break
            runner.recalled_at = now
            self.watch(runner)
            sends.append(Send("host", p.Recall(runner.number, True)))
        return sends

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self, *, has_queue: bool) -> None:
        """Assert the rules of this module; tests call it after every step.
        ``has_queue``: a chunk waits for a runner.
        """
        if not self._has_lent:
            assert len(self.runners) <= self.slots, "more runners than slots"
        assert self._due.keys() <= self.runners.keys(), "a dead runner is looked at"
        for runner in self.runners.values():
            wanted = [at for at in (runner.stuck_at, runner.times_out_at) if at is not None]
            assert self._due.get(runner.number) == min(wanted, default=None), "a stale deadline"
            runner.check_invariants()
        if has_queue:
            idle = [runner for runner in self.runners.values() if not runner.chunks]
            free = [runner for runner in idle if not (runner.is_retiring or runner.is_killed)]
            assert not free or self._busy >= self.slots, "a runner idles while a chunk waits"
