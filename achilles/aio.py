"""For coroutines: the outcomes of the same tasks, without a thread that waits for them.

Whoever awaits is woken by the I/O thread itself (`loop.call_soon_threadsafe`), not through the
thread of the callbacks, which other callbacks may block.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from achilles.futures import MapRun, Waiter
from achilles.maps import MapCall, read_outcome

if TYPE_CHECKING:
    import concurrent.futures

    from achilles.executor import DistributedExecutor


async def outcome(future: concurrent.futures.Future[Any]) -> Any:
    """The future's value; if whoever waits is cancelled, so is the future.

    Raises:
        asyncio.CancelledError: one of both was cancelled.
        BaseException: whatever the task raised.
    """
    loop = asyncio.get_running_loop()
    arrival: asyncio.Future[None] = loop.create_future()
    waiter = Waiter(lambda _: _wake(loop, arrival))
    try:
        if waiter.join(future):
            try:
                await arrival
            except BaseException:
                waiter.leave(future)
                future.cancel()
                raise
        if future.cancelled():
            raise asyncio.CancelledError
        return future.result(0)
    finally:
        del future  # an error's traceback must not keep the future that holds the error


def results(
    executor: DistributedExecutor,
    fn: Callable[..., Any],
    items: Iterable[tuple[Any, ...]],
    *,
    timeout: float | None = None,
    chunksize: int = 1,
    buffersize: int | None = None,
) -> AsyncGenerator[Any, None]:
    """Submit now, as `maps.MapCall` does, and yield the values later, in order."""
    deadline = None if timeout is None else monotonic() + timeout
    run = _AsyncRun(read_outcome)
    call = MapCall(executor, fn, items, chunksize=chunksize, buffersize=buffersize, run=run)
    return _take(call, run, deadline)


async def _take(call: MapCall, run: _AsyncRun, deadline: float | None) -> AsyncGenerator[Any, None]:
    try:
        while call.is_open:
            index = await run.arrive(deadline)
            call.advance(index)
            value = [run.take(index)]  # nothing here may keep it once it was given out
            yield value.pop()
    finally:
        call.cancel()


class _AsyncRun(MapRun):
    """The outcomes of a map for one coroutine."""

    _arrival: asyncio.Future[None] | None = None  # what the coroutine waits for

    def notify(self) -> None:
        """Wake the coroutine if what it waits for is there."""
        arrival = self._arrival
        if arrival is not None and self.peek() is not None:
            _wake(arrival.get_loop(), arrival)

    async def arrive(self, deadline: float | None) -> int:
        """`wait`, for a coroutine.

        Raises:
            asyncio.TimeoutError: that was not before the deadline (`time.monotonic`).
        """
        loop = asyncio.get_running_loop()
        while (index := self.peek()) is None:
            arrival = self._arrival = loop.create_future()
            try:
                if self.peek() is None:  # what has come since then wakes nobody
                    left = None if deadline is None else max(0.0, deadline - monotonic())
                    await asyncio.wait_for(arrival, left)
            finally:
                self._arrival = None
        return index


def _wake(loop: asyncio.AbstractEventLoop, arrival: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_arrive, arrival)
    except RuntimeError:
        pass  # the loop is closed, and nobody waits any more


def _arrive(arrival: asyncio.Future[None]) -> None:
    if not arrival.done():
        arrival.set_result(None)
