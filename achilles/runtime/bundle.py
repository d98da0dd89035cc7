"""Many short calls of a map as one task: what a runner does with it.

Rules
    1. Each call is as if it were alone: what it raises or cannot return is its own, and what it
       returned is what it was at that moment, shared with no other result. Only plain immutable
       values wait to be pickled together.
    2. Nothing waits behind a call that takes long: after `STUCK_SECONDS` a thread takes back what
       has not started, and tells it in a letter, with the results so far. (It needs the GIL, as
       everything here; while a call holds that, it waits.) It is there while bundles come: to start
       one for each, and to end it, takes 50 µs, which is more than some of them.
    3. The letter is news, no more: the task's own result says all of it again,
       for whoever has not got the letter.

A runner imports this module: what it does not need at once is imported late.
"""

from __future__ import annotations

import os
from _struct import Struct
from _thread import allocate_lock, start_new_thread
from collections import deque
from time import perf_counter, sleep

from achilles.runtime import context
from achilles.runtime.serialize import ERROR, dump_result, dumps
from achilles.runtime.side import BODY_MAX, PARTS

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    Outcome: TypeAlias = tuple[int, bytes]
    Parts: TypeAlias = tuple[list[Any], dict[int, Outcome]]

STUCK_SECONDS = 0.05
LOOK_SECONDS = 0.01  # between two looks whether another bundle has begun
LOOKS = 5  # in vain, after which the thread ends
PLAIN = frozenset((int, float, complex, bool, type(None)))
TEXTS = frozenset((str, bytes))
TEXT_MAX = 1024
BYTES_MAX = 1 << 18  # of results that are not plain; then no further call is made
TASK_ID = Struct("<Q")

_forks: list[int] = []  # not empty in a child that a task has forked
os.register_at_fork(after_in_child=lambda: _forks.append(os.getpid()))


class Bundle:
    """Calls ``fn`` for every ``width`` arguments of ``flat``, one call after the other;
    ``id`` is the task's.
    """

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, flat: Sequence[Any], width: int, id: int) -> Parts:
        """What the calls returned, as far as they were made;
        None for those whose outcomes are in the dict, by index.
        """
        waiting: deque[Any] = deque(flat if width == 1 else zip(*[iter(flat)] * width))
        values: list[Any] = []
        others: dict[int, Outcome] = {}
        try:
            _watcher.begin(_Running(waiting, values, others, id))
            self._run(waiting.popleft, width > 1, values, others)
        except IndexError:
            pass  # nothing waits any more
        finally:
            _watcher.running = None
        return values, others

    def _run(
        self,
        take: Callable[[], Any],
        is_star: bool,
        values: list[Any],
        others: dict[int, Outcome],
    ) -> None:
        """Make the calls until what they return is much.

        Raises:
            IndexError: ``take`` has nothing any more.
        """
        fn, plain, add, forks = self.fn, PLAIN, values.append, _forks
        size = 0
        while size <= BYTES_MAX:
            argument = take()
            try:
                value = fn(*argument) if is_star else fn(argument)
            except BaseException as error:
                value, others[len(values)] = None, _failure(error)
            if type(value) not in plain:
                if type(value) in TEXTS and len(value) <= TEXT_MAX:
                    size += len(value)
                else:
                    outcome = _encode(value, fn)
                    size += len(outcome[1])
                    value, others[len(values)] = None, outcome
            if forks:
                return  # the runner ends this child
            add(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bundle, (self.fn,)

    def __repr__(self) -> str:
        return f"<Bundle of {self.fn!r}>"


def _failure(error: BaseException) -> Outcome:
    from achilles.runtime.tracebacks import dump_error

    return ERROR, dump_error(error)


def _encode(value: object, fn: object) -> Outcome:
    status, data = dump_result(value, fn)
    return status, data if isinstance(data, bytes) else b"".join(data)


class _Running:
    """A bundle whose calls are made; ``stuck_at``: when what waits there has waited too long."""

    __slots__ = ("_client", "_count", "_id", "_others", "_root", "_values", "_waiting", "stuck_at")

    def __init__(
        self, waiting: deque[Any], values: list[Any], others: dict[int, Outcome], id: int
    ) -> None:
        self._waiting = waiting
        self._count = len(waiting)  # of calls
        self._values = values
        self._others = others
        self._id = id
        # Whose it is: the runner may have gone on to another one's when it is told of
        self._client, self._root = context.client, context.root
        self.stuck_at = perf_counter() + STUCK_SECONDS

    def take_back(self) -> None:
        """Take back what has not started, and tell of it."""
        try:
            while True:
                self._waiting.pop()
                self._count -= 1
        except IndexError:
            pass
        done, others = self._values[:], self._others
        some = {at: others[at] for at in list(others) if at < len(done)}
        body = dumps((done, some, self._count))
        if context.side is not None and len(body) < BODY_MAX:
            letter = sealed(TASK_ID.pack(self._id) + body, self._root)
            context.side.send(PARTS, self._client, letter)


class _Watcher:
    """The thread that looks after bundles. One runs at a time."""

    def __init__(self) -> None:
        self.running: _Running | None = None
        self._is_there = False
        self._lock = allocate_lock()  # around the decision that the thread is, or is not, there

    def begin(self, running: _Running) -> None:
        """A bundle begins; it ends when ``running`` is None again, or another one."""
        with self._lock:
            self.running = running
            if not self._is_there:
                start_new_thread(self._watch, ())
                self._is_there = True

    def _watch(self) -> None:
        looks = 0  # in vain
        while True:
            with self._lock:
                running = self.running
                looks = looks + 1 if running is None else 0
                is_stuck = running is not None and perf_counter() >= running.stuck_at
                if looks > LOOKS or is_stuck:
                    self._is_there = False
                    break
            sleep(LOOK_SECONDS if running is None else max(0.0, running.stuck_at - perf_counter()))
        if running is not None:
            try:
                running.take_back()
            except Exception:
                pass  # the host is gone, or there is no memory for news


_watcher = _Watcher()


def sealed(body: bytes, root: bytes) -> bytes:
    """The letter as it travels, to a client of that root session."""
    if context.seal is None:
        return body
    from achilles.runtime.seal import ONCE_SIZE
    from achilles.runtime.seal import PARTS as PARTS_LETTER

    once = os.urandom(ONCE_SIZE)
    return once + context.seal.letter(PARTS_LETTER, root, once, body) + body
