"""The errors of futures are what existing code catches."""

from __future__ import annotations

import pickle
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from achilles import errors, task_errors


@pytest.mark.parametrize(
    "name", ["BrokerLostError", "TaskCrashedError", "WorkerLostError", "InitializerError"]
)
def test_lost_and_crashed_errors_are_a_broken_pool(name: str) -> None:
    """Code that was written for ProcessPoolExecutor catches them."""
    error = getattr(task_errors, name)
    assert issubclass(error, BrokenProcessPool)
    assert issubclass(error, BrokenExecutor)


def test_pickling_errors_are_the_standards() -> None:
    """The same for pickle's own errors."""
    assert issubclass(task_errors.ArgumentPickleError, pickle.PicklingError)
    assert issubclass(task_errors.ResultPickleError, pickle.PicklingError)
    assert issubclass(task_errors.ResultUnpickleError, pickle.UnpicklingError)


def test_they_are_reachable_from_errors() -> None:
    """One module to import from."""
    assert errors.TaskCrashedError is task_errors.TaskCrashedError


def test_they_survive_a_pickle() -> None:
    """A nested executor hands them on."""
    back = pickle.loads(pickle.dumps(task_errors.WorkerLostError("gone")))
    assert type(back) is task_errors.WorkerLostError
    assert str(back) == "gone"
