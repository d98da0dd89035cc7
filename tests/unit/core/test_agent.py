"""The agent's rules: one report a task, and what becomes of leases;
see `test_crew` for who gets which.
"""

from __future__ import annotations

from achilles.core import protocol as p
from achilles.core.chunking import IDLE_SECONDS, STUCK_SECONDS
from tests.unit.core.agents import (
    HOST,
    LOAD,
    AgentBench,
    busy,
    crashed,
    done,
    execute,
    recall,
    returned,
)
from tests.unit.core.bench import BROKER

# --- Each task is reported once -------------------------------------------------------------------


def test_a_lease_runs_and_is_reported() -> None:
    """The runner is started for it, and gets the function first."""
    bench = AgentBench()
    bench.run(7, 1, 2)
    assert bench.sent() == [(HOST, p.Spawn(runner=1)), LOAD, execute(1, 1, 1, 2)]
    assert bench.core.running == 1
    bench.finish(1, (1, 0), (1, 1))
    assert bench.sent() == [done(7, (1, 0), (1, 1))]
    assert bench.core.running == 0
    assert repr(bench.core) == "<Agent 1/1 runners | 0 leases>"


def test_results_are_reported_as_they_come() -> None:
    """And each once: a runner that says one twice is heard once."""
    bench = busy(1, 2, 3)
    bench.finish(1, (1, 0))
    assert bench.sent() == [done(1, (1, 0))]
    bench.finish(1, (1, 0))
    bench.finish(1, (1, 0), (1, 1))
    assert bench.sent() == [done(1, (1, 1))]
    bench.finish(1, (1, 2))
    assert bench.sent() == [done(1, (1, 2))]
    bench.finish(1, (1, 2))


def test_results_of_two_chunks_are_two_reports() -> None:
    """Each with its own statuses and its own time."""
    bench = busy(1, 2)
    bench.run(2, 3)
    assert bench.sent() == [execute(1, 2, 3)]
    rows = [(1, 0, 1, 0.25, b"a"), (1, 1, 0, 0.5, b"b"), (2, 0, 2, 1.0, b"c")]
    bench.hear(p.RunnerDone(runner=1, results=rows))
    first = p.Done(lease=1, indexes=[0, 1], statuses=b"\1\0", payloads=[b"a", b"b"], seconds=0.75)
    second = p.Done(lease=2, indexes=[0], statuses=b"\2", payloads=[b"c"], seconds=1.0)
    assert bench.sent() == [(BROKER, first), (BROKER, second)]


def test_results_of_what_was_given_back_are_dropped() -> None:
    """The broker has given the task to somebody else."""
    bench = busy(1, 2)
    bench.recalled(1, (1, 1))
    assert bench.sent() == [returned(1, 1)]
    bench.finish(1, (1, 0), (1, 1))
    assert bench.sent() == [done(1, (1, 0))]


def test_a_recall_that_crosses_the_results_takes_nothing_back() -> None:
    """They were all on their way."""
    bench = busy(1, 2, 3)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.finish(1, (1, 1), (1, 2))
    assert bench.sent() == [done(1, (1, 1), (1, 2))]
    bench.run(2, 3)
    assert bench.sent() == [execute(1, 2, 3)]
    bench.recalled(1, (1, 1))
    bench.recalled(1)
    bench.finish(1, (2, 0))
    assert bench.sent() == [done(2, (2, 0))]


def test_unknown_runners_are_passed_over() -> None:
    """They died, or the session in which they lived is over."""
    bench = AgentBench()
    bench.finish(5, (1, 0))
    bench.recalled(5, (1, 1))
    bench.die(5, (1, 1), last_seq=1)
    assert repr(bench.core) == "<Agent 0/1 runners | 0 leases>"


def test_an_empty_lease_is_nothing() -> None:
    """A broker of ours sends none, but a message may be one."""
    bench = AgentBench()
    bench.run(1)
    assert repr(bench.core) == "<Agent 0/1 runners | 0 leases>"


# --- Runners and their chunks ---------------------------------------------------------------------


def test_blobs_are_loaded_once_by_each_runner() -> None:
    """Function, initializer, and what payloads refer to; a task without any needs none."""
    bench = AgentBench(slots=2)
    bench.hear(p.Blob(client=1, blob=2, payload=b"b2"))
    bench.run(1, 1, fn=1, init=2)
    loads = [
        (HOST, p.Load(runner=1, client=1, blob=1, payload=b"b1")),
        (HOST, p.Load(runner=1, client=1, blob=2, payload=b"b2")),
    ]
    assert bench.sent() == [(HOST, p.Spawn(runner=1)), *loads, execute(1, 1, 1, init=2)]
    bench.run(2, 2, fn=0)
    assert bench.sent() == [(HOST, p.Spawn(runner=2)), execute(2, 1, 2, fn=0)]
    bench.run(3, 3, fn=2, init=1)
    assert bench.sent() == [execute(1, 2, 3, fn=2, init=1)]
    bench.hear(p.Blob(client=1, blob=3, payload=b"b3"))
    bench.run(4, 4, fn=0, blobs=(2, 3))
    loads = [
        (HOST, p.Load(runner=2, client=1, blob=2, payload=b"b2")),
        (HOST, p.Load(runner=2, client=1, blob=3, payload=b"b3")),
    ]
    assert bench.sent() == [*loads, execute(2, 2, 4, fn=0, blobs=(2, 3))]


