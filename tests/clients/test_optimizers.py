"""DEAP, nevergrad, Platypus and pymoo: optimizers that take a map, an executor, or its `submit`."""

from __future__ import annotations

import random
from typing import Any

import nevergrad
import numpy as np
import platypus
import pytest
from deap import algorithms, base, creator, tools
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.dask import DaskParallelization

from tests.clients import work
from tests.modes import OURS, Maker, of_modes


@of_modes(*OURS)
def test_deap(make: Maker) -> None:
    """Its classes are made at run time, in this process only."""
    creator.create("Goal", base.Fitness, weights=(-1.0,))
    creator.create("Individual", list, fitness=creator.Goal)

    def evolve(map: Any) -> list[Any]:
        random.seed(13)
        toolbox = base.Toolbox()
        toolbox.register("gene", random.uniform, -3.0, 3.0)
        toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.gene, n=4)
        toolbox.register("population", tools.initRepeat, list, toolbox.individual)
        toolbox.register("evaluate", work.first_value)
        toolbox.register("mate", tools.cxBlend, alpha=0.5)
        toolbox.register("mutate", tools.mutGaussian, mu=0.0, sigma=0.5, indpb=0.3)
        toolbox.register("select", tools.selTournament, tournsize=3)
        toolbox.register("map", map)
        population, _ = algorithms.eaSimple(
            toolbox.population(n=20), toolbox, cxpb=0.5, mutpb=0.3, ngen=5, verbose=False
        )
        return population  # type: ignore[no-any-return]

    try:
        assert evolve(map) == evolve(make().map)
    finally:
        del creator.Goal, creator.Individual


@of_modes(*OURS)
@pytest.mark.parametrize("is_batch", [True, False])
def test_nevergrad(make: Maker, is_batch: bool) -> None:
    def best(executor: Any) -> tuple[Any, int]:
        optimizer = nevergrad.optimizers.RandomSearch(parametrization=2, budget=40, num_workers=2)
        optimizer.parametrization.random_state.seed(17)
        found = optimizer.minimize(work.sphere, executor=executor, batch_mode=is_batch)
        return found.value, optimizer.num_tell

    alone, ours = best(None), best(make())
    assert np.array_equal(alone[0], ours[0])
    assert alone[1] == ours[1] == 40


@of_modes(*OURS)
@pytest.mark.parametrize("kind", ["map", "submit"])
def test_platypus(make: Maker, kind: str) -> None:
    problem = platypus.Problem(2, 2)
    problem.types[:] = platypus.Real(-10, 10)
    problem.function = work.two_goals

    def front(evaluator: Any) -> list[list[float]]:
        random.seed(19)
        algorithm = platypus.NSGAII(problem, population_size=20, evaluator=evaluator)
        algorithm.run(100)
        return [list(solution.objectives) for solution in algorithm.result]

    executor = make()
    if kind == "map":
        evaluator: Any = platypus.MapEvaluator(executor.map)
    else:
        evaluator = platypus.SubmitEvaluator(executor.submit)
    assert front(evaluator) == front(platypus.MapEvaluator())


class Sphere(ElementwiseProblem):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__(n_var=3, n_obj=1, xl=-2.0, xu=2.0, **options)

    def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = work.sphere(x)


@of_modes(*OURS)
def test_pymoo(make: Maker) -> None:
    def best(**options: Any) -> tuple[Any, Any]:
        found = minimize(Sphere(**options), GA(pop_size=16), ("n_gen", 5), seed=23)
        return found.X, found.F

    for one, other in zip(best(), best(elementwise_runner=DaskParallelization(make()))):
        assert np.array_equal(one, other)
