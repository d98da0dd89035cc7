"""The calls of a `Pool`: their tasks, results and iterators.

    Pool ── owns ──▶ Work ──▶ DistributedExecutor
                       ▲
        AsyncResult, MapResult, IMapIterator ──▶ Flow (a thread that reads the input)

A pool that is dropped without being closed leaves its work to the results, which hold the `Work`.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import _RemoteTraceback
from functools import partial
from multiprocessing.pool import (  # type: ignore[attr-defined] # public in all but its stubs
    MaybeEncodingError,
    RemoteTraceback,
)
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from achilles.errors import (
    ArgumentPickleError,
    ExecutorForkedError,
    ResultPickleError,
    TerminatedError,
)
from achilles.executor import DistributedExecutor
from achilles.runtime.chunk import Chunk
from achilles.runtime.serialize import ERROR, load_outcome

T = TypeVar("T")

WINDOW_MIN = 256  # items of an imap that are under way or wait to be taken
WINDOW_CHUNKS = 8  # of them for each slot, if that is more

Outcome = tuple[Any, "BaseException | None"]

_LOG = logging.getLogger("concurrent.futures")


class _Call(Protocol):
    """A call that may still submit tasks."""

    def release(self) -> None:
        """The pool is joined: do not wait for anybody to take results."""

    def stop(self, error: BaseException) -> None:
        """The pool was terminated: submit nothing more, and end with the error."""


class Work:
    """What outlives a pool that was dropped: its executor,
    and its calls that may still submit tasks.
    """

    def __init__(self, executor: DistributedExecutor) -> None:
        self.executor = executor
        self.is_terminated = False
        self._pid = os.getpid()
        self._is_closing = False
        self._calls: set[_Call] = set()
        self._changed = threading.Condition()
        _LIVE.add(self)

    @property
    def is_foreign(self) -> bool:
        """Whether this is a child that was forked: it has none of the threads,
        and perhaps a lock of one.
        """
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise ExecutorForkedError in a forked child, where nothing will ever be ready."""
        if self.is_foreign:
            raise ExecutorForkedError(
                f"this pool was created in process {self._pid} and is used in {os.getpid()}; "
                "create one after the fork"
            )

    def begin(self, call: _Call) -> None:
        """The call may submit tasks from here on, even after the pool was closed."""
        with self._changed:
            self._calls.add(call)

    def end(self, call: _Call) -> None:
        """The call has submitted its last task."""
        with self._changed:
            self._calls.discard(call)
            self._changed.notify_all()
            is_last = self._is_closing and not self._calls
        if is_last:
            self.executor.shutdown(wait=False)

    def submit(self, func: Callable[..., Any], args: Any, kwds: Mapping[str, Any]) -> Future[Any]:
        """A future that also has what goes wrong here."""
        future: Future[Any]
        try:
            future = self.executor.submit(func, *args, **kwds)
        except Exception as error:
            future = Future()
            future.set_exception(self.terminated() if self.is_terminated else error)
        else:
            future._pool = self  # type: ignore[attr-defined] # who holds the one holds the other
        return future

    def close(self) -> None:
        if self.is_foreign:
            return
        with self._changed:
            self._is_closing = True
            is_last = not self._calls
        if is_last:
            self.executor.shutdown(wait=False)

    def terminate(self, wait: bool) -> None:
        if self.is_foreign:
            return
        self.is_terminated = True
        with self._changed:
            self._is_closing = True
            calls = list(self._calls)
            self._changed.notify_all()  # who joins waits no longer for them
        for call in calls:
            call.stop(self.terminated())
        self.executor.terminate_workers()
        if wait:
            self.executor.shutdown(wait=True)

    def join(self) -> None:
        if self.is_foreign:
            return
        with self._changed:
            for call in self._calls:
                call.release()
            while self._calls and not self.is_terminated:
                self._changed.wait()
        self.executor.shutdown(wait=True)

    def outcome(self, future: Future[Any]) -> Outcome:
        """How a future of this pool ended, in the terms of `multiprocessing`."""
        try:
            error = future.exception()
        except CancelledError:
            return None, self.terminated()
        return (future.result(), None) if error is None else (None, _standard_error(error))

    def outcomes(self, future: Future[Any], count: int) -> list[Outcome]:
        """The same of each call that a task of ``count`` calls has made; if the task failed,
        all of them have.
        """
        value, error = self.outcome(future)
        if count == 1 or error is not None:
            return [(value, error)] * count
        values, errors = value
        outcomes: list[Outcome] = [(value, None) for value in values]
        for at, payload in errors.items():
            allowed = self.executor._mailbox.allowed
            guarded = payload if allowed is None else allowed.guard(payload)
            _, failure = load_outcome(ERROR, guarded)
            assert failure is not None
            outcomes[at] = None, _standard_error(failure)
        return outcomes

    def call_back(self, callback: Callable[[Any], object] | None, value: object) -> None:
        """Tell the user, whose error is no other call's business;
        nothing is told of a terminated pool.
        """
        if callback is None or self.is_terminated:
            return
        try:
            callback(value)
        except BaseException:
            _LOG.exception("exception calling callback %r of a pool", callback)

    @staticmethod
    def terminated() -> TerminatedError:
        return TerminatedError("the pool was terminated before the task was done")


