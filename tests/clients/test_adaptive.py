"""adaptive: runners that take an executor."""

from __future__ import annotations

import asyncio

import adaptive
import pytest

from tests.clients import work
from tests.modes import OURS, Maker, of_modes


def learner() -> adaptive.Learner1D:
    return adaptive.Learner1D(work.wave, bounds=(0.0, 2.0))


@of_modes(*OURS)
def test_one_at_a_time_it_learns_the_same(make: Maker) -> None:
    alone, ours = learner(), learner()
    adaptive.runner.simple(alone, npoints_goal=25)
    adaptive.BlockingRunner(ours, npoints_goal=25, executor=make(1), ntasks=1)
    assert ours.data == alone.data


@of_modes(*OURS)
def test_many_at_once(make: Maker) -> None:
    ours = learner()
    adaptive.BlockingRunner(ours, npoints_goal=40, executor=make(), ntasks=4)
    assert ours.npoints >= 40
    assert all(y == work.wave(x) for x, y in ours.data.items())


@of_modes(*OURS)
def test_in_a_loop_of_asyncio(make: Maker) -> None:
    ours, executor = learner(), make()

    async def main() -> None:
        runner = adaptive.AsyncRunner(ours, npoints_goal=30, executor=executor, ntasks=3)
        await runner.task

    asyncio.run(main())
    assert ours.npoints >= 30


@of_modes(*OURS)
def test_an_error_in_the_function_ends_the_run(make: Maker) -> None:
    broken = adaptive.Learner1D(work.fail, bounds=(0.0, 1.0))
    with pytest.raises(RuntimeError, match="while evaluating") as caught:
        adaptive.BlockingRunner(broken, npoints_goal=5, executor=make(), ntasks=2)
    assert isinstance(caught.value.__cause__, ArithmeticError)
