"""The futures that `DistributedExecutor.submit` returns, and where the outcomes of a `map` are kept."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    T = TypeVar("T")
    _Base = concurrent.futures.Future[Any]
else:
    T = TypeVar("T")
    _Base = concurrent.futures.Future

# The standard library's own states and attributes: the same in every version from 3.2 to 3.14, and what its `wait`
# and `as_completed` look at.
PENDING = concurrent.futures._base.PENDING
RUNNING = concurrent.futures._base.RUNNING
CANCELLED = concurrent.futures._base.CANCELLED
CANCELLED_AND_NOTIFIED = concurrent.futures._base.CANCELLED_AND_NOTIFIED
FINISHED = concurrent.futures._base.FINISHED


class _Done:
    """The condition of a future that was resolved before anybody asked for it: nothing changes any more.

    Not a real one, as those who wait for many futures hold all their conditions, each in an order of its own.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exc: object) -> None:
        pass


_DONE = _Done()
_start_lock = threading.Lock()  # of all futures; held for a line or two


class Owner(Protocol):
    """What a future needs of its executor's mailbox."""

    def cancelled(self, ids: list[int]) -> None: ...

    def call_back(self, future: Future) -> bool: ...


class Future(_Base):
    """A standard `concurrent.futures.Future` that tells its executor when it is cancelled.

    Its callbacks run in a thread of their own, so that they may block, or submit, without holding up
    the results of other tasks.

    A future's condition is most of what it costs in time and memory, and most futures are resolved before anybody
    waits for them, so it is made when somebody first asks for it. The rules of that:
        1. One atomic step decides what the condition is for good: a real one, or `_DONE` if the outcome comes first.
        2. With a real one, the state changes only while it is held: `wait` and `as_completed` look at it twice.
        3. But whether it starts or is cancelled is decided under `_start_lock`, without a condition.
        4. With `_DONE`, whoever asks is kept until the outcome is stored, which takes the resolver some lines.
    """

    def __init__(self, owner: Owner, id: int, name: str) -> None:
        # What the base class sets, but for the condition.
        self._state = PENDING
        self._result = None
        self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Any], object]] = []
        self._owner = owner
        self._id = id
        self._task_name = name

    @property
    def _condition(self) -> Any:  # type: ignore[override]
        values = self.__dict__
        condition: threading.Condition | _Done | None = values.get("_own_condition")
        if condition is None:
            condition = values.setdefault("_own_condition", threading.Condition())
        while condition is _DONE and self._state != FINISHED:
            sleep(0)
        return condition

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
        if self._state == FINISHED and self._exception is None:
            return self._result
        return super().result(timeout)

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
        condition = self.__dict__.setdefault("_own_condition", _DONE)
        if condition is _DONE:
            self._result = value
            self._exception = error
            self._state = FINISHED
        elif not self._resolve_watched(condition, value, error):
            return False
        if self._done_callbacks:
            self._invoke_callbacks()
        return True

    def _resolve_watched(
        self, condition: threading.Condition, value: Any, error: BaseException | None
    ) -> bool:
        with condition:
            if self._state not in (PENDING, RUNNING):
                return False
            self._result = value
            self._exception = error
            self._state = FINISHED
            for waiter in self._waiters:
                if error is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            condition.notify_all()
        return True

    def _invoke_callbacks(self) -> None:
        if self._done_callbacks and not self._owner.call_back(self):
            self._invoke_callbacks_here()

    def _invoke_callbacks_here(self) -> None:
        super()._invoke_callbacks()  # type: ignore[misc]


class MapRun:
    """The outcomes of one `map` call by index, as they come, without a future for each.

    One thread takes them out; the I/O thread puts them in.
    """

    def __init__(self, read: Callable[[int, Any], tuple[Any, BaseException | None]]) -> None:
        self._read = read
        self._outcomes: dict[int, tuple[int, Any]] = {}
        self._condition = threading.Condition(threading.Lock())
        self._wanted = -1
        self.name = ""

    def put(self, index: int, status: int, payload: Any) -> None:
        """An outcome has come; `notify` must follow."""
        self._outcomes[index] = (status, payload)

    def notify(self) -> None:
        """Wake the reader if what it waits for is there."""
        if self._wanted in self._outcomes:
            with self._condition:
                self._condition.notify_all()

    def take(self, index: int, deadline: float | None) -> Any:
        """The value of the item of that index.

        Raises:
            concurrent.futures.TimeoutError: it did not come before the deadline (`time.monotonic`).
            BaseException: whatever the item raised.
        """
        outcome = self._outcomes.pop(index, None)
        if outcome is None:
            with self._condition:
                self._wanted = index
                while index not in self._outcomes:
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        self._wanted = -1
                        raise concurrent.futures.TimeoutError()
                    self._condition.wait(left)
                self._wanted = -1
                outcome = self._outcomes.pop(index)
        value, error = self._read(*outcome)
        if error is not None:
            try:
                raise error
            finally:
                del error  # a traceback must not keep its own frame alive
        return value


def as_completed(
    futures: Iterable[concurrent.futures.Future[T]], timeout: float | None = None
) -> Iterator[concurrent.futures.Future[T]]:
    """Yield futures as they are done; like the standard function, and a generator of futures will do.

    Raises:
        concurrent.futures.TimeoutError: not all were done ``timeout`` seconds after the call.
    """
    return concurrent.futures.as_completed(futures, timeout)
