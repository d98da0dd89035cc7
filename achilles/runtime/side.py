"""The side channel between a runner and its host: what is neither a task nor a task's result.

    runner ──▶ host: a task submits tasks of its own, an import needs a module, a task printed
    runner ◀── host: the answers

Both directions are a stream of letters, ``<I length of the body> <B kind> <Q client> body``: of a
kind that says who reads it, and of a client, because a runner works for one after the other.

Rules
    1. The host's end never blocks: what a runner does not read waits in the host.
    2. In the runner one thread reads, from the first letter that is wanted on;
       any thread may write, and may have to wait.
    3. What a task wrote is read before its result is: where letters are written,
       results say so (`RunnerSide.settle`).
    4. It costs a runner nothing until it is used, and this module imports next to nothing.
"""

from __future__ import annotations

import os
import select
import sys
from _struct import Struct
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable
    from typing import TypeAlias

    Letter: TypeAlias = "tuple[int, int, bytes]"  # kind, client, body

NESTED = 1  # tasks of a task, and what becomes of them
IMPORT = 2  # modules of the client's that a runner lacks
OUTPUT = 3  # what a task printed
PARTS = 4  # how far a bundle is that takes long; see `bundle`

HEAD = Struct("<IBQ")
BODY_MAX = (1 << 32) - 1
READ_MAX = 1 << 18
READS_MAX = 16


def pack(kind: int, client: int, body: bytes) -> bytes:
    """A letter as it travels."""
    return HEAD.pack(len(body), kind, client) + body


class Reader:
    """Puts letters together from what is read."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Letter]:
        """The letters that are complete by now."""
        rest = self._rest
        rest += data
        letters: list[Letter] = []
        at = 0
        while len(rest) - at >= HEAD.size:
            size, kind, client = HEAD.unpack_from(rest, at)
            end = at + HEAD.size + size
            if len(rest) < end:
                break
            letters.append((kind, client, bytes(memoryview(rest)[at + HEAD.size : end])))
            at = end
        del rest[:at]
        return letters


class HostSide:
    """The host's end of a runner's side channel, on a non-blocking socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._reader = Reader()
        self._outbox = bytearray()

    @property
    def is_full(self) -> bool:
        """Whether something waits until the runner reads."""
        return bool(self._outbox)

    def send(self, kind: int, client: int, body: bytes) -> None:
        """Send a letter, or keep what does not fit; `flush` when the socket can be written."""
        self._outbox += pack(kind, client, body)
        self.flush()

    def flush(self) -> None:
        """Write what the runner takes."""
        outbox = self._outbox
        try:
            while outbox:
                del outbox[: os.write(self.fd, memoryview(outbox)[:READ_MAX].tobytes())]
        except BlockingIOError:
            pass
        except OSError:
            outbox.clear()  # the runner is gone, as its host will notice

    def drain(self) -> list[Letter]:
        """The letters that have come, as many as the socket can hold."""
        letters: list[Letter] = []
        try:
            for _ in range(READS_MAX):
                data = os.read(self.fd, READ_MAX)
                if not data:
                    break
                letters += self._reader.feed(data)
        except OSError:
            pass  # there is no more
        return letters

    def receive(self) -> list[Letter] | None:
        """The letters that have come; None at the end of the channel."""
        try:
            data = os.read(self.fd, READ_MAX)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._reader.feed(data) if data else None


class RunnerSide:
    """The runner's end. Handlers are called in the reading thread,
    with the client's number and the body.
    """

    def __init__(self, fd: int) -> None:
        from _thread import allocate_lock

        self._fd = fd
        self._lock = allocate_lock()
        self._handlers: dict[int, Callable[[int, bytes], None]] = {}
        self._reader = Reader()
        self._reading = allocate_lock()  # held by a thread that reads for a moment
        self._is_reading = False  # one reads from here on
        self._flushers: list[Callable[[], None]] = []
        self.is_used = False  # tasks write letters

    def before_results(self, flush: Callable[[], None]) -> None:
        """Have something called after each task, before its result goes out."""
        self._flushers.append(flush)
        self.is_used = True

    def not_before_results(self, flush: Callable[[], None]) -> None:
        """Have it called no more."""
        if flush in self._flushers:
            self._flushers.remove(flush)

    def settle(self) -> None:
        """Let everything that a task wanted to write be written."""
        for flush in tuple(self._flushers):
            flush()

    def handle(self, kind: int, handler: Callable[[int, bytes], None]) -> None:
        """Have a handler called for each letter of a kind."""
        from _thread import start_new_thread

        if self._is_reading and self._handlers.get(kind) == handler:
            return
        with self._reading:
            self._handlers[kind] = handler
            if not self._is_reading:
                self._is_reading = True
                start_new_thread(self._read, ())

    def read_until(
        self, kind: int, handler: Callable[[int, bytes], None], is_done: LockType, seconds: float
    ) -> None:
        """Read until the handler has released the lock, or the time is over;
        without a thread if there is none yet.

        Raises:
            OSError: the host is gone.
        """
        with self._reading:
            self._handlers[kind] = handler
            until = monotonic() + seconds
            ready = select.poll()
            ready.register(self._fd, select.POLLIN)
            while not self._is_reading and not is_done.acquire(False):
                left = until - monotonic()
                if left <= 0:
                    return
                if ready.poll(1000 * left) and not self._read_some():
                    raise OSError("the host closed the side channel")
        if self._is_reading:
            is_done.acquire(timeout=seconds)

    def send(self, kind: int, client: int, body: bytes) -> None:
        """Send a letter.

        Raises:
            OSError: the host is gone, or this is a fork of the runner.
        """
        data = pack(kind, client, body)
        with self._lock:
            sent = os.write(self._fd, data)
            while sent < len(data):
                sent += os.write(self._fd, memoryview(data)[sent:])

    def close(self) -> None:
        """Close it in a fork of the runner, whose letters would mix with those of the runner
        itself.
        """
        from _thread import allocate_lock

        self._lock = allocate_lock()  # the old one is perhaps held by a thread that is not here
        self._reading = allocate_lock()
        os.close(self._fd)
        self._fd = -1

    def _read(self) -> None:
        try:
            while self._read_some():
                pass
        except OSError:
            pass  # the host is gone: the runner ends by other means

    def _read_some(self) -> bool:
        """Read what is there, and hand it out; False at the end."""
        data = os.read(self._fd, READ_MAX)
        for kind, client, body in self._reader.feed(data):
            handler = self._handlers.get(kind)
            if handler is not None:
                try:
                    handler(client, body)
                except Exception as error:  # the letters behind this one are other tasks'
                    sys.excepthook(type(error), error, error.__traceback__)
        return bool(data)
