"""A client that ends waits for what runs of it though it was cancelled: what it asks,
and when it is told.
"""

from __future__ import annotations

from achilles.core import protocol as p
from tests.unit.core.bench import BROKER, CLIENT, WORKER, SchedulerBench, runs
from tests.unit.core.test_nesting import Bench as NestingBench
from tests.unit.core.test_submission import SubmissionBench

FINISHED = (CLIENT, p.Finished())


def test_who_has_nothing_that_runs_is_finished_at_once() -> None:
    bench = SchedulerBench()
    assert bench.say(CLIENT, p.Finish()) == [FINISHED]
    (run,) = runs(bench.submit(1))
    bench.done(WORKER, run)
    assert bench.say(CLIENT, p.Finish()) == [FINISHED]


def test_who_has_cancelled_what_runs_is_finished_when_it_has_ended() -> None:
    """With a result that nobody wants, or by not starting at all."""
    bench = SchedulerBench(slots=2)
    one, other = runs(bench.submit(1, 2))
    bench.say(CLIENT, p.Cancel([1, 2]))
    assert bench.say(CLIENT, p.Finish()) == []
    assert FINISHED not in bench.done(WORKER, one)
    assert bench.say(WORKER, p.Returned(other.lease, [0])) == [FINISHED]
    assert bench.tick(9.0) == []


def test_who_has_cancelled_what_ran_on_a_lost_worker_is_finished() -> None:
    bench = SchedulerBench()
    bench.submit(1)
    bench.say(CLIENT, p.Cancel([1]))
    assert bench.say(CLIENT, p.Finish()) == []
    assert FINISHED in bench.leave(WORKER)


def test_who_has_left_is_told_nothing() -> None:
    bench = SchedulerBench()
    (run,) = runs(bench.submit(1))
    bench.say(CLIENT, p.Cancel([1]))
    bench.say(CLIENT, p.Finish())
    bench.leave(CLIENT)
    assert FINISHED not in bench.done(WORKER, run)


def test_the_broker_is_asked_for_the_end_only_if_something_may_run_unheard() -> None:
    """Most programs cancel nothing."""
    bench = SubmissionBench()
    bench.submit(1)
    bench.sent()
    bench.hear(p.Results([1], b"\0", [b"v"]))
    bench.sent()
    assert bench.core.is_finished
    assert bench.core.finish() == []
    bench.submit(2)
    bench.sent()
    bench.cancel(2)
    bench.sent()
    assert not bench.core.is_finished
    bench.step(bench.core.finish())
    assert bench.sent() == [(BROKER, p.Finish())]
    assert bench.core.finish() == []
    bench.hear(p.Finished())
    assert bench.core.is_finished


def test_what_the_broker_never_had_does_not_run() -> None:
    """It was cancelled in time."""
    bench = SubmissionBench(credit=None)
    bench.submit(1)
    bench.cancel(1)
    assert bench.core.is_finished


def test_the_next_broker_is_asked_again() -> None:
    """It may have heard from workers what runs."""
    bench = SubmissionBench()
    bench.submit(1)
    bench.sent()
    bench.cancel(1)
    bench.sent()
    bench.step(bench.core.finish())
    assert bench.sent() == [(BROKER, p.Finish())]
    bench.disconnect()
    bench.connect()
    assert (BROKER, p.Finish()) in bench.sent()


def test_a_runner_that_has_been_a_client_keeps_nobody_waiting() -> None:
    """It stays one until it ends; what is waited for is the task,
    also while that has lent its slot.
    """
    bench = NestingBench()
    (parent,) = runs(bench.submit(1))
    (child,) = runs(bench.nest(parent, 1))
    bench.say(CLIENT, p.Cancel([1]))
    assert bench.say(CLIENT, p.Finish()) == []
    assert FINISHED not in bench.done(WORKER, child)
    assert FINISHED in bench.done(WORKER, parent)
