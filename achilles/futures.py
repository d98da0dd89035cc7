"""The futures that `DistributedExecutor.submit` returns,
and where the outcomes of a `map` are kept.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar

from achilles.runtime.wakeups import Wakeup, new_wakeup

if TYPE_CHECKING:
    T = TypeVar("T")
    _Base = concurrent.futures.Future[Any]
else:
    T = TypeVar("T")
    _Base = concurrent.futures.Future

# The standard library's own states and attributes: the same in every version from 3.2 to 3.14, and
# what its `wait` and `as_completed` look at.
PENDING = concurrent.futures._base.PENDING
RUNNING = concurrent.futures._base.RUNNING
CANCELLED = concurrent.futures._base.CANCELLED
CANCELLED_AND_NOTIFIED = concurrent.futures._base.CANCELLED_AND_NOTIFIED
FINISHED = concurrent.futures._base.FINISHED


_RLock = type(threading.RLock())  # what that function makes, and asks for each time


class _Done:
    """The condition of a future that was resolved before anybody asked for it:
    nothing changes any more.

    Not a real one, as those who wait for many futures hold all their conditions,
    each in an order of its own.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def take_sleepers(self) -> tuple[()]:
        return ()

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exc: object) -> None:
        pass


_DONE = _Done()


class _Watched:
    """The condition of a future that somebody waits for: a lock, and those who sleep.

    `wait` and `as_completed` only ever lock it, thousands at a time.
    """

    __slots__ = ("_lock", "_sleepers", "acquire", "release")

    def __init__(self) -> None:
        self._lock: Any  # which has more for conditions than its type tells
        self._lock = lock = _RLock()
        self._sleepers: tuple[Wakeup, ...] = ()
        self.acquire: Callable[[], bool] = lock.acquire
        self.release: Callable[[], None] = lock.release

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until `notify_all`, with the lock released meanwhile; False if the time is over."""
        if timeout is not None and timeout > threading.TIMEOUT_MAX:
            raise OverflowError("timeout value is too large")
        end = None if timeout is None else monotonic() + timeout
        wakeup = new_wakeup()
        self._sleepers += (wakeup,)
        held = self._lock._release_save()
        try:
            while wakeup in self._sleepers:
                if timeout is not None and not timeout > 0:  # NaN, too
                    break
                wakeup.sleep(timeout)
                if end is not None:
                    timeout = end - monotonic()
        finally:
            self._lock._acquire_restore(held)
            is_notified = wakeup not in self._sleepers
            if not is_notified:
                self._sleepers = tuple(one for one in self._sleepers if one is not wakeup)
            wakeup.done()
        return is_notified

    def take_sleepers(self) -> tuple[Wakeup, ...]:
        """Those who sleep, and are to be woken now; the lock is held."""
        sleepers, self._sleepers = self._sleepers, ()
        return sleepers

    def notify_all(self) -> None:
        """Wake all sleepers; the lock is held."""
        for wakeup in self.take_sleepers():
            wakeup.wake()


class _OnDemand:
    """An attribute that is made when it is first asked for, and an ordinary one from then on.

    Two threads that ask at once get the same object.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, obj: Any, owner: type) -> Any:
        return obj.__dict__.setdefault(self._name, self._make())


class _ConditionOnDemand:
    """The same for a future's condition, which may be decided before anybody asks: see `Future`."""

    def __get__(self, future: Any, owner: type) -> Any:
        values = future.__dict__
        condition = values.get("_decided")
        if condition is None:
            condition = values.setdefault("_decided", _Watched())
        while condition is _DONE and future._state != FINISHED:
            sleep(0)
        values["_condition"] = condition
        return condition


_start_lock = threading.Lock()  # of all futures; held for a line or two


def _renew_lock() -> None:
    global _start_lock
    _start_lock = threading.Lock()


os.register_at_fork(
    after_in_child=_renew_lock
)  # a thread that is not in the child may have held it