_LIVE: weakref.WeakSet[Work] = weakref.WeakSet()


def _at_exit() -> None:
    """As the standard library's: a pool that nobody waits for ends with the program,
    and its work with it.
    """
    for work in list(_LIVE):
        work.terminate(wait=False)


threading._register_atexit(_at_exit)  # type: ignore[attr-defined] # runs before the executors' own
os.register_at_fork(after_in_child=_LIVE.clear)


def _standard_error(error: BaseException) -> BaseException:
    """The error that the standard library's pool would have raised."""
    if isinstance(error, ArgumentPickleError) and error.__cause__ is not None:
        cause = error.__cause__
        if hasattr(cause, "add_note") and str(error) not in getattr(cause, "__notes__", ()):
            cause.add_note(str(error))
        return cause
    if isinstance(error, ResultPickleError):
        failure: BaseException = MaybeEncodingError(error, "see the reason")
        failure.__cause__ = error
        return failure
    if isinstance(error.__cause__, _RemoteTraceback):
        error.__cause__ = RemoteTraceback(error.__cause__.tb)
    return error


# --- Results ---------------------------------------------------------------------------------------


class AsyncResult(Generic[T]):
    """What `Pool.apply_async` returns: the outcome of a task,
    known when the callback for it has run.
    """

    def __init__(
        self,
        work: Work,
        task: Future[T],
        callback: Callable[[T], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self._work = work
        self._callbacks = callback, error_callback
        self._future = task
        if callback is not None or error_callback is not None:
            self._future = Future()
            task.add_done_callback(lambda task: self._settle(*work.outcome(task)))

    def ready(self) -> bool:
        """Whether the call is done, and its callback has run."""
        return self._future.done()

    def successful(self) -> bool:
        """Whether it raised nothing.

        Raises:
            ValueError: it is not ready.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return not self._future.cancelled() and self._future.exception() is None

    def wait(self, timeout: float | None = None) -> None:
        """Return when it is ready, or after ``timeout`` seconds.

        Raises:
            ExecutorForkedError: it was not ready when this process was forked.
        """
        if not self.ready():
            self._work.check_process()
        try:
            self._future.exception(timeout)
        except (FutureTimeoutError, CancelledError):
            pass

    def get(self, timeout: float | None = None) -> T:
        """The value.

        Raises:
            multiprocessing.TimeoutError: it did not come within ``timeout`` seconds.
            BaseException: whatever the call raised.
            TerminatedError: the pool was terminated before.
        """
        self.wait(timeout)
        if not self.ready():
            raise multiprocessing.TimeoutError
        value, error = self._work.outcome(self._future)
        if error is not None:
            try:
                raise error
            finally:
                del error  # a traceback must not keep its own frame alive
        result: T = value
        return result

    def _settle(self, value: Any, error: BaseException | None) -> None:
        callback, error_callback = self._callbacks
        if error is None:
            self._work.call_back(callback, value)
            self._future.set_result(value)
        else:
            self._work.call_back(error_callback, error)
            self._future.set_exception(error)

    def __repr__(self) -> str:
        if not self.ready():
            state = "under way"
        else:
            state = "successful" if self.successful() else "failed"
        return f"<{type(self).__module__}.{type(self).__qualname__} {state}>"


ApplyResult = AsyncResult  # the standard library has both names


class MapResult(AsyncResult[list[T]]):
    """What `Pool.map_async` returns. It is ready when all calls are done,
    whether any of them failed or not.
    """

    def __init__(
        self,
        work: Work,
        func: Callable[..., T],
        items: list[Any],
        *,
        is_star: bool,
        chunksize: int,
        seconds: float,
        callback: Callable[[list[T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        super().__init__(work, Future(), None, None)
        self._callbacks = callback, error_callback
        self._func = func
        self._is_star = is_star
        self._items = items
        self._values: list[Any] = [None] * len(items)
        self._errors: dict[int, BaseException] = {}
        self._left = len(items)
        self._lock = threading.Lock()
        self._chunk = Chunk(func, is_star=is_star, seconds=seconds)
        work.begin(self)
        if items:
            self._submit(0, len(items), chunksize)
        else:
            self._finish()

    def release(self) -> None:
        pass  # it waits for nobody

    def stop(self, error: BaseException) -> None:
        pass  # its tasks fail, and to submit more fails too

    def _submit(self, start: int, end: int, size: int) -> None:
        """Submit the items from ``start`` to ``end`` in chunks of ``size``."""
        for at in range(start, end, size):
            stop = min(at + size, end)
            if stop - at > 1:
                future = self._work.submit(self._chunk, (self._items[at:stop],), {})
            else:
                item = self._items[at]
                future = self._work.submit(self._func, item if self._is_star else (item,), {})
            future.add_done_callback(partial(self._take, at, stop))

    def _take(self, start: int, stop: int, future: Future[Any]) -> None:
        """A task is done; if its time was up before its calls were, submit the rest."""
        outcomes = self._work.outcomes(future, stop - start)
        done = len(outcomes)
        for at, (value, error) in enumerate(outcomes, start):
            self._values[at] = value
            if error is not None:
                self._errors[at] = error
        if start + done < stop:
            self._submit(start + done, stop, max(1, done // 2))
        with self._lock:
            self._left -= done
            is_last = not self._left
        if is_last:
            self._finish()

    def _finish(self) -> None:
        values, errors = self._values, self._errors
        self._values = self._items = []
        self._errors = {}
        error = errors[min(errors)] if errors else None
        self._work.end(self)
        self._settle(values, error)


# --- Iterators ------------------------------------------------------------------------------------


class _Flow:
    """One `imap`: what its thread has submitted, and what was not taken yet.

    Rules:
        1. At most a window of items is under way or waits to be taken, and then the input is left
           alone until half of them were taken.
        2. But everything runs, as in the standard library: where nobody can take results (the
           iterator was dropped) or nobody will (the pool is joined), only what is under way counts.
        3. An error of the input ends the sequence,
           in the place where its next item would have been.
    """

    def __init__(
        self,
        work: Work,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int,
        is_ordered: bool,
    ) -> None:
        self._work = work
        self._func = func
        self._chunk = Chunk(func)
        self._iterable = iterable
        self._chunksize = chunksize
        self._is_ordered = is_ordered
        self._window = max(WINDOW_MIN, WINDOW_CHUNKS * work.executor.size * chunksize)
        # Reentrant, as a collected iterator calls `abandon` from wherever the collector happens to
        # run.
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._outcomes: deque[Outcome] = deque()
        self._early: dict[int, list[Outcome]] = {}  # came before their turn
        self._submitted = 0  # tasks
        self._placed = 0  # tasks whose outcomes were put where they can be taken
        self._total: int | None = None  # tasks; known at the end of the input
        self._under_way = 0  # items
        self._held = 0  # items under way or not taken
        self._is_abandoned = self._is_released = False
        work.begin(self)
        threading.Thread(target=self._feed, name="achilles-imap", daemon=True).start()

    # --- The thread that reads the input ---

    def _feed(self) -> None:
        error: BaseException | None = None
        try:
            items = iter(self._iterable)
            while self._wait_for_room():
                portion = tuple(itertools.islice(items, self._chunksize))
                if not portion:
                    break
                self._submit(portion)
        except BaseException as caught:
            error = caught
        self._end(error)
        self._work.end(self)

    def _wait_for_room(self) -> bool:
        """Whether there is use for more."""
        with self._lock:
            if self._load >= self._window:
                while self._load > self._window // 2 and self._total is None:
                    self._room.wait()
            return self._total is None

    @property
    def _load(self) -> int:
        return self._under_way if self._is_abandoned or self._is_released else self._held

    def _submit(self, portion: tuple[Any, ...]) -> None:
        with self._lock:
            if self._total is not None:
                return
            number = self._submitted
            self._submitted += 1
            self._under_way += len(portion)
            self._held += len(portion)
        if len(portion) > 1:
            future = self._work.submit(self._chunk, (portion,), {})
        else:
            future = self._work.submit(self._func, portion, {})
        future.add_done_callback(partial(self._put, number, len(portion)))

    def _end(self, error: BaseException | None) -> None:
        """Nothing is submitted after this; an error is the last outcome."""
        with self._lock:
            if self._total is not None:
                return
            self._total = self._submitted
            if error is not None:
                self._total += 1
                self._held += 1
                self._place(self._submitted, [(None, error)])
            self._arrived.notify_all()
            self._room.notify_all()

    # --- Others ---

    def release(self) -> None:
        with self._lock:
            self._is_released = True
            self._room.notify_all()

    def abandon(self) -> None:
        """Nobody will take the rest."""
        if self._work.is_foreign:
            return
        with self._lock:
            self._is_abandoned = True
            self._outcomes.clear()
            self._early.clear()
            self._room.notify_all()

    def stop(self, error: BaseException) -> None:
        self._end(error)  # though its thread may be waiting for the user's input, for ever

    def _put(self, number: int, count: int, future: Future[Any]) -> None:
        """A task is done."""
        outcomes = self._work.outcomes(future, count)
        with self._lock:
            self._under_way -= count
            self._place(number, outcomes)
            if self._load <= self._window // 2:
                self._room.notify_all()

    def _place(self, number: int, outcomes: list[Outcome]) -> None:
        if not self._is_ordered:
            self._line_up(outcomes)
        else:
            self._early[number] = outcomes
            while self._placed in self._early:
                self._line_up(self._early.pop(self._placed))
        self._arrived.notify_all()

    def _line_up(self, outcomes: list[Outcome]) -> None:
        self._placed += 1
        if not self._is_abandoned:
            self._outcomes += outcomes

    def take(self, timeout: float | None) -> Any:
        """The next value; see `IMapIterator.next`."""
        self._work.check_process()
        deadline = None if timeout is None else monotonic() + timeout
        with self._lock:
            while not self._outcomes:
                if self._placed == self._total:
                    raise StopIteration
                left = None if deadline is None else deadline - monotonic()
                if left is not None and not left > 0:  # nor NaN
                    raise multiprocessing.TimeoutError
                self._arrived.wait(left)
            value, error = self._outcomes.popleft()
            self._held -= 1
            if self._held == self._window // 2:
                self._room.notify_all()
        if error is not None:
            try:
                raise error
            finally:
                del error  # a traceback must not keep its own frame alive
        return value


class IMapIterator(Iterator[T]):
    """What `Pool.imap` returns: the results in order. An error of one call does not end it."""

    _is_ordered = True

    def __init__(
        self, work: Work, func: Callable[..., T], iterable: Iterable[Any], chunksize: int
    ) -> None:
        self._flow = _Flow(work, func, iterable, chunksize, self._is_ordered)

    def next(self, timeout: float | None = None) -> T:
        """The next result.

        Raises:
            StopIteration: that was the last one.
            multiprocessing.TimeoutError: it did not come within ``timeout`` seconds;
                it can still be had.
            BaseException: whatever the call, or the input, raised.
            ExecutorForkedError: this process was forked after the iterator was made.
        """
        value: T = self._flow.take(timeout)
        return value

    def __next__(self) -> T:
        return self.next()

    def __del__(self) -> None:
        flow = getattr(self, "_flow", None)
        if flow is not None:
            flow.abandon()


class IMapUnorderedIterator(IMapIterator[T]):
    """What `Pool.imap_unordered` returns: the results as they come."""

    _is_ordered = False
