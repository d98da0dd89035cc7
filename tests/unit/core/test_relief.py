"""What waits at one worker while another has nothing to do comes back, and nothing else does."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.chunking import SHARE_SECONDS
from achilles.core.relief import LOOKS_MAX, PAUSE_MAX, RELIEF_SECONDS, Relief
from tests.unit.core.bench import CLIENT, OTHER, SECOND, WORKER, SchedulerBench, runs

TOGETHER = 4  # tasks of a chunk at the tail
EACH = SHARE_SECONDS / TOGETHER


def known(workers: int = 2, slots: int = 1) -> SchedulerBench:
    """A task of its client's function is known to take `EACH`."""
    bench = SchedulerBench(workers, slots)
    bench.teach(EACH)
    return bench


def shared_out(bench: SchedulerBench, slots: int = 1) -> dict[str, list[p.Run]]:
    """A chunk for each slot of the two workers, and one behind each;
    nothing is left in the queue.
    """
    sends = bench.submit(*range(10, 10 + 4 * slots * TOGETHER))
    found = {name: runs([send for send in sends if send[0] == name]) for name in (WORKER, SECOND)}
    assert [len(each) for each in found.values()] == [2 * slots] * 2
    assert bench.core.status(bench.now).queued == 0
    return found


def finish(bench: SchedulerBench, name: str, chunks: list[p.Run]) -> list[Any]:
    """All that a worker has."""
    sends: list[Any] = []
    for run in chunks:
        sends += bench.done(name, run, seconds=EACH)
    return sends


def revoked(sends: list[Any]) -> list[tuple[str, int]]:
    """Who is asked for which lease; nothing is to be killed, and no task is named."""
    found = [(to, message) for to, message in sends if isinstance(message, p.Revoke)]
    assert not any(message.kill or message.indexes for _, message in found)
    return [(to, message.lease) for to, message in found]


def test_what_waits_at_another_worker_is_called_back() -> None:
    """When there was time for it to be done, and for new work to come."""
    bench = known()
    chunks = shared_out(bench)
    bench.now += RELIEF_SECONDS / 2
    finish(bench, WORKER, chunks[WORKER])
    due = bench.core.next_deadline()
    assert due == bench.now + RELIEF_SECONDS
    assert revoked(bench.tick(RELIEF_SECONDS / 2)) == []
    first, second = chunks[SECOND]
    assert revoked(bench.tick(due - bench.now)) == [(SECOND, first.lease)]
    (again,) = runs(bench.say(SECOND, p.Returned(second.lease, [*range(len(second.ids))])))
    assert again.ids == second.ids


def test_as_many_are_asked_as_there_are_free_slots() -> None:
    bench = known(slots=2)
    chunks = shared_out(bench, 2)
    finish(bench, WORKER, chunks[WORKER])
    leases = [run.lease for run in chunks[SECOND]]
    assert len(leases) == 4
    assert revoked(bench.tick(RELIEF_SECONDS)) == [(SECOND, lease) for lease in leases[:2]]
    assert revoked(bench.tick(RELIEF_SECONDS)) == [(SECOND, lease) for lease in leases[2:]]
    assert revoked(bench.tick(RELIEF_SECONDS)) == [], "each is asked once"


def test_what_gets_on_has_its_own_time() -> None:
    """From its last result on."""
    bench = known()
    chunks = shared_out(bench)
    finish(bench, WORKER, chunks[WORKER])
    bench.now += RELIEF_SECONDS / 2
    first, second = chunks[SECOND]
    bench.say(SECOND, p.Done(first.lease, [0], bytes(1), [b"v"], EACH))
    bench.done(SECOND, second, seconds=EACH)
    assert revoked(bench.tick(RELIEF_SECONDS / 2)) == []
    assert revoked(bench.tick(RELIEF_SECONDS)) == [(SECOND, first.lease)]


def test_new_work_for_the_free_slot_is_enough() -> None:
    bench = known()
    chunks = shared_out(bench)
    finish(bench, WORKER, chunks[WORKER])
    assert [to for to, _ in bench.submit(99)] == [WORKER]
    assert revoked(bench.tick(2 * RELIEF_SECONDS)) == []


def test_what_has_started_is_not_asked_for() -> None:
    """Tasks that are alone in a slot."""
    bench = known()
    bench.submit(10)
    bench.tick(RELIEF_SECONDS)
    assert revoked(bench.tick(RELIEF_SECONDS)) == []


