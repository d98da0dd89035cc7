"""The calls of the first achilles (0.0.x): `map`, `imap` and `imap_unordered`,
with flat results, as in `multiprocessing`.

Rules
    1. ``args`` is an iterable, or a function that returns one: a generator function. `imap` and
       `imap_unordered` read it as results are taken, so that it may be huge, or never end.
    2. If its first item is a list, all are, and are taken as ready-made chunks, as the first
       achilles did: the function gets each element of each list, and ``chunksize`` is not used. A
       tuple is one argument; to pass a list as one, use `DistributedExecutor.map`.
    3. ``callback`` is called here, in the thread that takes the results, with each of them in turn.
       What it returns takes the result's place, unless that is None.
    4. ``error_callback`` is called with each item's error, which is raised then: by `map` when all
       items are done (the first one), by the iterators in the item's turn,
       and the next item follows.
    5. All calls share one `DistributedExecutor`, which is made by the first of them (with the
       address of the environment or of ``achilles.toml``, or embedded),
       is made anew if it broke, and ends with the program.

``docs/migration.md`` has what replaces the rest of the first achilles.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, TypeVar

from achilles.executor import DistributedExecutor
from achilles.futures import MapRun, UnorderedRun
from achilles.maps import MapCall, read_outcome

T = TypeVar("T")
Args = Iterable[Any] | Callable[[], Iterable[Any]]

ITEMS_AHEAD = 1000  # of those that are taken; but for each slot at least so many chunks:
CHUNKS_AHEAD = 4

_lock = threading.Lock()
_shared: DistributedExecutor | None = None


def map(
    func: Callable[[Any], T],
    args: Args,
    callback: Callable[[T], Any] | None = None,
    chunksize: int = 1,
    error_callback: Callable[[BaseException], object] | None = None,
    *,
    executor: DistributedExecutor | None = None,
) -> list[Any]:
    """The results of all items, in order.

    Args:
        executor: the one to use instead of the shared one.

    Raises:
        BaseException: what the first item that failed raised, after all are done.
    """
    executor = _given_or_shared(executor)
    items, chunksize = _items(args, chunksize)
    call = MapCall(executor, func, items, chunksize=chunksize)
    results = Results(call, callback, error_callback)
    values: list[Any] = []
    errors: list[BaseException] = []
    try:
        while call.is_open:
            value, error = results.take(None)
            if error is None:
                values.append(value)
            elif not errors:
                errors.append(error)
    finally:
        results.close()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # a traceback must not keep its own frame alive
    return values


def imap(
    func: Callable[[Any], T],
    args: Args,
    callback: Callable[[T], Any] | None = None,
    chunksize: int = 1,
    error_callback: Callable[[BaseException], object] | None = None,
    *,
    buffersize: int | None = None,
    executor: DistributedExecutor | None = None,
) -> Results:
    """An iterator over the results, in order.

    Args:
        buffersize: how many chunks of the input may be ahead of what was taken;
            by default about 1000 items.
        executor: the one to use instead of the shared one.
    """
    call = _lazy_call(func, args, chunksize, buffersize, executor, MapRun(read_outcome))
    return Results(call, callback, error_callback)


def imap_unordered(
    func: Callable[[Any], T],
    args: Args,
    callback: Callable[[T], Any] | None = None,
    chunksize: int = 1,
    error_callback: Callable[[BaseException], object] | None = None,
    *,
    buffersize: int | None = None,
    executor: DistributedExecutor | None = None,
) -> Results:
    """`imap`, with the results as they come."""
    call = _lazy_call(func, args, chunksize, buffersize, executor, UnorderedRun(read_outcome))
    return Results(call, callback, error_callback)


def _lazy_call(
    func: Callable[[Any], Any],
    args: Args,
    chunksize: int,
    buffersize: int | None,
    executor: DistributedExecutor | None,
    run: MapRun,
) -> MapCall:
    executor = _given_or_shared(executor)
    items, chunksize = _items(args, chunksize)
    if buffersize is None:
        buffersize = max(ITEMS_AHEAD // max(1, chunksize), CHUNKS_AHEAD * executor.size)
    return MapCall(executor, func, items, chunksize=chunksize, buffersize=buffersize, run=run)


class Results(Iterator[Any]):
    """What `imap` gives out, with the interface of multiprocessing's:
    it goes on after an item's error.

    What is under way is cancelled when it is closed or dropped.
    """

    def __init__(
        self,
        call: MapCall,
        callback: Callable[[Any], Any] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self._call = call
        self._run: MapRun = call.run
        self._callback = callback
        self._error_callback = error_callback

    def __iter__(self) -> Results:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result.

        Raises:
            StopIteration: there is none.
            multiprocessing.TimeoutError: it did not come within ``timeout`` seconds; it still may.
            BaseException: whatever its item, or the input, raised.
        """
        if not self._call.is_open:
            raise StopIteration
        value, error = self.take(None if timeout is None else monotonic() + timeout)
        if error is not None:
            try:
                raise error
            finally:
                del error  # a traceback must not keep its own frame alive
        return value

    def take(self, deadline: float | None) -> tuple[Any, BaseException | None]:
        """The value or the error of the next item, which there must be, after its callback."""
        try:
            index = self._run.wait(deadline)
        except concurrent.futures.TimeoutError:
            raise multiprocessing.TimeoutError from None
        self._call.advance(index)
        try:
            value = self._run.take(index)
        except BaseException as error:
            if self._error_callback is not None:
                self._error_callback(error)
            return None, error
        if self._callback is not None:
            replaced = self._callback(value)
            if replaced is not None:
                value = replaced
        return value, None

    def close(self) -> None:
        """Cancel what is under way; there are no more results."""
        self._call.cancel()

    def __del__(self) -> None:
        self.close()


def _items(args: Args, chunksize: int) -> tuple[Iterator[tuple[Any]], int]:
    """The arguments of each call, and the ``chunksize`` that is meant."""
    items = iter(args if isinstance(args, Iterable) or not callable(args) else args())
    for first in items:
        items = itertools.chain((first,), items)
        if type(first) is list:
            return ((item,) for chunk in items for item in _checked(chunk)), 1
        break
    return ((item,) for item in items), chunksize


def _checked(chunk: object) -> list[Any]:
    if type(chunk) is not list:
        raise TypeError(
            f"the first item of args is a list, and so all must be: {type(chunk).__name__} is none"
        )
    return chunk


def _given_or_shared(executor: DistributedExecutor | None) -> DistributedExecutor:
    if executor is not None and not isinstance(executor, DistributedExecutor):
        name = type(executor).__name__
        raise TypeError(f"executor must be a DistributedExecutor or None, not {name}")
    return shared_executor() if executor is None else executor


def shared_executor() -> DistributedExecutor:
    """The executor of all calls that name none."""
    global _shared
    with _lock:
        if _shared is None or _shared._core.is_shut_down or _shared._broken:
            _shared = DistributedExecutor()
        return _shared


def shutdown(wait: bool = True) -> None:
    """End the shared executor, if there is one, when its calls are done;
    the next call makes another one.
    """
    global _shared
    with _lock:
        executor, _shared = _shared, None
    if executor is not None:
        executor.shutdown(wait)


def _forget() -> None:
    global _lock, _shared
    _lock = threading.Lock()
    _shared = None


os.register_at_fork(after_in_child=_forget)
