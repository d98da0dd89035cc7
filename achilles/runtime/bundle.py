"""Many short calls of a map as one task: what a runner does with it.

Rules
    1. Each call is as if it were alone: what it raises or cannot return is its own, and what it
       returned is what it was at that moment, shared with no other result. Only plain immutable
       values wait to be pickled together.
    2. Nothing waits behind a call that takes long: after `STUCK_SECONDS` a thread takes back what
       has not started, and tells it in a letter, with the results so far. (It needs the GIL, as
       everything here; while a call holds that, it waits.)
    3. The letter is news, no more: the task's own result says all of it again,
       for whoever has not got the letter.

A runner imports this module: what it does not need at once is imported late.
"""

from __future__ import annotations

import os
from _struct import Struct
from _thread import allocate_lock, start_new_thread
from collections import deque

from achilles.runtime import context
from achilles.runtime.serialize import ERROR, dump_result, dumps
from achilles.runtime.side import BODY_MAX, PARTS

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    Outcome: TypeAlias = tuple[int, bytes]
    Parts: TypeAlias = tuple[list[Any], dict[int, Outcome]]

STUCK_SECONDS = 0.05
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
        count = len(waiting)
        values: list[Any] = []
        others: dict[int, Outcome] = {}
        is_over = allocate_lock()
        is_over.acquire()
        start_new_thread(_watch, (waiting, values, others, is_over, id, count))
        try:
            self._run(waiting.popleft, width > 1, values, others)
        except IndexError:
            pass  # nothing waits any more
        finally:
            is_over.release()
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


def _watch(
    waiting: deque[Any],
    values: list[Any],
    others: dict[int, Outcome],
    is_over: LockType,
    id: int,
    count: int,
) -> None:
    """Wait for the end of a bundle; if a call of it takes too long,
    take back what has not started.
    """
    if is_over.acquire(timeout=STUCK_SECONDS):
        return
    try:
        while True:
            waiting.pop()
            count -= 1
    except IndexError:
        pass
    done = values[:]
    body = dumps((done, {at: others[at] for at in list(others) if at < len(done)}, count))
    if context.side is None or len(body) >= BODY_MAX:
        return
    try:
        context.side.send(PARTS, context.client, sealed(TASK_ID.pack(id) + body))
    except OSError:
        pass  # the host is gone


def sealed(body: bytes) -> bytes:
    """The letter as it travels."""
    if context.seal is None:
        return body
    from achilles.runtime.seal import ONCE_SIZE
    from achilles.runtime.seal import PARTS as PARTS_LETTER

    once = os.urandom(ONCE_SIZE)
    return once + context.seal.letter(PARTS_LETTER, context.root, once, body) + body
