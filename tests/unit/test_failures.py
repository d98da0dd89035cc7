"""The text of each error that a task ends with which was given up;
`tests.inputs` shows them from outside.
"""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from achilles.errors import (
    ArgumentTooLargeError,
    ResultTooLargeError,
    TaskCrashedError,
    TaskMemoryError,
    TaskTimeoutError,
    WorkerLostError,
)
from achilles.failures import failure, result_too_large

TASK = "work() (task 7)"


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (p.CRASHED, TaskCrashedError, "ended the process that ran it too often"),
        (p.LOST, WorkerLostError, "was on a worker that vanished too often"),
        (p.TIMEOUT, TaskTimeoutError, "took longer than it may"),
        (p.MEMORY, TaskMemoryError, "worker.memory_limit"),
    ],
)
def test_each_error_names_the_task_and_tells_of_each_attempt(
    kind: str, error: type[BaseException], text: str
) -> None:
    found = failure(p.Failed(7, kind, ["first", "second"]), TASK)
    assert type(found) is error
    assert str(found).startswith(f"{TASK} ")
    assert text in str(found)
    assert str(found).endswith("attempt 1: first; attempt 2: second")


def test_once_is_not_too_often() -> None:
    """Of what may run at most once."""
    for kind in (p.CRASHED, p.LOST):
        assert "too often" not in str(failure(p.Failed(7, kind, ["first"]), TASK))


def test_what_a_task_may_not_submit_is_refused_with_the_reason() -> None:
    found = failure(p.Failed(7, p.REFUSED, ["its parent has ended"]), TASK)
    assert type(found) is RuntimeError
    assert str(found) == f"cannot schedule {TASK}: its parent has ended"


def test_what_is_too_large_names_both_sizes_and_the_setting() -> None:
    argument = failure(p.Failed(7, p.OVERSIZED, ["200 100"]), TASK)
    assert type(argument) is ArgumentTooLargeError
    assert (
        "hold 200 bytes, and the broker takes 100 at most: the smaller of broker.argument_max and half of broker.memory"
        in str(argument)
    )
    result = result_too_large("200 100", TASK)
    assert type(result) is ResultTooLargeError
    assert "broker.result_max" in str(result)


def test_sizes_that_are_none_are_not_shown() -> None:
    """A worker can write there what it likes, and a broker nothing at all."""
    assert "hold more bytes" in str(failure(p.Failed(7, p.OVERSIZED, []), TASK))
    assert "holds more bytes, and the broker takes fewer" in str(result_too_large("\x1b[2J", TASK))
