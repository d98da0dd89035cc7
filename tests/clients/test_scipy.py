"""scipy: whatever takes ``workers=`` takes an executor's `map`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import integrate, optimize

from tests.clients import work
from tests.modes import OURS, Maker, of_modes


@of_modes(*OURS)
def test_differential_evolution(make: Maker) -> None:
    def minimize(workers: Any) -> Any:
        return optimize.differential_evolution(
            work.rosenbrock,
            [(-2.0, 2.0)] * 3,
            maxiter=15,
            popsize=6,
            seed=7,
            updating="deferred",
            workers=workers,
        )

    alone, ours = minimize(1), minimize(make().map)
    assert np.array_equal(alone.x, ours.x)
    assert (alone.fun, alone.nfev, alone.nit) == (ours.fun, ours.nfev, ours.nit)


@of_modes(*OURS)
def test_differential_evolution_of_a_closure(make: Maker) -> None:
    shift = np.array([0.5, -0.5])

    def minimize(workers: Any) -> Any:
        return optimize.differential_evolution(
            lambda x: work.sphere(x - shift),
            [(-2.0, 2.0)] * 2,
            maxiter=5,
            seed=7,
            updating="deferred",
            workers=workers,
        )

    alone, ours = minimize(1), minimize(make().map)
    assert np.array_equal(alone.x, ours.x)


@of_modes(*OURS)
def test_brute(make: Maker) -> None:
    ranges = (slice(-2.0, 2.0, 0.25),) * 2
    alone = optimize.brute(work.rosenbrock, ranges, full_output=True, finish=None)
    ours = optimize.brute(
        work.rosenbrock, ranges, full_output=True, finish=None, workers=make().map
    )
    for one, other in zip(alone, ours):
        assert np.array_equal(one, other)


@of_modes(*OURS)
def test_quad_vec(make: Maker) -> None:
    alone = integrate.quad_vec(work.wave, 0.0, 3.0)
    assert integrate.quad_vec(work.wave, 0.0, 3.0, workers=make().map) == alone


@of_modes(*OURS)
def test_cubature(make: Maker) -> None:
    limits = [0.0, 0.0], [1.0, 2.0]
    alone = integrate.cubature(_plane, *limits)
    ours = integrate.cubature(_plane, *limits, workers=make().map)
    assert (alone.estimate, alone.error) == (ours.estimate, ours.error)


def _plane(points: Any) -> Any:
    return np.exp(-points[:, 0]) * np.sin(points[:, 1])


@of_modes(*OURS)
def test_an_error_in_the_function_is_that_error(make: Maker) -> None:
    with pytest.raises(ArithmeticError, match="as wanted"):
        optimize.brute(work.fail, ((0, 1),) * 2, Ns=3, finish=None, workers=make().map)