def test_a_blob_that_never_came_is_not_loaded() -> None:
    """The runner says so in the task's outcome."""
    bench = busy(1)
    bench.run(2, 2, fn=9)
    assert bench.sent() == [execute(1, 2, 2, fn=9)]


def test_a_forgotten_blob_is_unloaded_where_it_was_loaded() -> None:
    """And is loaded again when it comes again."""
    bench = AgentBench(slots=2)
    bench.hear(p.Blob(client=2, blob=1, payload=b"of another client"))
    bench.run(1, 1)
    bench.sent()
    bench.run(2, 2, fn=0)
    bench.sent()
    bench.hear(p.Forget(client=1, blobs=[1, 5]))
    assert bench.sent() == [(HOST, p.Unload(runner=1, client=1, blobs=[1, 5]))]
    bench.hear(p.Forget(client=1, blobs=[1]))
    bench.run(3, 3)
    assert bench.sent() == [execute(1, 2, 3)]
    bench.finish(1, (1, 0), (2, 0))
    bench.sent()
    bench.hear(p.Blob(client=1, blob=1, payload=b"b1"))
    bench.run(4, 4)
    assert bench.sent() == [LOAD, execute(1, 3, 4)]
    bench.run(5, 5, client=2)
    load, _ = bench.sent()
    assert load == (HOST, p.Load(runner=1, client=2, blob=1, payload=b"of another client"))


def test_only_the_blobs_that_are_named_are_forgotten() -> None:
    """An empty list names all of the client's."""
    bench = AgentBench()
    bench.hear(p.Blob(client=1, blob=2, payload=b"b2"))
    bench.hear(p.Blob(client=2, blob=3, payload=b"b3"))
    bench.hear(p.Forget(client=1, blobs=[1]))
    bench.run(1, 1, fn=1, init=2)
    load = (HOST, p.Load(runner=1, client=1, blob=2, payload=b"b2"))
    assert bench.sent() == [(HOST, p.Spawn(runner=1)), load, execute(1, 1, 1, init=2)]
    bench.hear(p.Forget(client=1, blobs=[]))
    assert bench.sent() == [(HOST, p.Unload(runner=1, client=1, blobs=[]))]
    bench.run(2, 2, client=2, fn=3)
    load, _ = bench.sent()
    assert load == (HOST, p.Load(runner=1, client=2, blob=3, payload=b"b3"))


def test_chunks_are_numbered_from_1_to_255_and_again() -> None:
    """A token names its chunk in one byte, and 0 is none."""
    bench = AgentBench()
    seqs = []
    for lease in range(1, 258):
        bench.run(lease, 1)
        *_, (_, command) = bench.sent()
        seqs.append(command.seq)
        bench.finish(1, (command.seq, 0))
        bench.sent()
    assert seqs == [*range(1, 256), 1, 2]


# --- What the broker wants back -------------------------------------------------------------------


def revoke(lease: int, *indexes: int) -> p.Revoke:
    """The broker's wish."""
    return p.Revoke(lease=lease, indexes=list(indexes))


def test_a_revoked_lease_that_no_runner_has_is_given_back() -> None:
    """It is not run any more."""
    bench = AgentBench()
    for lease in (1, 2, 3, 4):
        bench.run(lease, lease, 10 + lease)
        bench.sent()
    bench.hear(revoke(3, 0))
    assert bench.sent() == [returned(3, 0, 1)]
    bench.finish(1, (1, 0), (1, 1))
    assert bench.sent() == [done(1, (1, 0), (1, 1)), execute(1, 3, 4, 14)]


def test_what_waits_is_called_back_for_others() -> None:
    """No task is named; the runner keeps one. Who has shown no result yet may be starting."""
    bench = busy(1)
    bench.run(2, 2, 3)
    bench.sent()
    bench.hear(revoke(2))
    assert bench.sent() == []
    bench.finish(1, (1, 0))
    bench.sent()
    bench.hear(revoke(2))
    assert bench.sent() == [recall(1, keeps_first=True)]
    bench.recalled(1, (2, 1))
    assert bench.sent() == [returned(2, 1)]


def test_what_others_wanted_too_early_is_called_back_soon() -> None:
    """They ask once; and of a function that is new there, nobody knows when it should be over."""
    bench = busy(1, 2)
    bench.run(2, 3, 4)
    bench.sent()
    bench.hear(revoke(2))
    assert bench.sent() == []
    bench.finish(1, (1, 0))
    bench.sent()
    assert bench.core.next_deadline() == bench.now + IDLE_SECONDS
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.recalled(1, (2, 2))
    assert bench.sent() == [returned(2, 0, 1)]
    assert bench.core.next_deadline() is None