class Owner(Protocol):
    """What a future needs of its executor's mailbox."""

    def cancelled(self, ids: list[int]) -> None: ...

    def call_back(self, future: Future) -> bool: ...

    def wake_soon(self, sleepers: Iterable[Wakeup]) -> None: ...


class Future(_Base):
    """A standard `concurrent.futures.Future` that tells its executor when it is cancelled.

    Its callbacks run in a thread of their own, so that they may block, or submit, without holding
    up the results of other tasks.

    A future's condition is most of what it costs in time and memory, and most futures are resolved
    before anybody waits for them, so it is made when somebody first asks for it. The rules of that:
        1. One atomic step decides what the condition is for good: a real one,
           or `_DONE` if the outcome comes first.
        2. With a real one, the state changes only while it is held:
           `wait` and `as_completed` look at it twice.
        3. But whether it starts or is cancelled is decided under `_start_lock`,
           without a condition.
        4. With `_DONE`, whoever asks is kept until the outcome is stored,
           which takes the resolver some lines.
    """

    # What the base class makes of each: a future has it when it differs, or when it is asked for.
    _state = PENDING
    _result = None
    _exception = None
    _waiters = _OnDemand(list)
    _done_callbacks = _OnDemand(list)
    _condition = _ConditionOnDemand()

    def __init__(self, owner: Owner, id: int, name: str) -> None:
        self._owner = owner
        self._id = id
        self._task_name = name

    def __repr__(self) -> str:
        """The standard's, with the task's number: what ``achilles status --explain`` takes."""
        return (
            super().__repr__().replace(" at ", f" of task {self._id}, {self._task_name}(), at ", 1)
        )

    def __reduce__(self) -> NoReturn:
        name = self._task_name or "a task"
        raise TypeError(
            f"the future of {name} cannot be pickled, as its result arrives in this process only; "
            "pass its result() instead"
        )

    def cancel(self) -> bool:
        """Cancel the task if it was not dispatched yet; whether it is cancelled now."""
        if self.withdraw():
            self._owner.cancelled([self._id])
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def withdraw(self) -> bool:
        """Cancel without telling the owner; whether this call has done it."""
        with self._condition:
            with _start_lock:
                if self._state != PENDING:
                    return False
                self._state = CANCELLED
            self._condition.notify_all()
            self.set_running_or_notify_cancel()
        self._invoke_callbacks()
        return True

    def result(self, timeout: float | None = None) -> Any:
        """The value; see the standard library's."""
        if self._state != FINISHED:
            condition = self._condition
            with condition:
                if self._state in (PENDING, RUNNING):
                    condition.wait(timeout)
        if self._state == FINISHED and self._exception is None:
            return self._result
        return super().result(
            0
        )  # raises what there is: the exception, the cancellation, or the timeout

    def start(self) -> bool:
        """The task was dispatched; False if it was cancelled or resolved before."""
        with _start_lock:
            if self._state == PENDING:
                self._state = RUNNING
            return self._state == RUNNING

    def resolve(self, value: Any, error: BaseException | None) -> bool:
        """The outcome; False if there was one before, or a cancellation: the first one stands.

        For one thread only, as is `start`.
        """
        if self._state not in (PENDING, RUNNING):
            return False
        values = self.__dict__
        condition = values.setdefault("_decided", _DONE)
        if condition is _DONE:
            self._result = value
            self._exception = error
            self._state = FINISHED
            self._condition = _DONE
            return True
        if not self._resolve_watched(condition, value, error):
            return False
        if "_done_callbacks" in values:
            self._invoke_callbacks()
        return True

    def _resolve_watched(
        self, condition: _Watched, value: Any, error: BaseException | None
    ) -> bool:
        with condition:
            if self._state not in (PENDING, RUNNING):
                return False
            self._result = value
            self._exception = error
            self._state = FINISHED
            for waiter in self.__dict__.get("_waiters", ()):
                if error is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            sleepers = condition.take_sleepers()
        if sleepers:
            self._owner.wake_soon(sleepers)
        return True

    def abandon(self, error: BaseException) -> None:
        """`resolve` in a forked child, where no other thread is,
        and locks may be held by those that were.
        """
        if self._state in (PENDING, RUNNING):
            self._exception = error
            self._state = FINISHED
            condition = self.__dict__.get("_decided")
            if condition is not None:
                condition.take_sleepers()  # the thread that is here may be one, in a handler
            self.__dict__["_decided"] = self._condition = _DONE

    def _invoke_callbacks(self) -> None:
        if self._done_callbacks and not self._owner.call_back(self):
            self._invoke_callbacks_here()

    def _invoke_callbacks_here(self) -> None:
        super()._invoke_callbacks()  # type: ignore[misc]


