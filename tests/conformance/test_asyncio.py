"""What coroutines see: the loop's own `run_in_executor` with every kind of executor,
and `asubmit` and `amap`.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests import tasks
from tests.modes import ALL, OURS, Maker, of_modes, wait_until

Call = Callable[..., Coroutine[Any, Any, Any]]


async def by_loop(executor: Any, fn: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, fn, *args)


async def by_asubmit(executor: Any, fn: Callable[..., Any], *args: Any) -> Any:
    return await executor.asubmit(fn, *args)


# `run_in_executor` with all kinds, and `asubmit` with ours
of_calls = pytest.mark.parametrize(
    ("make", "call"),
    [
        *(pytest.param(mode, by_loop, id=f"run_in_executor-{mode}") for mode in ALL),
        *(pytest.param(mode, by_asubmit, id=f"asubmit-{mode}") for mode in OURS),
    ],
    indirect=["make"],
)


@of_calls
def test_results_and_errors(make: Maker, call: Call) -> None:
    executor = make()

    async def main() -> None:
        assert await call(executor, tasks.add, 1, 2) == 3
        many = await asyncio.gather(*(call(executor, tasks.add, n) for n in range(200)))
        assert many == list(range(1, 201))
        with pytest.raises(ValueError, match="text"):
            await call(executor, tasks.fail, "text")

    asyncio.run(main())


@of_calls
def test_the_loop_goes_on_meanwhile(make: Maker, call: Call) -> None:
    executor = make(1)

    async def main() -> None:
        await call(executor, tasks.add, 1)
        task = asyncio.ensure_future(call(executor, tasks.pause, 0.3, "value"))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0.01)
        assert turns > 10
        assert task.result() == "value"

    asyncio.run(main())


@of_calls
def test_timeouts(make: Maker, call: Call) -> None:
    executor = make(1)

    async def main() -> None:
        await call(executor, tasks.add, 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call(executor, tasks.pause, 0.5), 0.05)
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await call(executor, tasks.pause, 0.5)
        assert await call(executor, tasks.add, 1) == 2

    asyncio.run(main())


@of_calls
def test_cancelled_tasks_do_not_run(make: Maker, call: Call, tmp_path: Path) -> None:
    executor = make(1)
    path = str(tmp_path / "notes")

    async def main() -> None:
        await call(executor, tasks.add, 1)
        waiting = [
            asyncio.ensure_future(call(executor, tasks.note_and_pause, path, n, 0.2))
            for n in range(10)
        ]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        done, _ = await asyncio.wait(waiting, timeout=10)
        assert all(task.cancelled() for task in done)
        assert len(done) == 10
        assert await call(executor, tasks.add, 1) == 2

    asyncio.run(main())
    executor.shutdown()
    assert 1 <= len(tasks.notes(Path(path))) <= 3  # ProcessPoolExecutor has two or three under way


@of_calls
def test_cancelled_by_the_executor(make: Maker, call: Call) -> None:
    executor = make(1)

    async def main() -> None:
        first = executor.submit(tasks.pause, 0.2)
        waiting = [asyncio.ensure_future(call(executor, tasks.pause, 0.2)) for _ in range(10)]
        await asyncio.sleep(0.05)
        wait_until(first.running, "the first task runs")
        executor.shutdown(wait=False, cancel_futures=True)
        done, _ = await asyncio.wait(waiting, timeout=10)
        assert len([task for task in done if task.cancelled()]) >= 7

    asyncio.run(main())


@of_modes(*OURS)
def test_no_thread_for_each_call(make: Maker) -> None:
    executor = make(2)

    async def main() -> None:
        before = threading.active_count()
        calls = [asyncio.ensure_future(executor.asubmit(tasks.pause, 0.002)) for _ in range(300)]
        most = before
        while not all(call.done() for call in calls):
            most = max(most, threading.active_count())
            await asyncio.sleep(0.01)
        assert most <= before + 2
        await asyncio.gather(*calls)

    asyncio.run(main())


@of_modes(*OURS)
def test_a_callback_that_blocks_holds_up_no_coroutine(make: Maker) -> None:
    executor = make(1)
    is_free = threading.Event()
    executor.submit(tasks.add, 0).add_done_callback(lambda _: is_free.wait(20))

    async def main() -> None:
        assert await asyncio.wait_for(executor.asubmit(tasks.add, 1), 10) == 2
        results = executor.amap(tasks.add, range(3), timeout=10)
        assert [value async for value in results] == [1, 2, 3]

    asyncio.run(main())
    is_free.set()


@of_modes(*OURS)
def test_asubmit_leaves_every_keyword_to_the_function(make: Maker) -> None:
    keywords = {name: name for name in ("fn", "self", "timeout", "executor", "future")}
    executor = make(1)
    assert asyncio.run(executor.asubmit(tasks.capture, 1, **keywords)) == ((1,), keywords)


@of_modes(*OURS)
def test_amap(make: Maker) -> None:
    executor = make()

    async def main() -> None:
        results = executor.amap(pow, range(100), itertools.repeat(2), chunksize=3)
        assert [value async for value in results] == [n * n for n in range(100)]
        delayed = executor.amap(tasks.pause, [0.2, 0.0, 0.1], range(3))
        assert [value async for value in delayed] == [0, 1, 2]
        assert [value async for value in executor.amap(tasks.add, [])] == []

    asyncio.run(main())


@of_modes(*OURS)
def test_amap_of_an_endless_input(make: Maker) -> None:
    executor = make()
    inputs = itertools.count()

    async def main() -> None:
        seen = []
        async for value in executor.amap(tasks.echo, inputs, buffersize=5):
            seen.append(value)
            if len(seen) == 50:
                break
        assert seen == list(range(50))

    asyncio.run(main())
    assert next(inputs) <= 56


@of_modes(*OURS)
def test_amap_is_valid_after_shutdown(make: Maker) -> None:
    executor = make()

    async def main() -> None:
        results = executor.amap(tasks.pause, [0.05] * 4, range(4))
        await asyncio.get_running_loop().run_in_executor(None, executor.shutdown)
        assert [value async for value in results] == [0, 1, 2, 3]
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.amap(tasks.add, [1])

    asyncio.run(main())


@of_modes(*OURS)
def test_two_loops_and_a_thread_share_an_executor(make: Maker) -> None:
    executor = make()
    sums: list[int] = []

    async def add_up() -> None:
        sums.append(sum([value async for value in executor.amap(tasks.add, range(200))]))

    threads = [threading.Thread(target=lambda: asyncio.run(add_up())) for _ in range(2)]
    for thread in threads:
        thread.start()
    sums.append(sum(executor.map(tasks.add, range(200))))
    for thread in threads:
        thread.join()
    assert sums == [sum(range(1, 201))] * 3
