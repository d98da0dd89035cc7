"""What failures cost a task; the scheduler's tests show the same from outside."""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from achilles.core.charges import CRASHES_MAX, LOSSES_MAX, Charges, may_retry
from achilles.core.dispatch import Dispatcher
from achilles.core.tables import Client, Task, TaskQueue


def made(**options: object) -> tuple[Charges, TaskQueue, Task]:
    """A task that is at a worker, and its queue."""
    client = Client("client", 1, p.ClientHello(b"", "client", "0", "3", "client"))
    group = p.Group(0, 0, options=p.Options(**options))  # type: ignore[arg-type]
    queue = client.queues[group] = TaskQueue(client, group)
    task = client.tasks[7] = Task(7, queue, b"7")
    return Charges(Dispatcher()), queue, task


@pytest.mark.parametrize(
    ("is_crash", "limit", "kind"), [(True, CRASHES_MAX, p.CRASHED), (False, LOSSES_MAX, p.LOST)]
)
def test_a_task_runs_again_until_it_has_failed_too_often(
    is_crash: bool, limit: int, kind: str
) -> None:
    charges, queue, task = made()
    for n in range(1, limit):
        assert charges.charge(task, f"line {n}", is_crash=is_crash) == []
        assert queue.take(1) == [task]
        assert charges.reassigned == n
    story = [f"line {n}" for n in range(1, limit + 1)]
    assert charges.charge(task, story[-1], is_crash=is_crash) == [
        ("client", p.Failed(7, kind, story))
    ]
    assert charges.failed == 1
    assert queue.client.tasks == {}


@pytest.mark.parametrize(
    ("behind", "is_crash", "limit"),
    [({"crashes": 1}, True, CRASHES_MAX), ({"losses": 1}, False, LOSSES_MAX)],
)
def test_what_was_in_a_bundle_that_failed_has_one_attempt_less(
    behind: dict[str, int], is_crash: bool, limit: int
) -> None:
    charges, queue, task = made(**behind)
    for n in range(2, limit):
        assert charges.charge(task, f"line {n}", is_crash=is_crash) == []
        assert queue.take(1) == [task]
    ((_, failed),) = charges.charge(task, "the last", is_crash=is_crash)
    assert isinstance(failed, p.Failed)
    assert len(failed.story) == limit
    assert "in a bundle" in failed.story[0]


@pytest.mark.parametrize(("is_crash", "kind"), [(True, p.CRASHED), (False, p.LOST)])
def test_a_bundle_fails_where_another_is_charged_and_is_no_failure(
    is_crash: bool, kind: str
) -> None:
    """Its client takes it apart."""
    charges, queue, task = made(is_bundle=True)
    assert charges.pardon(task, "the worker's fault") == []
    assert queue.take(1) == [task]
    ((_, failed),) = charges.charge(task, "the last", is_crash=is_crash)
    assert isinstance(failed, p.Failed)
    assert failed.kind == kind
    assert (charges.failed, charges.reassigned) == (0, 2)


def test_what_may_run_at_most_once_fails_at_the_first() -> None:
    charges, _, task = made(at_most_once=True)
    ((_, failed),) = charges.charge(task, "lost", is_crash=False)
    assert failed == p.Failed(7, p.LOST, ["lost; it may run at most once"])


def test_retries_are_taken_one_by_one() -> None:
    charges, queue, task = made(retries=1)
    assert charges.retry(queue, [task], bytes([p.ERROR])) == {task}
    assert queue.take(1) == [task]
    assert charges.retry(queue, [task], bytes([p.ERROR])) == set()
    assert not may_retry(task, queue)


def test_a_value_is_not_retried() -> None:
    charges, queue, task = made(retries=1)
    assert charges.retry(queue, [task], bytes([p.VALUE])) == set()


def test_what_took_too_long_has_its_retries() -> None:
    charges, queue, task = made(retries=1)
    assert charges.exceeded(task, p.TIMEOUT, "slow") == []
    assert queue.take(1) == [task]
    ((_, failed),) = charges.exceeded(task, p.TIMEOUT, "slow again")
    assert failed == p.Failed(7, p.TIMEOUT, ["slow", "slow again"])


def test_a_pardoned_task_runs_again_unless_it_may_run_once() -> None:
    charges, queue, task = made()
    assert charges.pardon(task, "crash") == []
    assert queue.take(1) == [task]
    assert task.blame is not None
    assert (task.blame.crashes, task.blame.attempts) == (0, 1)
    charges, _, task = made(at_most_once=True)
    ((_, failed),) = charges.pardon(task, "crash")
    assert isinstance(failed, p.Failed)
    assert failed.kind == p.CRASHED


def test_nobody_is_told_of_what_nobody_waits_for() -> None:
    charges, queue, task = made()
    task.queue = None
    assert (
        charges.charge(task, "crash", is_crash=True)
        == charges.exceeded(task, p.TIMEOUT, "slow")
        == []
    )
    charges.requeue(queue, [task], is_reassigned=True)
    assert (queue.live, charges.reassigned, charges.failed) == (0, 0, 0)
