from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from achilles import aio
from achilles.core import protocol as p
from achilles.executor import DistributedExecutor
from achilles.runtime.serialize import dumps
from tests import tasks
from tests.unit.silent import Backend


@pytest.fixture
def executor(backends: list[Backend]) -> DistributedExecutor:
    return DistributedExecutor(2)


@pytest.fixture
def backend(executor: DistributedExecutor, backends: list[Backend]) -> Backend:
    return backends[0]


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine, with a bound, and nothing left over."""

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(_complain)
        await asyncio.wait_for(main(), 20)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(bounded())


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    raise AssertionError(context)


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_value(executor: DistributedExecutor, backend: Backend) -> None:
    async def main() -> None:
        task = asyncio.create_task(executor.asubmit(tasks.add, 1, b=2))
        await settle()
        assert not task.done()
        backend.drain()
        backend.answer(1)
        assert await task == 10

    run(main)


def test_a_value_that_comes_from_another_thread(
    executor: DistributedExecutor, backend: Backend
) -> None:
    async def main() -> None:
        task = asyncio.create_task(executor.asubmit(tasks.add, 1))
        await settle()
        backend.drain()
        thread = threading.Timer(0.02, backend.answer, (1,))
        thread.start()
        assert await task == 10
        thread.join()

    run(main)


def test_a_future_that_is_done() -> None:
    future = concurrent.futures.Future[int]()
    future.set_result(5)

    async def main() -> None:
        assert await aio.outcome(future) == 5

    run(main)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LookupError("gone"), LookupError),
        (StopIteration(1), RuntimeError),  # which asyncio's own futures cannot hold: they never end
        (concurrent.futures.CancelledError(), concurrent.futures.CancelledError),
        (SystemExit(3), SystemExit),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error(error: BaseException, kind: type[BaseException]) -> None:
    async def main() -> None:
        future = concurrent.futures.Future[int]()
        task = aio.outcome(future)
        threading.Timer(0.02, future.set_exception, (error,)).start()
        with pytest.raises(kind):
            await task

    run(main)


def test_what_cannot_be_submitted(executor: DistributedExecutor) -> None:
    async def main() -> None:
        with pytest.raises(Exception, match="argument 1"):
            await executor.asubmit(tasks.echo, tasks.Unpicklable())
        executor.shutdown(wait=False)
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            await executor.asubmit(tasks.add, 1)

    run(main)


def test_cancelling_the_task_cancels_the_future(
    executor: DistributedExecutor, backend: Backend
) -> None:
    async def main() -> None:
        task = asyncio.create_task(executor.asubmit(tasks.add, 1))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.drain() == ([1], [1])
        backend.answer(1)  # which comes too late, and bothers nobody
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(executor.asubmit(tasks.add, 1), 0.02)
        assert backend.drain() == ([2], [2])

    run(main)


def test_cancelling_the_future_cancels_the_task(
    executor: DistributedExecutor, backend: Backend
) -> None:
    async def main() -> None:
        task = asyncio.create_task(executor.asubmit(tasks.add, 1))
        await settle()
        executor.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(main)


def test_a_future_that_cannot_be_cancelled_is_left(
    executor: DistributedExecutor, backend: Backend
) -> None:
    async def main() -> None:
        task = asyncio.create_task(executor.asubmit(tasks.add, 1))
        await settle()
        backend.drain()
        backend.mailbox.receive(p.Running([1]))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.drain() == ([], [])
        backend.answer(1)
        await settle()

    run(main)


def test_a_result_after_the_loops_end() -> None:
    future = concurrent.futures.Future[int]()
    loop = asyncio.new_event_loop()
    waiting = aio.outcome(future)
    task = loop.create_task(waiting)
    loop.run_until_complete(settle())
    assert not task.done()
    loop.close()
    future.set_result(5)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.close()


# --- amap -----------------------------------------------------------------------------------------


def test_results_in_order(executor: DistributedExecutor, backend: Backend) -> None:
    async def main() -> None:
        results = executor.amap(tasks.add, range(3), [1, 2, 3, 4])
        assert backend.drain() == ([1, 2, 3], [])  # before anybody has asked
        first = asyncio.ensure_future(results.__anext__())
        backend.answer(2, 3)
        await settle()
        assert not first.done()
        backend.answer(1)
        assert await first == 10
        assert [value async for value in results] == [20, 30]

    run(main)


def test_a_buffer(executor: DistributedExecutor, backend: Backend) -> None:
    async def main() -> None:
        inputs = itertools.count()
        results = executor.amap(tasks.add, inputs, buffersize=2)
        for id in range(1, 20):
            backend.drain()
            backend.answer(id)
            assert await results.__anext__() == id * 10
        assert next(inputs) == 21
        backend.drain()
        await results.aclose()
        assert backend.drain() == ([], [20, 21])

    run(main)


def test_a_loop_that_is_left_cancels_the_rest(
    executor: DistributedExecutor, backend: Backend
) -> None:
    async def main() -> None:
        results = executor.amap(tasks.add, range(4))
        backend.drain()
        backend.answer(1, 2)
        async for value in results:
            if value == 20:
                break
        del results
        await settle()
        assert backend.drain() == ([], [3, 4])

    run(main)


def test_a_cancelled_iteration_cancels_the_rest(
    executor: DistributedExecutor, backend: Backend
) -> None:
    async def main() -> None:
        async def take() -> list[int]:
            return [value async for value in executor.amap(tasks.add, range(3))]

        task = asyncio.create_task(take())
        await settle()
        backend.drain()
        backend.answer(1)
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.drain() == ([], [2, 3])

    run(main)


def test_a_timeout(executor: DistributedExecutor, backend: Backend) -> None:
    async def main() -> None:
        results = executor.amap(tasks.add, range(2), timeout=0.05)
        backend.drain()
        backend.answer(1)
        assert await results.__anext__() == 10
        with pytest.raises(asyncio.TimeoutError):
            await results.__anext__()
        assert backend.drain() == ([], [2])
        assert [value async for value in results] == []

    run(main)


def test_errors_of_items_and_inputs(executor: DistributedExecutor, backend: Backend) -> None:
    def inputs() -> Iterator[int]:
        yield from range(2)
        raise LookupError("of the input")

    async def main() -> None:
        results = executor.amap(tasks.add, range(2))
        backend.drain()
        backend.mailbox.deliver_error(1, KeyError("gone"))
        with pytest.raises(KeyError, match="gone"):
            await results.__anext__()
        assert backend.drain() == ([], [2])
        with pytest.raises(LookupError, match="of the input"):
            executor.amap(tasks.add, inputs())
        results = executor.amap(tasks.add, inputs(), buffersize=1)
        for id in (5, 6):
            backend.drain()
            backend.answer(id)
            assert await results.__anext__() == id * 10
        with pytest.raises(LookupError, match="of the input"):
            await results.__anext__()
        with pytest.raises(ValueError, match="buffersize must be None or > 0"):
            executor.amap(tasks.add, [1], buffersize=0)

    run(main)


@pytest.mark.parametrize("buffersize", [None, 7])
def test_outcomes_that_come_while_they_are_awaited(
    executor: DistributedExecutor, backend: Backend, buffersize: int | None
) -> None:
    count = 2000
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            ids, _ = backend.drain()
            for id in ids:
                backend.mailbox.receive(p.Results([id], bytes([p.VALUE]), [dumps(id)]))

    async def main() -> None:
        results = executor.amap(tasks.add, range(count), buffersize=buffersize)
        assert [value async for value in results] == list(range(1, count + 1))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        run(main)
    finally:
        is_over.set()
        thread.join()
