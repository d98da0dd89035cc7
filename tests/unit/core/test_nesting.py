"""Tasks that submit tasks, as the scheduler has them."""

from __future__ import annotations

from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.charges import CRASHES_MAX
from achilles.errors import ProtocolError
from tests.unit.core.bench import CLIENT, OTHER, SECOND, WORKER, SchedulerBench, of, runs

RUNNER = 7


class Bench(SchedulerBench):
    """A bench whose tasks submit tasks; a run's lease says which."""

    def relay(
        self, run: p.Run, message: Any, *, runner: int = RUNNER, worker: str = WORKER
    ) -> list[Any]:
        return self.say(worker, p.Relay(runner, run.root or run.client, run.lease, message))

    def nest(
        self, run: p.Run, *ids: int, runner: int = RUNNER, worker: str = WORKER, init: int = 0
    ) -> list[Any]:
        """The run's task submits tasks."""
        self.relay(run, p.Blob(0, 1, b"g"), runner=runner, worker=worker)
        payloads: list[p.Payload] = [b"%d" % id for id in ids]
        message = p.Submit(1, init, list(ids), payloads)
        return self.relay(run, message, runner=runner, worker=worker)


def told(sends: list[Any]) -> list[Any]:
    """What tasks are told."""
    return [message.message for message in of(sends, p.Relay)]


def test_a_task_lends_its_slot_to_its_own() -> None:
    """The worker is told so before it gets more work than it has slots;
    the result goes by the worker.
    """
    bench = Bench()
    (parent,) = runs(bench.submit(1))
    sends = bench.nest(parent, 1)
    (child,) = runs(sends)
    assert (child.client, child.root, child.ids) == (3, 1, [1])
    kinds = [type(message) for _, message in sends]
    assert kinds.index(p.Lend) < kinds.index(p.Run)
    assert bench.done(WORKER, child) == [
        (WORKER, p.Relay(RUNNER, 1, 0, p.Results([1], b"\0", [b"v1"], 1.0))),
        (WORKER, p.Lend(parent.lease, False)),
    ]
    assert bench.done(WORKER, parent) == [(CLIENT, p.Results([1], b"\0", [b"v1"], 1.0))]


def test_a_nested_client_is_told_of_the_cluster_and_of_the_status() -> None:
    bench = Bench(slots=3)
    (parent,) = runs(bench.submit(1))
    assert told(bench.relay(parent, p.Blob(0, 1, b"g"))) == [p.Cluster(1, 3)]
    (status,) = told(bench.relay(parent, p.StatusRequest()))
    assert (status.running, len(status.clients)) == (1, 1)
    assert bench.join_worker(SECOND, 2) == [
        (CLIENT, p.Cluster(2, 5)),
        (WORKER, p.Relay(RUNNER, 1, 0, p.Cluster(2, 5))),
    ]


def test_a_chain_of_thirty_needs_one_slot() -> None:
    bench = Bench()
    (run,) = runs(bench.submit(1))
    chain = [run]
    for depth in range(30):
        (run,) = runs(bench.nest(run, 1, runner=depth))
        chain.append(run)
    while chain:
        bench.done(WORKER, chain.pop())
    status = bench.core.status(bench.now)
    assert (status.queued, status.running) == (0, 0)
    assert status.clients[0].done == status.done == 31


def test_the_deepest_go_first_and_then_the_newest() -> None:
    bench = Bench()
    (parent,) = runs(bench.submit(1, 2, 3))
    (child,) = runs(bench.nest(parent, 1, 2, runner=1))
    (grandchild,) = runs(bench.nest(child, 1, 2, runner=2))
    assert len({parent.client, child.client, grandchild.client}) == 3
    (next_run,) = runs(bench.done(WORKER, grandchild))
    assert next_run.client == grandchild.client
    bench.done(WORKER, next_run)
    (next_run,) = runs(bench.done(WORKER, child))
    assert next_run.client == child.client


