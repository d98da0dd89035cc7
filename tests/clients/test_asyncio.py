"""asyncio: `run_in_executor`."""

from __future__ import annotations

import asyncio

import pytest

from tests import tasks
from tests.modes import OURS, Maker, of_modes

LONG_SECONDS = 60.0


@of_modes(*OURS)
def test_many_at_once(make: Maker) -> None:
    executor = make()

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, tasks.add, n, n) for n in range(200)]
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [2 * n for n in range(200)]


@of_modes(*OURS)
def test_errors(make: Maker) -> None:
    executor = make()

    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(executor, tasks.fail, "in a task")

    with pytest.raises(ValueError, match="in a task"):
        asyncio.run(main())


@of_modes(*OURS)
def test_a_cancelled_wait_cancels_what_has_not_started(make: Maker) -> None:
    executor = make(1)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(executor, tasks.pause, 0.5, "ran")
        queued = loop.run_in_executor(executor, tasks.pause, LONG_SECONDS)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queued, 0.1)
        assert queued.cancelled()
        assert await running == "ran"

    asyncio.run(main())
    executor.shutdown()  # which would take a minute


@of_modes(*OURS)
def test_as_completed(make: Maker) -> None:
    executor = make()

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, tasks.pause, n, n) for n in (0.6, 0.0, 0.1)]
        return [await call for call in asyncio.as_completed(calls)]

    assert asyncio.run(main())[-1] == 0.6
