"""Whom a runner's death is charged to, and how a runner comes to the end of its tasks."""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from tests.unit.core.agents import (
    HOST,
    AgentBench,
    busy,
    crashed,
    done,
    execute,
    retire,
    returned,
    started,
)
from tests.unit.core.bench import BROKER

# --- Deaths ---------------------------------------------------------------------------------------


def test_a_runners_death_is_charged_to_the_task_that_ran() -> None:
    """What was finished stands, what had not started moves uncharged,
    and what waits gets a new runner.
    """
    bench = busy(1, 2, 3)
    for lease in (2, 3):
        bench.run(lease, 10 * lease, 10 * lease + 1)
        bench.sent()
    bench.finish(1, (1, 0))
    bench.sent()
    bench.die(1, (1, 1), (2, 2), last_seq=2)
    assert bench.sent() == [
        returned(1, 2),
        returned(2, 0, 1),
        crashed(1, 1),
        *started(2, 30, 31),
    ]


def test_a_runner_that_was_all_done_is_mourned_by_nobody() -> None:
    """Its successor has a number of its own."""
    bench = busy(1)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.die(1, last_seq=1)
    bench.run(2, 2)
    assert bench.sent() == started(2, 2)


def test_a_runner_that_died_between_tasks_charges_none() -> None:
    """It has shown before that it can run something."""
    bench = busy(1)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(2, 2, 3)
    bench.sent()
    bench.die(1, (2, 2), last_seq=2)
    assert bench.sent() == [returned(2, 0, 1)]


def test_of_a_chunk_of_unclear_state_the_first_task_is_charged() -> None:
    """Only one can have been running."""
    bench = busy(1, 2, 3)
    bench.die(1, last_seq=1)
    assert bench.sent() == [crashed(1, 0), returned(1, 1, 2)]


@pytest.mark.parametrize("last_seq", [1, 0])
def test_a_stillborn_runner_charges_its_first_task(last_seq: int) -> None:
    """Or it would be started for ever; also if it was dead before it was given anything."""
    bench = busy(1, 2, 3)
    bench.run(2, 4)
    bench.sent()
    unstarted = [(1, 3), (2, 1)] if last_seq else []
    bench.die(1, *unstarted, last_seq=2 if last_seq else 0, reason="exited with code 1")
    assert bench.sent() == [
        returned(1, 1, 2),
        returned(2, 0),
        crashed(1, 0, "exited with code 1"),
    ]


def test_a_runner_that_was_asked_to_end_charges_nothing() -> None:
    """Nothing of what it had not started."""
    bench = busy(1, 2)
    bench.die(1, (1, 2), last_seq=1, reason="")
    assert bench.sent() == [returned(1, 0, 1)]


def test_a_stillborn_runner_without_work_charges_nothing() -> None:
    """What it was to run was taken back before it got it."""
    bench = busy(1)
    bench.recalled(1, (1, 1))
    assert bench.sent() == [returned(1, 0)]
    bench.die(1, last_seq=0)
    bench.run(2, 2)
    assert bench.sent() == started(2, 2)


def test_a_task_that_ends_its_runner_on_purpose_is_charged() -> None:
    """Nobody asked it to."""
    bench = busy(1, 2)
    bench.die(1, (1, 1), last_seq=1, reason="")
    assert bench.sent() == [returned(1, 1), crashed(1, 0, "exited before it was done")]


def test_what_crossed_with_a_death_is_not_charged() -> None:
    """The host knew nothing of it."""
    bench = busy(1, 2)
    bench.run(2, 3, 4)
    bench.sent()
    bench.die(1, (1, 1), last_seq=1)
    assert bench.sent() == [returned(1, 1), returned(2, 0, 1), crashed(1, 0)]


def test_what_crossed_with_the_death_of_an_idle_runner_is_not_charged() -> None:
    """Though it had finished nothing: what it had was taken back, and this it never saw."""
    bench = busy(1, 2)
    bench.recalled(1, (1, 2))
    assert bench.sent() == [returned(1, 0, 1)]
    bench.run(2, 3)
    assert bench.sent() == [execute(1, 2, 3)]
    bench.die(1, last_seq=1)
    assert bench.sent() == [returned(2, 0)]


def test_what_crossed_is_known_when_the_numbers_begin_again() -> None:
    """1 comes after 255; 255 does not come after 1."""
    bench = AgentBench()
    for lease in range(1, 255):
        bench.run(lease, 1)
        bench.sent()
        bench.finish(1, (lease, 0))
        bench.sent()
    bench.run(255, 5)
    bench.sent()
    bench.run(256, 6)
    assert bench.sent() == [execute(1, 1, 6)]
    bench.die(1, last_seq=255)
    assert bench.sent() == [returned(256, 0), crashed(255, 0)]