def test_slots_are_counted_at_the_root() -> None:
    """A client does not get more slots than another because its tasks submit some of the work."""
    bench = Bench(slots=2)
    bench.join_client(OTHER)
    (parent,) = runs(bench.submit(1))
    first, second = runs(bench.nest(parent, 1, 2, 3))
    (ahead,) = runs(bench.submit(1, 2, peer=OTHER))
    assert runs(bench.done(WORKER, first)) == []  # the other client's has that slot
    (third,) = runs(bench.done(WORKER, second))
    assert (ahead.client != first.client, third.client) == (True, first.client)


def test_a_limit_of_slots_holds_for_all_together() -> None:
    bench = Bench(slots=4)
    bench.join_client(OTHER, slots_max=1)
    (parent,) = runs(bench.submit(1, 2, peer=OTHER))
    (child,) = runs(bench.nest(parent, 1, 2))
    (second,) = runs(bench.done(WORKER, child))
    assert second.client == child.client
    assert runs(bench.done(WORKER, second)) == []
    assert len(runs(bench.done(WORKER, parent))) == 1


def test_what_waits_for_its_own_goes_alone_and_nothing_is_sent_ahead_of_its_kind() -> None:
    """A chunk that is stopped at its first task would only come back."""
    bench = Bench()
    (first,) = runs(bench.submit(*range(1, 1000)))
    (child,) = runs(bench.nest(first, 1))
    bench.done(WORKER, child)
    assert [len(run.ids) for run in runs(bench.done(WORKER, first, seconds=1e-5))] == [1]


def test_a_runner_that_ends_takes_along_what_it_submitted() -> None:
    bench = Bench(slots=2)
    (parent,) = runs(bench.submit(1))
    running = runs(bench.nest(parent, 1, 2, 3))
    sends = bench.say(WORKER, p.Relay(RUNNER, 0, 0, p.Goodbye("ended")))
    revoked = of(sends, p.Revoke)
    assert [(one.lease, one.kill) for one in revoked] == [(run.lease, True) for run in running]
    assert of(sends, p.Lend) == [p.Lend(parent.lease, False)]
    for run in running:
        bench.say(WORKER, p.Returned(run.lease, [0]))
    (again,) = runs(bench.say(WORKER, p.Crashed(parent.lease, 0, "died")))
    assert (again.attempt, again.ids) == (2, [1])
    assert bench.core.status(bench.now).running == 1


def test_a_worker_that_leaves_takes_along_what_its_tasks_submitted() -> None:
    bench = Bench(workers=2)
    (parent,) = runs(bench.submit(1))
    sends = bench.nest(parent, 1, 2)
    (there,) = runs([send for send in sends if send[0] == SECOND])
    sends = bench.leave(WORKER)
    assert of(sends, p.Revoke) == [p.Revoke(there.lease, [0], True)]
    assert runs(sends) == []
    (again,) = runs(bench.say(SECOND, p.Returned(there.lease, [0])))
    assert (again.client, again.attempt) == (1, 2)


def test_a_client_that_leaves_takes_along_what_its_tasks_submitted() -> None:
    bench = Bench(slots=2)
    (parent,) = runs(bench.submit(1))
    running = runs(bench.nest(parent, 1, 2, 3))
    revoked = of(bench.leave(CLIENT), p.Revoke)
    assert {one.lease for one in revoked} == {parent.lease, *(run.lease for run in running)}
    assert all(one.kill for one in revoked)
    for run in (parent, *running):
        bench.say(WORKER, p.Returned(run.lease, [0]))
    status = bench.core.status(bench.now)
    assert (status.queued, status.running, status.clients) == (0, 0, [])


def test_what_a_task_left_behind_goes_on() -> None:
    bench = Bench()
    (parent,) = runs(bench.submit(1))
    (child,) = runs(bench.nest(parent, 1, 2))
    bench.done(WORKER, parent)
    (second,) = runs(bench.done(WORKER, child))
    assert told(bench.done(WORKER, second)) == [p.Results([2], b"\0", [b"v2"], 1.0)]


