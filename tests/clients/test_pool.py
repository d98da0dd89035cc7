"""Programs that take a `multiprocessing.Pool`, and get ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import dynesty
import emcee
import numpy as np
import platypus
import pytest
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.starmap import StarmapParallelization
from scipy import optimize

from achilles import Pool
from tests.clients import work
from tests.modes import OURS, Maker, of_modes


@pytest.fixture
def pool(make: Maker) -> Iterator[Pool]:
    address = None if make.cluster is None else make.cluster.address
    with Pool(2, address=address) as pool:
        yield pool
        pool.close()
        pool.join()


@of_modes(*OURS)
def test_scipy(pool: Pool) -> None:
    def best(**options: Any) -> Any:
        bounds = [(-2.0, 2.0)] * 2
        return optimize.differential_evolution(
            work.rosenbrock, bounds, maxiter=5, seed=7, updating="deferred", **options
        ).x

    assert np.array_equal(best(), best(workers=pool.map))


@of_modes(*OURS)
def test_emcee(pool: Pool) -> None:
    def chain(**options: Any) -> Any:
        state = np.random.RandomState(11)
        sampler = emcee.EnsembleSampler(12, 3, work.log_normal, **options)
        start = emcee.State(state.randn(12, 3), random_state=state.get_state())
        sampler.run_mcmc(start, 10)
        return sampler.get_chain()

    assert np.array_equal(chain(), chain(pool=pool))


@of_modes(*OURS)
def test_dynesty(pool: Pool) -> None:
    """It asks a pool for its size."""

    def samples(pool: Any) -> Any:
        sampler = dynesty.NestedSampler(
            work.log_normal, work.to_cube, 2, nlive=30, pool=pool, rstate=np.random.default_rng(3)
        )
        sampler.run_nested(print_progress=False, maxiter=100)
        return sampler.results.samples

    assert np.array_equal(samples(pool), samples(work.HereAndNow(2)))


@of_modes(*OURS)
def test_platypus(pool: Pool) -> None:
    problem = platypus.Problem(2, 2)
    problem.types[:] = platypus.Real(-10, 10)
    problem.function = work.two_goals

    def front(evaluator: Any) -> list[list[float]]:
        random.seed(19)
        algorithm = platypus.NSGAII(problem, population_size=20, evaluator=evaluator)
        algorithm.run(60)
        return [list(solution.objectives) for solution in algorithm.result]

    alone = front(platypus.MapEvaluator())
    assert front(platypus.ApplyEvaluator(pool.apply_async)) == alone
    with platypus.PoolEvaluator(pool) as evaluator:  # which closes it
        assert front(evaluator) == alone
    with pytest.raises(ValueError, match="Pool not running"):
        pool.map(work.sphere, [[1.0]])


class Sphere(ElementwiseProblem):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__(n_var=3, n_obj=1, xl=-2.0, xu=2.0, **options)

    def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = work.sphere(x)


@of_modes(*OURS)
def test_pymoo(make: Maker, pool: Pool) -> None:
    """It takes a `starmap`; an executor has one, too."""

    def best(starmap: Callable[..., Any] | None) -> Any:
        options = {}
        if starmap is not None:
            options["elementwise_runner"] = StarmapParallelization(starmap)
        return minimize(Sphere(**options), GA(pop_size=16), ("n_gen", 3), seed=23).X

    alone = best(None)
    assert np.array_equal(best(pool.starmap), alone)
    assert np.array_equal(best(make().starmap), alone)
