"""Workers at which everything fails get no work for a while,
and their failures are not the tasks'.
"""

from __future__ import annotations

from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.charges import CRASHES_MAX
from achilles.core.standing import QUARANTINE_SECONDS, REST_SECONDS
from tests.unit.core.bench import CLIENT, SECOND, WORKER, SchedulerBench, of

BAD, GOOD = WORKER, SECOND


class StandingBench(SchedulerBench):
    """Two workers of one slot; ``bad`` ends each runner, ``good`` runs each task."""

    def __init__(self, workers: int = 2) -> None:
        super().__init__(workers=workers)
        self.at: dict[str, list[p.Run]] = {}
        self.crashes = 0
        self.failed: list[p.Failed] = []
        self.done_ids: set[int] = set()

    def note(self, sends: list[Any]) -> list[Any]:
        """See who has got what."""
        for to, message in sends:
            if isinstance(message, p.Run):
                self.at.setdefault(to, []).append(message)
        self.failed += of(sends, p.Failed)
        for results in of(sends, p.Results):
            self.done_ids.update(results.ids)
        return sends

    def next(self, worker: str) -> p.Run:
        """The oldest chunk that the worker has."""
        run = self.at[worker].pop(0)
        if not self.at[worker]:
            del self.at[worker]
        return run

    def crash(self, worker: str = BAD) -> list[Any]:
        """The worker's runner dies in its task."""
        run = self.next(worker)
        self.crashes += 1
        return self.note(self.say(worker, p.Crashed(run.lease, 0, "was killed")))

    def finish(self, worker: str = GOOD, status: int = p.VALUE) -> list[Any]:
        """The worker's task is done."""
        run = self.next(worker)
        count = len(run.ids)
        payloads: list[p.Payload] = [b"v"] * count
        done = p.Done(run.lease, list(range(count)), bytes([status] * count), payloads, 1.0 * count)
        return self.note(self.say(worker, done))

    def state(self, name: str = BAD) -> str:
        """What the status says of a worker."""
        (status,) = of(self.say(CLIENT, p.StatusRequest()), p.Status)
        return next(worker.state for worker in status.workers if worker.name == name)


def test_a_black_hole_takes_few_tasks_and_fails_none() -> None:
    """The good worker does them all."""
    bench = StandingBench()
    bench.note(bench.submit(*range(1, 41)))
    assert set(bench.at) == {BAD, GOOD}
    while bench.at or len(bench.done_ids) < 40:
        if BAD in bench.at:
            bench.crash()
        elif GOOD in bench.at:
            bench.finish()
        bench.note(bench.tick(0.1))
    assert bench.failed == []
    assert bench.crashes <= 10
    assert bench.state() == "quarantined"


def test_quarantine_ends_and_is_longer_the_next_time() -> None:
    bench = StandingBench()
    for times in (1, 2):
        ids = range(100 * times, 100 * times + 30)
        bench.note(bench.submit(*ids))
        while bench.at or not bench.done_ids.issuperset(ids):
            if BAD in bench.at:
                bench.crash()
            elif GOOD in bench.at:
                bench.finish()
            bench.note(bench.tick(0.5))
        assert bench.state() == "quarantined"
        bench.tick(QUARANTINE_SECONDS * times + QUARANTINE_SECONDS)
        assert bench.state() == "ready"
    assert bench.failed == []


def test_a_bad_task_is_not_a_bad_worker() -> None:
    """It fails alone, by its own account."""
    bench = StandingBench()
    bench.note(bench.submit(1))
    while not bench.failed:
        for name in list(bench.at):
            bench.crash(name)
        bench.note(bench.tick(REST_SECONDS))
    assert bench.failed[0].kind == p.CRASHED
    assert bench.crashes == CRASHES_MAX
    bench.tick(10 * REST_SECONDS)
    assert {bench.state(BAD), bench.state(GOOD)} == {"ready"}


def test_who_has_done_something_meanwhile_starts_anew() -> None:
    bench = StandingBench()
    bench.note(bench.submit(*range(1, 31)))
    for _ in range(3):
        while BAD not in bench.at:
            bench.note(bench.tick(REST_SECONDS))
        bench.finish(BAD)
        while BAD not in bench.at:
            bench.note(bench.tick(REST_SECONDS))
        bench.crash(BAD)
        assert bench.state() == "ready"


def test_the_only_worker_never_rests() -> None:
    """However badly it does."""
    bench = StandingBench(workers=1)
    bench.note(bench.submit(1, 2, 3))
    for _ in range(3 * CRASHES_MAX):
        bench.crash()
        assert bench.state() == "ready"
    assert [failed.id for failed in bench.failed] == [1, 2, 3]


def test_who_rests_is_needed_when_nobody_else_is_left() -> None:
    bench = StandingBench()
    bench.note(bench.submit(1, 2, 3))
    bench.crash()
    assert bench.state() == "quarantined"
    bench.at.clear()
    bench.leave(GOOD)
    bench.note(bench.tick(0.01))
    assert bench.state() == "ready"
    assert BAD in bench.at


@pytest.mark.parametrize("is_heard", [True, False])
def test_who_is_silent_meanwhile_does_not_get_work_afterwards(is_heard: bool) -> None:
    bench = StandingBench()
    bench.note(bench.submit(*range(1, 9)))
    bench.crash()
    bench.core.suspect(BAD)
    if is_heard:
        bench.note(bench._check(bench.core.resume(BAD, bench.now)))
    bench.tick(10.0)
    assert bench.state() == ("ready" if is_heard else "suspect")


# --- Initializers ---------------------------------------------------------------------------------


def initialized_bench() -> StandingBench:
    bench = StandingBench()
    bench.say(CLIENT, p.Blob(0, 7, b"init"))
    bench.note(bench.say(CLIENT, p.Submit(0, 7, list(range(1, 9)), [b"x"] * 8)))
    assert set(bench.at) == {BAD, GOOD}
    return bench


def test_an_initializer_that_runs_elsewhere_is_the_workers_fault() -> None:
    bench = initialized_bench()
    bench.finish(GOOD)
    assert of(bench.finish(BAD, p.INIT_FAILED), p.Results) == []
    assert bench.state() == "quarantined"
    while len(bench.done_ids) < 8:
        bench.finish(GOOD)
    assert bench.failed == []
    assert BAD not in bench.at


def test_one_that_has_run_nowhere_is_told_to_the_client() -> None:
    bench = initialized_bench()
    (results,) = of(bench.finish(BAD, p.INIT_FAILED), p.Results)
    assert set(results.statuses) == {p.INIT_FAILED}
    assert bench.state() == "ready"