def test_only_a_running_task_may_submit() -> None:
    """Neither after its end, nor for another client, nor through another worker."""
    bench = Bench(workers=2, slots=1)
    bench.join_client(OTHER)
    (mine,) = runs(bench.submit(1))
    (other,) = runs(bench.submit(1, peer=OTHER))
    submit = p.Submit(0, 0, [1, 2], [b"a", b"b"])
    bench.done(WORKER, mine)
    for worker, client, lease in [
        (WORKER, 1, mine.lease),  # ended
        (SECOND, 1, other.lease),  # another client's
        (WORKER, other.client, other.lease),  # another worker's
        (SECOND, other.client, 0),
        (SECOND, 9, other.lease),
    ]:
        failed = told(bench.say(worker, p.Relay(RUNNER, client, lease, submit)))
        assert [(one.id, one.kind) for one in failed] == [(1, p.REFUSED), (2, p.REFUSED)]
    bench.leave(OTHER)
    assert (
        told(bench.say(SECOND, p.Relay(RUNNER, other.client, other.lease, submit)))[0].kind
        == p.REFUSED
    )


def test_a_task_that_is_wrong_costs_its_worker_nothing() -> None:
    bench = Bench(credit=3)
    (parent,) = runs(bench.submit(1))
    unknown = p.Submit(9, 0, [1], [b"x"])
    (cluster, failed) = told(bench.relay(parent, unknown))
    assert isinstance(cluster, p.Cluster)
    assert "blob 9, which was not sent" in failed.story[0]
    many = p.Submit(0, 0, [2, 3, 4, 5], [b"x"] * 4)
    assert [one.id for one in told(bench.relay(parent, many))] == [2, 3, 4, 5]
    assert told(bench.relay(parent, p.Blob(0, 0, b"x"))) == []
    bench.nest(parent, 6)
    assert told(bench.relay(parent, p.Forget(0, [1]))) == []
    with pytest.raises(ProtocolError, match="a task does not send Cluster"):
        bench.relay(parent, p.Cluster(1, 1))
    with pytest.raises(ProtocolError, match="a client does not send Relay"):
        bench.say(CLIENT, p.Relay(1, 1, 1, unknown))


def test_an_initializer_is_the_roots() -> None:
    """It travels once to a worker, whoever's task it is for,
    and stays while a nested task may need it.
    """
    bench = Bench()
    bench.say(CLIENT, p.Blob(0, 5, b"init"))
    (parent,) = runs(bench.say(CLIENT, p.Submit(1, 5, [1], [b"1"])))
    sends = bench.nest(parent, 1, init=5)
    (child,) = runs(sends)
    assert child.init == 5
    assert of(sends, p.Blob) == [p.Blob(3, 1, b"g")]
    bench.done(WORKER, parent)
    assert of(bench.say(CLIENT, p.Forget(0, [5])), p.Forget) == []
    bench.leave(WORKER)
    blobs = of(bench.join_worker(SECOND), p.Blob)
    assert blobs == []  # its runner is gone, and so is what it submitted


def test_cancels_and_failures_end_the_wait() -> None:
    bench = Bench(slots=2)
    (parent,) = runs(bench.submit(1))
    crashing, cancelled = runs(bench.nest(parent, 1, 2))
    sends = []
    for _ in range(CRASHES_MAX):
        sends = bench.say(WORKER, p.Crashed(crashing.lease, 0, "died"))
        crashing = (runs(sends) or [crashing])[0]
    (failed,) = told(sends)
    assert (failed.id, failed.kind, len(failed.story)) == (1, p.CRASHED, CRASHES_MAX)
    sends = bench.relay(parent, p.Cancel([2], kill=True))
    assert of(sends, p.Revoke) == [p.Revoke(cancelled.lease, [0], True)]
    assert of(sends, p.Lend) == [p.Lend(parent.lease, False)]


def test_a_chunk_that_started_unnoticed_may_lend_too() -> None:
    """What was sent ahead runs as soon as its runner is free, before the broker hears of that."""
    bench = Bench()
    (first,) = runs(bench.submit(*range(1, 30)))
    running, ahead = runs(bench.done(WORKER, first, seconds=0.004))
    (child,) = runs(bench.nest(ahead, 1))
    bench.done(WORKER, running)
    bench.done(WORKER, child)
    bench.done(WORKER, ahead)
