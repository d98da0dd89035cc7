"""Waits for descriptors, for the clock, and for other threads;
what every shell's thread stands on.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import struct
import threading
from collections.abc import Callable
from time import perf_counter

_offer_core = getattr(os, "sched_yield", lambda: None)

HOT_SECONDS = 1e-4  # a wait that is over so soon is done awake the next time

_WAKE = struct.pack("=Q", 1)  # an eventfd wants 8 bytes


class Loop:
    """Watched descriptors with their callbacks, and a way to be woken. One thread waits;
    any may `wake` it.
    """

    def __init__(self) -> None:
        self._poller = _poller()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._lock = threading.RLock()  # a signal's handler may wake while this thread does
        self._is_closed = False
        self._is_hot = False  # the last wait for one task was that short
        self._wake_read, self._wake_write = _wake_descriptors()
        self.register(self._wake_read, self._drain)
        if self._wake_read == self._wake_write:
            # Edge-triggered, an eventfd need not be read: each write to it ends a wait.
            self._poller.modify(self._wake_read, select.EPOLLIN | select.EPOLLET)

    def register(self, fd: int, callback: Callable[[], object], *, write: bool = False) -> None:
        """Call ``callback`` when ``fd`` can be read (or written, with ``write``);
        again to change that.
        """
        events = select.POLLIN | (select.POLLOUT if write else 0)
        if fd in self._callbacks:
            self._poller.modify(fd, events)
        else:
            self._poller.register(fd, events)
        self._callbacks[fd] = callback

    def unregister(self, fd: int) -> None:
        """Watch ``fd`` no more; unknown ones are passed over."""
        if self._callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # it was closed already
                self._poller.unregister(fd)

    def wait(self, timeout: float | None) -> None:
        """Wait up to ``timeout`` seconds (None: for ever) and call back for what is ready."""
        self._call_back(self._poller.poll(timeout))

    def wait_awake(self, timeout: float) -> bool:
        """The same without going to sleep; whether something was ready.

        It offers its core to others all the while. To be woken by another core takes some 20 µs.
        """
        poll, end = self._poller.poll, perf_counter() + timeout
        while not (ready := poll(0)):
            if perf_counter() >= end:
                return False
            _offer_core()
        self._call_back(ready)
        return True

    def wait_for_one(self, timeout: float | None) -> None:
        """Wait for what becomes of the only task: awake at first,
        where the last such wait took less than `HOT_SECONDS`.
        """
        began = perf_counter()
        soon = HOT_SECONDS if timeout is None else min(timeout, HOT_SECONDS)
        if not self._is_hot or not self.wait_awake(soon):
            self.wait(timeout)
        self._is_hot = perf_counter() - began < HOT_SECONDS

    def _call_back(self, ready: list[tuple[int, int]]) -> None:
        callbacks = self._callbacks
        for fd, _ in ready:
            callback = callbacks.get(fd)  # None: an earlier callback has ended it
            if callback is not None:
                callback()

    def pollable(self) -> dict[int, bool]:
        """For another poll: what is ready when `wait` would call something back,
        and whether for writing, too.
        """
        if isinstance(self._poller, _Poll):
            return self._poller.is_written
        return {self._poller.fileno(): False}

    def wake(self) -> None:
        """End the present or the next wait; from any thread, also when the loop is closed."""
        with self._lock:
            if self._is_closed:
                return
            try:
                os.write(self._wake_write, _WAKE)
            except BlockingIOError:
                pass  # as many as fit are on their way

    def close(self) -> None:
        """Free the descriptors."""
        with self._lock:  # a number of a closed descriptor may soon be another file's
            if self._is_closed:
                return
            self._is_closed = True
            self._poller.close()
            for fd in {self._wake_read, self._wake_write}:
                os.close(fd)

    def _drain(self) -> None:
        if self._wake_read != self._wake_write:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)


class PatientThread(threading.Thread):
    """A thread that can still be waited for when a wait was interrupted,
    and started when its start was.

    Python 3.10 and 3.11 take a thread for dead whose `join` was interrupted by Ctrl-C. And `start`
    waits until the thread runs, so Ctrl-C can end it when that is certain already.
    """

    def __init__(self, target: Callable[[], object], name: str, *, daemon: bool = True) -> None:
        super().__init__(name=name, daemon=daemon)
        self._call = target
        self._claim = threading.Lock()
        self._ended = threading.Event()

    def start(self) -> None:
        """Start it, unless it was started."""
        if self.ident is None:
            super().start()

    def run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return  # it was started twice
        try:
            self._call()
        finally:
            self._ended.set()

    def join(self, timeout: float | None = None) -> None:
        is_started = self.ident is not None
        if not is_started or self is threading.current_thread() or self._ended.wait(timeout):
            super().join(timeout)  # which raises an error in the first two cases

    def is_alive(self) -> bool:
        return self.ident is not None and not self._ended.is_set()


def _wake_descriptors() -> tuple[int, int]:
    """Where a wake is read and written: an eventfd where that and epoll exist, else a pipe."""
    if hasattr(os, "eventfd") and hasattr(select, "epoll"):
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return fd, fd
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    return read, write


class _Poll:
    """`select.poll` with the interface of `select.epoll`, for where there is none."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.is_written: dict[int, bool] = {}

    def register(self, fd: int, events: int) -> None:
        self._poll.register(fd, events)
        self.is_written[fd] = bool(events & select.POLLOUT)

    modify = register

    def unregister(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self.is_written[fd]

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        return self._poll.poll(None if timeout is None else math.ceil(timeout * 1000))

    def close(self) -> None:
        """Nothing to free."""


def _poller() -> select.epoll | _Poll:
    return select.epoll() if hasattr(select, "epoll") else _Poll()