def test_a_worker_helps_its_own_runners_itself() -> None:
    """Where it alone has a free slot, what waits at the others is called back,
    and nothing there.
    """
    bench = known(slots=2)
    chunks = shared_out(bench, 2)
    finish(bench, WORKER, chunks[WORKER][1:])
    asked = revoked(bench.tick(RELIEF_SECONDS)) + revoked(bench.tick(RELIEF_SECONDS))
    assert {to for to, _ in asked} == {SECOND}


def test_one_worker_alone_is_never_asked() -> None:
    bench = known(workers=1, slots=2)
    sends = bench.submit(*range(10, 18))
    bench.done(WORKER, runs(sends)[0], seconds=EACH)
    assert revoked(bench.tick(9.0)) == []


@pytest.mark.parametrize("slots_max", [0, 1])
def test_nobody_gets_more_slots_than_it_wants(slots_max: int) -> None:
    """What would not be given out again is not called back."""
    bench = known()
    bench.join_client(OTHER, slots_max)
    bench.teach(EACH, OTHER)
    (run,) = runs(bench.submit(*range(10, 10 + TOGETHER), peer=OTHER))
    assert len(run.ids) == TOGETHER
    assert bool(revoked(bench.tick(RELIEF_SECONDS))) == (slots_max == 0)


@pytest.mark.parametrize("tag", ["gpu", "big"])
def test_only_a_worker_that_may_run_it_counts(tag: str) -> None:
    """By its tags."""
    bench = SchedulerBench(0)
    options = p.Options(tags=("gpu",))
    for name, offered in ((WORKER, "gpu"), (SECOND, tag)):
        bench.join_worker(name, tags=[offered])
    bench.teach(EACH, options=options)
    payloads: list[p.Payload] = [b"x"] * TOGETHER
    ids = [*range(10, 10 + TOGETHER)]
    assert len(runs(bench.say(CLIENT, p.Submit(1, 0, ids, payloads, options=options)))) == 1
    assert bool(revoked(bench.tick(RELIEF_SECONDS))) == (tag == "gpu")
    bench.tick(RELIEF_SECONDS)


def test_who_finds_nothing_looks_less_often() -> None:
    """As long as that is so."""
    bench = known()
    bench.join_client(OTHER, 1)
    bench.teach(EACH, OTHER)
    bench.submit(*range(10, 10 + TOGETHER), peer=OTHER)
    gaps = []
    for _ in range(4):
        due = bench.core.next_deadline()
        assert due is not None
        gaps.append(due - bench.now)
        assert revoked(bench.tick(due - bench.now)) == []
    assert gaps == pytest.approx([RELIEF_SECONDS, 2 * RELIEF_SECONDS, PAUSE_MAX, PAUSE_MAX])


def test_a_look_is_bounded() -> None:
    """Also where nothing of what waits may run on the workers that are free."""

    class Counted(Relief):
        looks = 0

        def _is_wanted_elsewhere(self, lease: Any) -> bool:
            self.looks += 1
            return False

    class Waiting:
        left, in_slot = 2, True

    class Idle:
        slots, taken = 2, 1

    worker: Any = Idle()
    relief = Counted({frozenset(): OrderedDict({"idle": worker})})
    for _ in range(3 * LOOKS_MAX):
        lease: Any = Waiting()
        relief.note(lease, 0.0)
    relief.workers = 2
    relief.plan(1.0)
    assert relief.tick(1.0 + RELIEF_SECONDS) == []
    assert relief.looks == LOOKS_MAX
    for _ in range(2):
        due = relief.due
        assert due is not None
        relief.tick(due)
    assert relief.looks == 3 * LOOKS_MAX, "each has its turn"


def test_what_a_task_waits_for_is_not_called_back() -> None:
    """A lease whose task has tasks of its own has nothing else."""
    bench = known()
    chunks = shared_out(bench)
    finish(bench, WORKER, chunks[WORKER])
    (worker,) = (one for one in bench.core._workers.values() if one.peer == SECOND)
    first, second = worker.leases.values()
    first.is_lent = True
    sends = bench.core._dispatcher._relief.tick(bench.now + RELIEF_SECONDS)
    assert revoked(sends) == [(SECOND, second.number)]
