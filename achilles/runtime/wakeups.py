"""How a thread sleeps until another wakes it.

A lock or a `threading.Condition` is released by a thread that holds the interpreter. The sleeper is
put on the same core at once, finds the interpreter taken, and sleeps again; when the other lets go
of it, the two wake and stop each other twice more. A write to a descriptor lets go of the
interpreter first: the sleeper wakes once, and goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import struct
import threading
import weakref
from threading import get_ident
from typing import Protocol

EVENTS_MAX = 16  # descriptors; whoever sleeps beside so many others has a lock
POLL_MAX = 3600.0  # seconds: `poll` takes no number of milliseconds

_ONE = struct.pack("=Q", 1)  # an eventfd wants 8 bytes


class Wakeup(Protocol):
    """For one thread that sleeps, once. It may wake for nothing, and has to look whether there was
    a reason.
    """

    def sleep(self, timeout: float | None) -> None:
        """Until `wake`, or for ``timeout`` seconds, which are more than 0."""

    def wake(self) -> None:
        """From any thread, once; before or while the other sleeps, or when it has given up."""

    def done(self) -> None:
        """The thread sleeps no more."""


class _Event:
    """On an eventfd, which serves the next one when this one is done: its last `wake` may come
    after that.
    """

    __slots__ = ("__weakref__", "_fd", "thread")

    def __init__(self) -> None:
        self.thread = 0  # whose it is at present
        self._fd = -1
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)
        _events.add(self)

    def sleep(self, timeout: float | None) -> None:
        if timeout is not None:
            poller = select.poll()
            poller.register(self._fd, select.POLLIN)
            if not poller.poll(math.ceil(min(timeout, POLL_MAX) * 1000)):
                return
        os.read(self._fd, 8)

    def wake(self) -> None:
        os.write(self._fd, _ONE)

    def done(self) -> None:
        _kept.append(self)

    def leave_parent(self) -> None:
        """In a forked child: what the parent wakes is not this any more.

        The thread that has forked may be asleep, in a signal's handler: it wakes, and looks.
        """
        if self.thread == get_ident():
            with contextlib.suppress(OSError):
                own = os.eventfd(1, os.EFD_CLOEXEC)
                os.dup2(own, self._fd, inheritable=False)
                os.close(own)
        else:
            os.close(self._fd)
            self._fd = -1
            _events.discard(self)  # who forks again has no part in it

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        if self._fd >= 0:
            close(self._fd)
            _permits.append(None)


class _Lock:
    """On a lock, for where there are no eventfds, or as many as there may be."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self, timeout: float | None) -> None:
        self._lock.acquire(timeout=-1 if timeout is None else timeout)

    def wake(self) -> None:
        self._lock.release()

    def done(self) -> None:
        pass


_kept: list[_Event] = []  # for the next sleepers
_permits: list[None] = [None] * EVENTS_MAX  # to make one
_events: weakref.WeakSet[_Event] = weakref.WeakSet()


def new_wakeup() -> Wakeup:
    """A way to be woken, for the thread that asks."""
    try:
        event = _kept.pop()
    except IndexError:
        try:
            _permits.pop()
        except IndexError:
            return _Lock()
        try:
            event = _Event()
        except (AttributeError, OSError):
            _permits.append(None)
            return _Lock()
    event.thread = get_ident()
    return event


def _leave_parent() -> None:
    for event in _kept:
        event.thread = 0
    for event in tuple(_events):
        event.leave_parent()
    _kept.clear()
    _permits[:] = [None] * EVENTS_MAX


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)
