"""The family of `DistributedExecutor.map`: calls of one function on many items,
without a future for each.

A `MapCall` submits the items of one call; its `run` (`futures.MapRun`) gathers their outcomes.
Whoever takes one out makes room for one more of the input:

    while call.is_open:
        index = call.run.wait(deadline)     the item whose turn it is
        call.advance(index)                 submits another one
        value = call.run.take(index)        or raises what the item raised
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from achilles.bundles import SIZE_MAX, TRIALS, Bundler, outcomes
from achilles.core import protocol as p
from achilles.futures import MapRun, UnorderedRun
from achilles.mailbox import FAILED
from achilles.runtime import context
from achilles.runtime.arguments import Attached, join_attached
from achilles.runtime.bundle import Bundle
from achilles.runtime.serialize import dumps_call, is_stateless, load_outcome

if TYPE_CHECKING:
    from achilles.executor import DistributedExecutor

LOOKS = 64  # items, between two looks whether they take so little time that they are better bundled
PATIENT_AT = 4 * LOOKS  # items; so many are enough to know that soon
PAUSE = 0.0005  # seconds in which the I/O thread has its turn
PATIENCE = 0.02  # seconds that such pauses take in all


def _wait_until(is_so: Callable[[], bool]) -> None:
    """Let the I/O thread work until that is so, or for `PATIENCE`:
    runners have enough to do meanwhile.
    """
    end = monotonic() + PATIENCE
    while not is_so() and monotonic() < end:
        sleep(PAUSE)


def read_outcome(status: int, payload: Any) -> tuple[Any, BaseException | None]:
    """The value or the error of an item, for a `MapRun`."""
    if status == FAILED:
        return None, payload
    return load_outcome(status, payload)


def name_of(fn: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


class MapCall:
    """One call of a function on each of ``items``, which are tuples of arguments.

    All are submitted here, unless ``buffersize`` is given: then that many, times ``chunksize``, and
    one more at each `advance`. ``is_bundled``: many of them may be one task,
    and come out as a block.

    Raises:
        ValueError: ``chunksize`` or ``buffersize`` below 1.
        TypeError: one of them is no integer.
        RuntimeError: the executor was shut down, and there are items.
        Exception: whatever the input raises.
    """

    def __init__(
        self,
        executor: DistributedExecutor,
        fn: Callable[..., Any],
        items: Iterable[tuple[Any, ...]],
        *,
        chunksize: int = 1,
        buffersize: int | None = None,
        run: MapRun | None = None,
        is_bundled: bool = False,
    ) -> None:
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and (
            isinstance(buffersize, bool) or not isinstance(buffersize, int)
        ):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        executor._check_process()
        self._executor = executor  # which must not be collected while its results are taken
        self._mailbox = executor._mailbox
        self.run = run or MapRun(read_outcome)
        self.run.name = name_of(fn)
        self._fn = fn
        self._ids: dict[int, int] = {}  # by index, of what was not taken yet; 0: never submitted
        self._error: Exception | None = None  # of the function's pickling
        self._count = 0
        self._rest: Iterator[tuple[Any, ...]] = iter(())
        self._input_error: BaseException | None = None
        self._bundler: Bundler | None = None
        self._begin(operator.index(chunksize), iter(items), buffersize, is_bundled)

    def _begin(
        self,
        chunksize: int,
        items: Iterator[tuple[Any, ...]],
        buffersize: int | None,
        is_bundled: bool,
    ) -> None:
        executor = self._executor
        limits = [
            limit for limit in (executor._max_tasks, chunksize if chunksize > 1 else 0) if limit
        ]
        chunk_max = min(limits, default=0)
        blobs: tuple[int, ...] = ()
        try:
            with executor._table_lock:
                number, self._blob = executor._functions.encode(self._fn, shared=True)
            self._key = number, chunk_max
            _, self._blob, blobs = join_attached(b"", self._blob)
            self._group = executor._group(*self._key, blobs)
        except Exception as error:
            self._error = error
        if buffersize is not None:
            self._rest = items
            items = itertools.islice(items, buffersize * chunksize)
        elif is_bundled and self._error is None and not blobs:
            self._bundler = self._make_bundler(chunksize)
        try:
            for args in items:
                if not self._count:
                    executor._check_usable()  # nothing to do can be done by whoever was shut down
                self._submit(args)
                if self._bundler is not None and not self._count % LOOKS:
                    self._bundle(self._bundler, items)
        except BaseException:
            self.cancel()
            raise

    def _make_bundler(self, chunksize: int) -> Bundler | None:
        """What bundles the items; None if each must be a task of its own."""
        executor, fn, mailbox = self._executor, self._fn, self._mailbox
        options = executor._options or p.PLAIN
        is_limited = options.timeout or options.retries or options.at_most_once
        if is_limited or executor._max_tasks or mailbox.allowed or context.side is not None:
            return None
        if not is_stateless(fn) or type(self._blob) is not bytes:
            return None
        with executor._table_lock:
            number, blob = executor._functions.encode(Bundle(fn), shared=True)
        if type(blob) is not bytes:
            return None
        self.run.pace = mailbox.pace(number)
        group = mailbox.group(number, executor._init, 0, options.but(is_bundle=True))
        size_max = chunksize if chunksize > 1 else SIZE_MAX
        single = self._group, self._blob
        return Bundler(mailbox, self.run, self._ids, single, (group, blob), size_max)

    def _bundle(self, bundler: Bundler, items: Iterator[tuple[Any, ...]]) -> None:
        """Submit many items at once for as long as that is worth it."""
        if self._count == PATIENT_AT:
            _wait_until(lambda: bundler.is_known)
        while size := bundler.size():
            some = list(itertools.islice(items, size))
            if not some:
                return
            if bundler.submit(self._count, some):
                self._count += len(some)
                if bundler.sent == TRIALS:
                    _wait_until(lambda: bundler.is_tried)
            else:
                for args in some:
                    self._submit(args)

    @property
    def is_open(self) -> bool:
        """Whether there is an item to take.

        Raises:
            BaseException: there is none, and the input has ended with this error.
        """
        if self._ids:
            return True
        if self._input_error is not None:
            error, self._input_error = self._input_error, None
            raise error
        return False

    def advance(self, index: int) -> None:
        """That item is taken: submit another one.
        An error of the input is raised when its turn comes.
        """
        del self._ids[index]
        try:
            for args in self._rest:
                self._submit(args)
                return
        except BaseException as error:
            self._rest = iter(())
            self._input_error = error

    def cancel(self) -> None:
        """Nobody takes the rest."""
        if self._bundler is not None:
            self._bundler.is_cancelled = True
        ids = [id for id in list(self._ids.values()) if id]
        if ids:
            self._mailbox.cancelled(ids)
        self._ids.clear()
        self._rest = iter(())

    def _submit(self, args: tuple[Any, ...]) -> None:
        """Submit the next item; what cannot be pickled fails when it is its turn."""
        index = self._count
        self._count += 1
        error = self._error
        payload: Any = b""
        if error is None:
            try:
                payload = dumps_call(args, {}, self._fn, self._executor._arguments)
            except Exception as caught:
                error = caught
        if error is not None:
            self._mailbox.put_error(self.run, index, error)
            self._ids[index] = 0
            return
        group, blob = self._group, self._blob
        if isinstance(payload, Attached):
            payload, blob, blobs = join_attached(payload, blob)
            group = self._executor._group(*self._key, blobs)
        self._ids[index] = self._mailbox.submit_item(group, blob, payload, self.run, index)
        if not self._executor._core.is_started:
            self._executor._start()


def results(
    executor: DistributedExecutor,
    fn: Callable[..., Any],
    items: Iterable[tuple[Any, ...]],
    *,
    timeout: float | None = None,
    chunksize: int = 1,
    buffersize: int | None = None,
    is_ordered: bool = True,
    is_bundled: bool = False,
) -> Iterator[Any]:
    """Submit now, as `MapCall` does, and yield the values later, in order or as they come."""
    deadline = None if timeout is None else monotonic() + timeout
    run = MapRun(read_outcome) if is_ordered else UnorderedRun(read_outcome)
    call = MapCall(
        executor,
        fn,
        items,
        chunksize=chunksize,
        buffersize=buffersize,
        run=run,
        is_bundled=is_bundled,
    )
    return _take(call, deadline)


def _take(call: MapCall, deadline: float | None) -> Iterator[Any]:
    run = call.run
    try:
        while call.is_open:
            index = run.wait(deadline)
            block = run.take_block(index)
            call.advance(index)
            if block is not None:
                if block.others:
                    yield from outcomes(block, read_outcome)
                    continue
                values, block = block.values, None
                values.reverse()
                while values:  # nothing here may keep one once it was given out
                    yield values.pop()
                continue
            value = [run.take(index)]  # nothing here may keep it once it was given out
            yield value.pop()
    finally:
        call.cancel()
