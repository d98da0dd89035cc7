"""dask: an executor is a scheduler."""

from __future__ import annotations

from typing import Any

import dask
import dask.array
import dask.bag
import numpy as np
import pytest

from tests.clients import work
from tests.modes import OURS, Maker, of_modes


def both(collection: Any, executor: Any) -> tuple[Any, Any]:
    return collection.compute(scheduler="sync"), collection.compute(scheduler=executor)


@of_modes(*OURS)
def test_array(make: Maker) -> None:
    x = dask.array.random.default_rng(5).normal(size=(400, 400), chunks=(100, 200))
    alone, ours = both((x @ x.T).std(axis=0), make())
    assert np.array_equal(alone, ours)


@of_modes(*OURS)
def test_bag(make: Maker) -> None:
    bag = dask.bag.from_sequence(range(1000), npartitions=10)
    alone, ours = both(bag.filter(work.is_even).map(work.last_digit).frequencies(), make())
    assert sorted(alone) == sorted(ours) == [(0, 100), (4, 200), (6, 200)]


@of_modes(*OURS)
def test_delayed(make: Maker) -> None:
    """As a setting, and with lambdas."""
    values = [dask.delayed(lambda n: n + 1)(n) for n in range(10)]
    with dask.config.set(scheduler=make()):
        assert dask.delayed(sum)(values).compute() == 55


@of_modes(*OURS)
def test_an_error_in_a_task_is_that_error(make: Maker) -> None:
    with pytest.raises(ArithmeticError, match="as wanted"):
        dask.delayed(work.fail)(1).compute(scheduler=make())