def test_what_others_wanted_and_is_done_is_wanted_no_more() -> None:
    """What comes next has its time again."""
    bench = busy(1, 2)
    bench.hear(revoke(1))
    bench.finish(1, (1, 0), (1, 1))
    bench.sent()
    bench.run(2, 3, 4)
    bench.sent()
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS


def test_what_was_kept_can_be_called_back_later() -> None:
    """Each time the last ones of those that the runner has come back."""
    bench = busy(1)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(2, 2, 3, 4)
    bench.sent()
    bench.recalled(1, (2, 2))
    assert bench.sent() == [returned(2, 1, 2)]
    bench.recalled(1, (2, 1))
    assert bench.sent() == [returned(2, 0)]


def test_a_revoked_lease_at_a_runner_is_called_back_there() -> None:
    """Only there; and a lease that is over is passed over."""
    bench = AgentBench(slots=2)
    for lease in (1, 2, 3):
        bench.run(lease, lease)
        bench.sent()
    bench.hear(revoke(2, 0))
    assert bench.sent() == [recall(2)]
    bench.hear(revoke(3, 0))
    assert bench.sent() == [recall(1)]
    bench.recalled(2)
    bench.finish(2, (1, 0))
    assert bench.sent() == [done(2, (1, 0))]
    bench.hear(revoke(2, 0))
    bench.hear(revoke(99, 0))


# --- The end --------------------------------------------------------------------------------------

GOODBYE = (BROKER, p.Goodbye(reason="drained"))
DRAIN = (BROKER, p.Drain())


def test_what_has_not_started_goes_back_when_that_is_wanted() -> None:
    """But for a runner's first task, which may be about to start; and more may come."""
    bench = busy(1, 2)
    for lease in (2, 3):
        bench.run(lease, 10 * lease)
        bench.sent()
    bench.step(bench.core.give_back())
    assert bench.sent() == [returned(3, 0), recall(1, keeps_first=True)]
    bench.recalled(1, (1, 1), (2, 1))
    assert bench.sent() == [returned(1, 1), returned(2, 0)]
    bench.run(4, 40)
    assert bench.sent() != [returned(4, 0)]


def test_an_idle_worker_drains_at_once() -> None:
    """A second wish to drain is nothing new."""
    bench = AgentBench()
    assert not bench.core.is_drained
    bench.hear(p.Drain())
    assert bench.sent() == [DRAIN, GOODBYE]
    assert bench.core.is_drained
    bench.hear(p.Drain())


def test_a_draining_worker_finishes_what_runs() -> None:
    """The rest goes back, what comes later too; then it says goodbye, once."""
    bench = busy(1, 2)
    for lease in (2, 3):
        bench.run(lease, 10 * lease)
        bench.sent()
    bench.hear(p.Drain())
    assert bench.sent() == [DRAIN, returned(3, 0), recall(1)]
    bench.run(4, 40)
    assert bench.sent() == [returned(4, 0)]
    bench.recalled(1, (1, 1), (2, 1))
    assert bench.sent() == [returned(1, 1), returned(2, 0)]
    assert not bench.core.is_drained
    bench.finish(1, (1, 0))
    assert bench.sent() == [done(1, (1, 0)), GOODBYE]
    assert bench.core.is_drained
    bench.die(1, last_seq=2)


def test_a_drain_ends_when_all_came_back() -> None:
    """The runner had not started anything."""
    bench = busy(1)
    bench.hear(p.Drain())
    assert bench.sent() == [DRAIN, recall(1)]
    bench.recalled(1, (1, 1))
    assert bench.sent() == [returned(1, 0), GOODBYE]


def test_a_drain_ends_when_the_last_runner_died() -> None:
    """With the report of its task."""
    bench = busy(1)
    bench.hear(p.Drain())
    assert bench.sent() == [DRAIN, recall(1)]
    bench.die(1, last_seq=1)
    assert bench.sent() == [crashed(1, 0), GOODBYE]


def test_the_end_of_the_session_ends_all_work() -> None:
    """Nothing of it is reported any more, and its blobs are unknown:
    numbers of clients begin anew.
    """
    bench = AgentBench(slots=2)
    for lease in (1, 2, 3, 4, 5):
        bench.run(lease, lease)
        bench.sent()
    bench.hear(p.Goodbye(reason="the broker ends"))
    assert bench.sent() == [(HOST, p.Kill(runner=1)), (HOST, p.Kill(runner=2))]
    assert not bench.core.is_drained
    bench.finish(1, (1, 0))
    bench.die(1, last_seq=1)
    assert bench.core.next_deadline() is None
    bench.run(1, 1)
    assert bench.sent() == [(HOST, p.Spawn(runner=3)), execute(3, 1, 1)]


def test_the_end_of_the_session_ends_a_drain() -> None:
    """Nobody is left to say goodbye to."""
    bench = busy(1)
    bench.hear(p.Drain())
    bench.sent()
    bench.step(bench.core.reset())
    assert bench.sent() == [(HOST, p.Kill(runner=1))]
    assert bench.core.is_drained