BLOCK = -2  # a status of our own: a `Block`, of the items from that index on
FAILED = -1  # another one: the payload is the exception itself


class Block(NamedTuple):
    """Outcomes of items in a row: ``values``, but for those whose status and payload are in
    ``others``, by their place.
    """

    values: list[Any]
    others: dict[int, tuple[int, Any]]


class Pace:
    """How long the calls of one function take, as the maps of an executor have found."""

    def __init__(self) -> None:
        self.timed = 0  # calls
        self.seconds = 0.0  # that one takes, lately

    def observe(self, calls: int, seconds: float) -> None:
        """So many calls took so long together."""
        if calls:
            part = 1.0 if not self.timed else 0.5
            self.seconds += (seconds / calls - self.seconds) * part
            self.timed += calls


class MapRun:
    """The outcomes of one `map` call by index, as they come, without a future for each.

    One thread takes them out, in order; the I/O thread puts them in.
    """

    def __init__(self, read: Callable[[int, Any], tuple[Any, BaseException | None]]) -> None:
        self._read = read
        self._outcomes: dict[int, tuple[int, Any]] = {}
        self._condition = threading.Condition(threading.Lock())
        self._next = 0  # of all the first that was not taken
        self._is_waited_for = False
        self.name = ""
        self.pace = Pace()  # of its function

    def put(self, index: int, status: int, payload: Any) -> None:
        """An outcome has come; `notify` must follow."""
        self._outcomes[index] = (status, payload)

    def notify(self) -> None:
        """Wake the reader if what it waits for is there."""
        if self._is_waited_for and self.peek() is not None:
            with self._condition:
                self._condition.notify_all()

    def peek(self) -> int | None:
        """The index of the item whose turn it is, if its outcome is there."""
        return self._next if self._next in self._outcomes else None

    def wait(self, deadline: float | None) -> int:
        """The index of the item whose turn it is, as soon as its outcome is there.

        Raises:
            concurrent.futures.TimeoutError: that was not before the deadline (`time.monotonic`).
        """
        index = self.peek()
        if index is not None:
            return index
        with self._condition:
            self._is_waited_for = True
            try:
                while (index := self.peek()) is None:
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and not left > 0:  # NaN, too: as the standard library does
                        raise concurrent.futures.TimeoutError()
                    self._condition.wait(left)
            finally:
                self._is_waited_for = False
        return index

    def take_block(self, index: int) -> Block | None:
        """The outcomes from the item on that `wait` has named, if they came together."""
        status, payload = self._outcomes[index]
        if status != BLOCK:
            return None
        block: Block = payload
        self._next = index + len(block.values)
        del self._outcomes[index]
        return block

    def take(self, index: int) -> Any:
        """The value of an item that `wait` has named.

        Raises:
            BaseException: whatever the item raised.
        """
        self._next = index + 1
        value, error = self._read(*self._outcomes.pop(index))
        if error is not None:
            try:
                raise error
            finally:
                del error  # a traceback must not keep its own frame alive
        return value