def test_what_the_host_was_given_is_no_crossing_when_the_numbers_begin_again() -> None:
    """The host names what of it had not started."""
    bench = AgentBench()
    for lease in range(1, 255):
        bench.run(lease, 1)
        bench.sent()
        bench.finish(1, (lease, 0))
        bench.sent()
    for lease in (255, 256):
        bench.run(lease, lease)
        bench.sent()
    bench.die(1, (1, 1), last_seq=1)
    assert bench.sent() == [returned(256, 0), crashed(255, 0)]


# --- Runners for a number of tasks ----------------------------------------------------------------


def test_a_runner_retires_after_its_tasks() -> None:
    """With the chunk that fills it; the next waits for its successor."""
    bench = busy(1, tasks_max=2)
    bench.run(2, 2)
    assert bench.sent() == [execute(1, 2, 2), retire(1)]
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(3, 3)
    bench.finish(1, (2, 0))
    assert bench.sent() == [done(2, (2, 0))]
    bench.die(1, last_seq=2, reason="")
    assert bench.sent() == started(2, 3)


def test_a_chunk_that_does_not_fit_waits_for_a_new_runner() -> None:
    """The old one retires, and takes nothing smaller meanwhile either."""
    bench = busy(1, tasks_max=2)
    bench.run(2, 2, 3)
    assert bench.sent() == [retire(1)]
    bench.run(3, 4)
    bench.finish(1, (1, 0))
    assert bench.sent() == [done(1, (1, 0))]
    bench.die(1, last_seq=1, reason="")
    assert bench.sent() == [*started(2, 2, 3), retire(2)]


def test_an_idle_runner_that_is_too_worn_makes_room_for_a_new_one() -> None:
    """At once, if there is a slot."""
    bench = AgentBench(slots=2, tasks_max=3)
    bench.run(1, 1, 2)
    bench.sent()
    bench.finish(1, (1, 0), (1, 1))
    bench.sent()
    bench.run(2, 3, 4)
    assert bench.sent() == [retire(1), *started(2, 3, 4)]


def test_a_chunk_larger_than_a_runners_life_is_run_all_the_same() -> None:
    """By one of its own."""
    bench = AgentBench(tasks_max=2)
    bench.run(1, 1, 2, 3)
    assert bench.sent() == [*started(1, 1, 2, 3), retire(1)]


def test_also_by_a_runner_that_has_run_nothing_yet() -> None:
    """What it had was taken back."""
    bench = busy(1, tasks_max=2)
    bench.recalled(1, (1, 1))
    bench.sent()
    bench.run(2, 1, 2, 3)
    assert bench.sent() == [execute(1, 2, 1, 2, 3), retire(1)]


def test_an_idle_runner_that_is_too_worn_is_told_so_once() -> None:
    """And its chunk waits for the slot."""
    bench = busy(1, tasks_max=2)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.run(2, 2, 3)
    assert bench.sent() == [retire(1)]
    bench.die(1, last_seq=1, reason="")
    assert bench.sent() == [*started(2, 2, 3), retire(2)]


def test_what_was_taken_back_does_not_count() -> None:
    """The runner did not run it."""
    bench = busy(1, 2, tasks_max=3)
    bench.finish(1, (1, 0))
    bench.sent()
    bench.recalled(1, (1, 1))
    assert bench.sent() == [returned(1, 1)]
    bench.run(2, 3, 4)
    assert bench.sent() == [execute(1, 2, 3, 4), retire(1)]


def test_what_crossed_with_a_retirement_goes_back() -> None:
    """Uncharged."""
    bench = busy(1, tasks_max=5)
    bench.run(2, 2, 3)
    bench.sent()
    bench.finish(1, (1, 0))
    bench.sent()
    bench.die(1, (2, 2), last_seq=2, reason="")
    assert bench.sent() == [returned(2, 0, 1)]


def test_a_runner_that_has_grown_too_much_is_killed_and_its_task_told_why() -> None:
    """What waits behind it goes back."""
    bench = busy(11, 12)
    grown = p.RunnerGrown(runner=1, text="had 9 GiB")
    bench.hear(grown)
    assert bench.sent() == [(HOST, p.Kill(runner=1))]
    bench.hear(grown)  # seen again, before it is gone
    assert bench.sent() == []
    bench.die(1, (1, 1), last_seq=1)
    reason = "had 9 GiB, and was killed"
    crashed_there = p.Crashed(lease=1, index=0, reason=reason, kind=p.MEMORY)
    assert bench.sent() == [returned(1, 1), (BROKER, crashed_there)]
    bench.hear(grown)  # by then nobody knows it
    assert bench.sent() == []
