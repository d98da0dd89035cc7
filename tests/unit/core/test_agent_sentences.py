"""A task that took too long, or that nobody wants any more, is ended with its runner,
and without its neighbours.
"""

from __future__ import annotations

from typing import Any

from achilles.core import protocol as p
from achilles.core.chunking import STUCK_SECONDS
from achilles.core.runners import START_SECONDS
from tests.unit.core.agents import (
    HOST,
    AgentBench,
    busy,
    crashed,
    done,
    execute,
    recall,
    returned,
    started,
)
from tests.unit.core.bench import BROKER

TIMEOUT = 2.0


def kill(runner: int) -> tuple[str, Any]:
    """The command that ends a runner."""
    return HOST, p.Kill(runner=runner)


def timed_out(lease: int, index: int) -> tuple[str, Any]:
    """The report of a task that took too long."""
    reason = f"ran for more than its {TIMEOUT:g} s"
    return BROKER, p.Crashed(lease=lease, index=index, reason=reason, kind=p.TIMEOUT)


def revoke(lease: int, *indexes: int) -> p.Revoke:
    """The broker's wish to end what runs."""
    return p.Revoke(lease=lease, indexes=list(indexes), kill=True)


def warm(*ids: int, **fields: Any) -> AgentBench:
    """A bench whose only runner has shown before that it runs, and has lease 1 with these tasks."""
    bench = busy(0)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(1, *ids, **fields)
    bench.sent()
    return bench


# --- Tasks that take too long ---------------------------------------------------------------------


def test_a_task_that_takes_too_long_is_ended() -> None:
    """Its runner is killed when it is known to be alone there,
    and another one is started for what comes.
    """
    bench = warm(1, timeout=TIMEOUT)
    assert bench.core.next_deadline() == bench.now + TIMEOUT
    bench.tick(TIMEOUT / 2)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    assert bench.core.next_deadline() is None
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.run(2, 2)
    bench.die(1, last_seq=2, reason="")
    assert bench.sent() == [timed_out(1, 0), *started(2, 2)]


def test_a_task_without_a_limit_is_not_ended() -> None:
    """However long it takes."""
    bench = warm(1)
    assert bench.core.next_deadline() is None
    bench.tick(1e6)


def test_a_runner_that_starts_has_more_time_for_its_first_task() -> None:
    """Imports are not the task's: its time counts from when it was not among what was called
    back.
    """
    bench = busy(1, timeout=TIMEOUT)
    assert bench.core.next_deadline() == bench.now + START_SECONDS
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    assert bench.core.next_deadline() == bench.now + TIMEOUT
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.die(1, last_seq=1, reason="")
    assert bench.sent() == [timed_out(1, 0)]


def test_each_task_of_a_chunk_has_its_own_time() -> None:
    """From the end of the one before; being called back for those behind it gives none of them
    more.
    """
    bench = warm(1, 2, 3, timeout=TIMEOUT)
    bench.tick(0.02)
    bench.finish(1, (2, 0))
    bench.sent()
    limit = bench.now + TIMEOUT
    bench.tick_when_due()
    assert bench.now < limit
    assert bench.sent() == [recall(1)]
    bench.recalled(1, (2, 1))
    assert bench.sent() == [returned(1, 2)]
    assert bench.core.next_deadline() == limit
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.die(1, last_seq=2, reason="")
    assert bench.sent() == [timed_out(1, 1)]


def test_who_waits_behind_a_task_that_is_ended_is_not_ended_with_it() -> None:
    """It goes back first; it was never started, and nothing new comes behind the doomed."""
    bench = warm(1, 2, timeout=STUCK_SECONDS / 2)
    bench.run(2, 3)
    bench.sent()
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.run(3, 4)
    bench.recalled(1, (2, 1), (3, 1))
    assert bench.sent() == [returned(1, 1), returned(2, 0), kill(1)]