class UnorderedRun(MapRun):
    """The same, taken out in the order in which they come."""

    def __init__(self, read: Callable[[int, Any], tuple[Any, BaseException | None]]) -> None:
        super().__init__(read)
        self._arrivals: deque[int] = deque()

    def put(self, index: int, status: int, payload: Any) -> None:
        """An outcome has come; `notify` must follow."""
        super().put(index, status, payload)
        self._arrivals.append(index)

    def peek(self) -> int | None:
        """The index of the item whose outcome came first."""
        return self._arrivals[0] if self._arrivals else None

    def take_block(self, index: int) -> Block | None:
        """The outcomes from the item on that `wait` has named, if they came together."""
        block = super().take_block(index)
        if block is not None:
            self._arrivals.popleft()
        return block

    def take(self, index: int) -> Any:
        """The value of the item that `wait` has named."""
        self._arrivals.popleft()
        return super().take(index)


def as_completed(
    futures: Iterable[concurrent.futures.Future[T]],
    timeout: float | None = None,
    *,
    buffersize: int = 1000,
) -> Iterator[concurrent.futures.Future[T]]:
    """Yield futures as they are done.

    A list, set or other collection is treated as by the standard function: each future once, those
    first that are done. An iterator may be huge or endless, and may submit as it goes: futures are
    taken from it until one is done, then one or two for each that is yielded, and never more than
    ``buffersize`` beyond those. One that it gives again is yielded again,
    unless it was not yielded yet.

    Args:
        timeout: seconds from the call to the last future, or None.

    Raises:
        ValueError: ``buffersize`` below 1.
        concurrent.futures.TimeoutError: from the iterator, when the time is over.
    """
    if buffersize < 1:
        raise ValueError("buffersize must be > 0")
    if isinstance(futures, Sized):
        return concurrent.futures.as_completed(futures, timeout)
    deadline = None if timeout is None else monotonic() + timeout
    return _as_completed_lazily(iter(futures), deadline, buffersize)


class Waiter:
    """What futures call, in the thread that resolves them, when they are done:
    the standard library's protocol for it.
    """

    def __init__(self, when_done: Callable[[concurrent.futures.Future[Any]], object]) -> None:
        self.add_result = self.add_exception = self.add_cancelled = when_done

    def join(self, future: Any) -> bool:
        """Wait for the future; False if it is done already."""
        with future._condition:
            if future._state in (CANCELLED_AND_NOTIFIED, FINISHED):
                return False
            future._waiters.append(self)
        return True

    def leave(self, future: Any) -> None:
        """Wait for it no more."""
        with future._condition:
            if self in future._waiters:
                future._waiters.remove(self)


def _as_completed_lazily(
    futures: Iterator[concurrent.futures.Future[T]], deadline: float | None, buffersize: int
) -> Iterator[concurrent.futures.Future[T]]:
    done: queue.SimpleQueue[concurrent.futures.Future[T]] = queue.SimpleQueue()
    waiter = Waiter(done.put)
    held: set[concurrent.futures.Future[T]] = set()  # taken from the input, and not yielded yet
    is_more = True
    total = 0
    try:
        while True:
            taken = 0  # more than one for each that is yielded, so that a buffer can build up
            while is_more and len(held) < buffersize and (taken < 2 or done.empty()):
                taken += 1
                try:
                    future = next(futures)
                except StopIteration:
                    is_more = False
                    break
                if future not in held:
                    if not waiter.join(future):
                        done.put(future)
                    held.add(future)
                    total += 1
            if not held:
                return
            try:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                future = done.get(timeout=left)
            except queue.Empty:
                raise concurrent.futures.TimeoutError(
                    f"{len(held)} (of {total}) futures unfinished"
                ) from None
            held.remove(future)
            waiter.leave(future)
            box = [future]  # nothing here may keep it once it was given out
            del future
            yield box.pop()
    finally:
        for future in held:
            waiter.leave(future)
