"""The family of `DistributedExecutor.map`: calls of one function on many items, without a future for each.

A `MapCall` submits the items of one call, in order; what it gives back, `results` yields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from achilles.futures import MapRun
from achilles.mailbox import FAILED
from achilles.runtime.serialize import dumps_call, load_outcome

if TYPE_CHECKING:
    from achilles.executor import DistributedExecutor


def name_of(fn: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


class MapCall:
    """One call of `map`: what was submitted of it, in order."""

    def __init__(
        self, executor: DistributedExecutor, fn: Callable[..., Any], chunksize: int
    ) -> None:
        self.executor = executor  # which must not be collected while its results are taken
        self.mailbox = executor._mailbox
        self.run = MapRun(_read_outcome)
        self.run.name = name_of(fn)
        self._fn = fn
        self.ids: deque[int] = deque()  # of the items that were not taken yet; 0: never submitted
        self._error: Exception | None = None
        self._count = 0
        limits = [
            limit for limit in (executor._max_tasks, chunksize if chunksize > 1 else 0) if limit
        ]
        chunk_max = min(limits, default=0)
        try:
            with executor._table_lock:
                number, self._blob = executor._functions.encode(fn, shared=True)
            self._group = executor._group(number, chunk_max)
        except Exception as error:
            self._error = error

    def submit(self, args: tuple[Any, ...]) -> None:
        """Submit the next item; what cannot be pickled fails when it is its turn."""
        index = self._count
        self._count += 1
        error = self._error
        payload: Any = b""
        if error is None:
            try:
                payload = dumps_call(args, {}, self._fn)
            except Exception as caught:
                error = caught
        if error is not None:
            self.mailbox.put_error(self.run, index, error)
            self.ids.append(0)
            return
        self.ids.append(self.mailbox.submit_item(self._group, self._blob, payload, self.run, index))
        if not self.executor._core.is_started:
            self.executor._start()

    def cancel(self) -> None:
        """Nobody takes the rest."""
        self.mailbox.cancelled([id for id in self.ids if id])
        self.ids.clear()


def _read_outcome(status: int, payload: Any) -> tuple[Any, BaseException | None]:
    if status == FAILED:
        return None, payload
    return load_outcome(status, payload)


def results(
    call: MapCall, rest: Iterator[tuple[Any, ...]], deadline: float | None
) -> Iterator[Any]:
    """Yield results in order, submitting one of the rest for each that is taken."""
    index = 0
    take = call.run.take
    try:
        while call.ids:
            value = [take(index, deadline)]  # nothing here may keep it once it was given out
            call.ids.popleft()
            index += 1
            for args in rest:
                call.submit(args)
                break
            yield value.pop()
    finally:
        call.cancel()