def test_a_task_that_ends_just_in_time_is_not_ended() -> None:
    """What comes next has its own time."""
    bench = warm(1, 2, timeout=STUCK_SECONDS / 2)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.finish(1, (2, 0))
    assert bench.sent() == [done(1, (2, 0))]
    bench.recalled(1)
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS / 2
    bench.finish(1, (2, 1))
    assert bench.sent() == [done(1, (2, 1))]


def test_neighbours_whose_results_are_on_their_way_are_waited_for() -> None:
    """The host has taken back what it could; what is left over runs, or has run."""
    bench = warm(1, 2, timeout=TIMEOUT)
    bench.hear(revoke(1, 1))
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    bench.finish(1, (2, 0))
    assert bench.sent() == [done(1, (2, 0)), kill(1)]
    bench.die(1, last_seq=2, reason="")
    assert bench.sent() == [returned(1, 1)]


def test_a_doomed_task_may_end_its_runner_itself() -> None:
    """That is a crash, whatever it would have come to; what was behind it is not charged."""
    bench = warm(1, 2, timeout=STUCK_SECONDS / 2)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.die(1, last_seq=2)
    assert bench.sent() == [crashed(1, 0), returned(1, 1)]


# --- Tasks that nobody wants any more -------------------------------------------------------------


def test_a_task_that_nobody_wants_is_ended() -> None:
    """It goes back uncharged: nobody is interested in why.
    Nothing new comes to its runner meanwhile.
    """
    bench = busy(1)
    bench.hear(revoke(1, 0))
    assert bench.sent() == [recall(1)]
    bench.run(2, 2)
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.die(1, last_seq=1, reason="")
    assert bench.sent() == [returned(1, 0), *started(2, 2)]


def test_only_the_tasks_that_are_named_are_ended() -> None:
    """Others of the lease may run on."""
    bench = busy(1, 2)
    bench.hear(revoke(1, 1))
    assert bench.sent() == [recall(1)]
    bench.recalled(1, (1, 1))
    assert bench.sent() == [returned(1, 1)]
    bench.finish(1, (1, 0))
    assert bench.sent() == [done(1, (1, 0))]
    bench.hear(revoke(1, 0))


def test_a_runner_is_killed_once() -> None:
    """Whatever else is said meanwhile."""
    bench = busy(1)
    bench.hear(revoke(1, 0))
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.hear(revoke(1, 0))
    assert bench.sent() == [recall(1)]
    bench.recalled(1)


def test_a_killed_runner_gets_nothing_more() -> None:
    """Also if its task was done just before; what comes waits for the next runner."""
    bench = busy(1)
    bench.hear(revoke(1, 0))
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.finish(1, (1, 0))
    assert bench.sent() == [done(1, (1, 0))]
    bench.run(2, 2)
    bench.die(1, last_seq=1, reason="")
    assert bench.sent() == started(2, 2)


def test_a_task_that_is_not_wanted_keeps_its_time() -> None:
    """A limit of time changes nothing about it; nor does a second revocation,
    about one that took too long.
    """
    bench = warm(1, timeout=TIMEOUT)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.hear(revoke(1, 0))
    assert bench.sent() == [recall(1)]
    bench.recalled(1)
    assert bench.sent() == [kill(1)]
    bench.recalled(1)
    bench.die(1, last_seq=2, reason="")
    assert bench.sent() == [timed_out(1, 0)]


def test_a_revoked_lease_that_no_runner_has_is_not_worth_a_kill() -> None:
    """It never started."""
    bench = busy(1)
    for lease, sends in ((2, [execute(1, 2, 2)]), (3, [])):
        bench.run(lease, lease)
        assert bench.sent() == sends
    bench.hear(revoke(3, 0))
    assert bench.sent() == [returned(3, 0)]


def test_others_of_a_doomed_runner_are_charged_as_ever() -> None:
    """If it dies before it was killed, the task that ran is, doomed or not."""
    bench = busy(1, 2)
    bench.hear(revoke(1, 1))
    assert bench.sent() == [recall(1)]
    bench.die(1, (1, 1), last_seq=1)
    assert bench.sent() == [returned(1, 1), crashed(1, 0)]
