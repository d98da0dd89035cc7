"""The crew's rules, as its agent shows them: two chunks a runner,
and nothing waits where it need not.
"""

from __future__ import annotations

import pytest

from achilles.core.chunking import AHEAD_SECONDS_MAX, IDLE_SECONDS, LATE_SECONDS, STUCK_SECONDS
from achilles.core.runners import LONG_SECONDS, START_SECONDS
from tests.unit.core.agents import (
    STEADY,
    AgentBench,
    busy,
    done,
    execute,
    recall,
    returned,
    started,
)

# --- Who gets the next chunk ----------------------------------------------------------------------


def test_a_runner_holds_two_chunks() -> None:
    """A third waits until the first is done, wherever it is done."""
    bench = AgentBench(slots=2)
    for lease, sends in enumerate(
        [started(1, 1), started(2, 2), [execute(1, 2, 3)], [execute(2, 2, 4)], [], []], 1
    ):
        bench.run(lease, lease)
        assert bench.sent() == sends
    bench.finish(2, (1, 0))
    assert bench.sent() == [done(2, (1, 0)), execute(2, 3, 5)]
    bench.finish(1, (1, 0), (2, 0))
    assert bench.sent() == [done(1, (1, 0)), done(3, (2, 0)), execute(1, 3, 6)]


def test_idle_runners_are_used_before_new_ones_are_started() -> None:
    """A start is slow."""
    bench = AgentBench(slots=2)
    bench.run(1, 1)
    bench.sent()
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(2, 2)
    assert bench.sent() == [execute(1, 2, 2)]


# --- Nothing waits behind a long task -------------------------------------------------------------


def test_what_waits_behind_a_long_task_is_called_back() -> None:
    """Again and again, until the host has answered."""
    bench = busy(1, 2)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(2, 3)
    bench.sent()
    assert bench.core.next_deadline() == bench.now + STEADY + LATE_SECONDS
    bench.tick(LATE_SECONDS)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    assert bench.core.next_deadline() == bench.now + STEADY + LATE_SECONDS
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.recalled(1, (2, 1))
    assert bench.sent() == [returned(2, 0)]
    assert bench.core.next_deadline() is None
    bench.tick(9.0)


def test_what_should_have_been_over_soon_is_called_back_sooner() -> None:
    """A chunk of short tasks, by how long those before it took."""
    bench = busy(1)
    bench.finish(1, (1, 0), seconds=0.001)
    bench.sent()
    bench.run(2, 2, 3, 4)
    bench.sent()
    assert bench.core.next_deadline() == pytest.approx(bench.now + 0.003 + LATE_SECONDS)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]


def test_another_function_says_nothing_of_how_long_a_chunk_should_take() -> None:
    """Short tasks before it do not make it late."""
    bench = busy(1)
    bench.finish(1, (1, 0), seconds=0.001)
    bench.sent()
    bench.run(2, 2, 3, 4, fn=2)
    bench.sent()
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS


def test_what_waits_in_the_same_chunk_is_called_back_too() -> None:
    """Its first task runs."""
    bench = busy(1, 2, 3)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.recalled(1, (1, 1))
    assert bench.sent() == [returned(1, 2)]
    assert bench.core.next_deadline() is None


def two_that_work() -> AgentBench:
    """Runner 1 has a lease of two tasks, and another one behind it; runner 2 has a task."""
    bench = AgentBench(slots=2)
    for lease in (1, 2):
        bench.run(lease, lease)
        bench.sent()
    for runner in (1, 2):
        bench.finish(runner, (1, 0))
        bench.sent()
    for lease, ids in ((3, (3, 4)), (4, (5,)), (5, (6, 7))):
        bench.run(lease, *ids)
        bench.sent()
    return bench


def test_nothing_waits_for_long_while_a_runner_is_idle() -> None:
    """What is behind a running task goes back as soon as no work can be on its way to the other."""
    bench = two_that_work()
    bench.tick(0.001)
    bench.finish(2, (2, 0))
    bench.sent()
    assert bench.core.next_deadline() == bench.now + IDLE_SECONDS
    bench.tick(IDLE_SECONDS / 2)
    bench.tick_when_due()
    assert bench.sent() == [recall(1, keeps_first=True)]
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS
    bench.recalled(1, (2, 1), (3, 2))
    assert bench.sent() == [returned(3, 1), returned(5, 0, 1)]
    bench.run(6, 4)
    assert bench.sent() == [execute(2, 3, 4)]


def test_a_runner_that_gets_on_is_not_called_back_for_an_idle_one() -> None:
    """It has its own time from its last result on."""
    bench = two_that_work()
    bench.finish(2, (2, 0))
    bench.sent()
    bench.tick(IDLE_SECONDS * 0.75)
    bench.finish(1, (2, 0))
    bench.sent()
    got_on = bench.now
    bench.tick_when_due()
    assert bench.sent() == []
    assert bench.core.next_deadline() == got_on + IDLE_SECONDS
    bench.tick_when_due()
    assert bench.sent() == [recall(1, keeps_first=True)]


def test_the_longest_silent_is_called_back_first() -> None:
    """Not who is expected to be over first, which gets on."""
    bench = AgentBench(slots=3)
    for lease in (1, 2, 3):
        bench.run(lease, lease)
        bench.sent()
    for runner in (1, 2, 3):
        bench.finish(runner, (1, 0), seconds=0.001)
        bench.sent()
    for lease, count in ((4, 60), (5, 3), (6, 1)):
        bench.run(lease, *range(100 * lease, 100 * lease + count))
        bench.sent()
    bench.finish(3, (2, 0), seconds=0.001)
    bench.sent()
    bench.tick(IDLE_SECONDS * 0.75)
    bench.finish(2, (2, 0), seconds=0.001)
    bench.sent()
    bench.tick_when_due()
    assert bench.sent() == [recall(1, keeps_first=True)]


def test_nothing_is_called_back_while_all_runners_work() -> None:
    """It would come back to where it was."""
    bench = two_that_work()
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS
    bench.tick(0.001)
    bench.finish(2, (2, 0))
    bench.sent()
    bench.run(6, 8)
    bench.sent()
    deadline = bench.core.next_deadline()
    assert deadline is not None
    assert deadline > bench.now + 2 * IDLE_SECONDS, "it would wake for nothing"
    bench.tick(2 * IDLE_SECONDS)
    assert bench.sent() == []


def test_a_task_alone_may_take_its_time() -> None:
    """Nothing waits behind it."""
    bench = busy(1)
    assert bench.core.next_deadline() is None
    bench.tick(9.0)


def test_a_runner_that_starts_has_more_time() -> None:
    """Until its first result it may be importing."""
    bench = busy(1, 2)
    assert bench.core.next_deadline() == bench.now + START_SECONDS
    bench.tick(STUCK_SECONDS)
    bench.tick_when_due()
    assert bench.sent() == [recall(1)]
    bench.finish(1, (1, 0))
    assert bench.sent() == [done(1, (1, 0))]
    assert bench.core.next_deadline() is None


def test_a_chunk_behind_the_running_one_gives_it_no_more_time() -> None:
    """A result does, and work for an idle runner."""
    bench = busy(1)
    began = bench.now
    bench.tick(0.1)
    bench.run(2, 2)
    bench.sent()
    assert bench.core.next_deadline() == began + START_SECONDS
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(3, 3)
    bench.sent()
    assert bench.core.next_deadline() == bench.now + STEADY + LATE_SECONDS
    bench.finish(1, (2, 0), (3, 0))
    bench.sent()
    bench.tick(9.0)
    bench.run(4, 4, 5)
    bench.sent()
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS


def test_the_most_urgent_runner_sets_the_deadline() -> None:
    """Each is called back for itself."""
    bench = AgentBench(slots=3)
    bench.run(3, 9)
    bench.sent()
    bench.run(1, 1, 2)
    bench.sent()
    first = bench.now + START_SECONDS
    bench.tick(0.1)
    bench.run(2, 3, 4, 6)
    bench.sent()
    assert bench.core.next_deadline() == first
    bench.tick_when_due()
    assert bench.sent() == [recall(2)]
    bench.finish(3, (1, 0))
    bench.sent()
    assert bench.core.next_deadline() == bench.now + STUCK_SECONDS  # the last is the first now
    bench.tick_when_due()
    assert bench.sent() == [recall(3)]


def test_the_place_of_what_was_taken_back_is_filled() -> None:
    """By the next lease that waits."""
    bench = busy(1)
    bench.run(2, 2)
    assert bench.sent() == [execute(1, 2, 2)]
    bench.run(3, 3)
    bench.recalled(1, (2, 1))
    assert bench.sent() == [returned(2, 0), execute(1, 3, 3)]


# --- What takes long waits for the first runner that is free --------------------------------------


def two_that_take_long() -> AgentBench:
    """Each of two runners has a task that takes long, by the one before it, and a lease waits."""
    bench = AgentBench(slots=2)
    for lease in (1, 2):
        bench.run(lease, lease)
        bench.sent()
    for runner in (1, 2):
        bench.finish(runner, (1, 0), seconds=1.01 * LONG_SECONDS)
        bench.sent()
    for lease in (3, 4):
        bench.run(lease, lease)
        bench.sent()
    bench.run(5, 5)
    assert bench.sent() == []
    return bench


@pytest.mark.parametrize("runner", [1, 2])
def test_what_takes_long_goes_to_the_runner_that_is_free_first(runner: int) -> None:
    """What is behind another task would have to be called back from there."""
    bench = two_that_take_long()
    bench.tick(0.1)
    bench.finish(runner, (2, 0))
    assert bench.sent() == [done(runner + 2, (2, 0)), execute(runner, 3, 5)]


def test_what_finds_no_runner_free_for_long_goes_back() -> None:
    """To where tasks end, perhaps. The time counts from the last one that ended here."""
    bench = two_that_take_long()
    bench.tick(AHEAD_SECONDS_MAX / 2)
    bench.run(6, 6)
    bench.sent()
    bench.finish(1, (2, 0))
    assert bench.sent() == [done(3, (2, 0)), execute(1, 3, 5)]
    assert bench.core.next_deadline() == bench.now + AHEAD_SECONDS_MAX
    bench.tick_when_due()
    assert bench.sent() == [returned(6, 0)]
    assert bench.core.next_deadline() is None


def test_what_waits_stays_while_there_is_no_broker() -> None:
    """Nobody could give it out elsewhere."""
    bench = two_that_take_long()
    bench.core.hold([], bench.now)
    bench.tick(2 * AHEAD_SECONDS_MAX)
    assert bench.sent() == []
