"""The connections of a ROUTER, with or without a session on them: how many, for how long,
and what they have sent.

Rules
    1. Those of which nothing has come out yet, be it that they have shown no key, are few: one too
       many ends the oldest. Processes of this user, which come over ipc, are no strangers: hundreds
       that start together are let in.
    2. One on which no session begins, or goes on, is ended after a while;
       it may shake hands for as long again.
    3. What libzmq has received and we have not is memory that no limit of its own bounds: a message
       of endless frames is handed on only when it is whole. So the bytes of each connection are
       compared with those that came out of it.

libzmq does not tell all this. Its monitor tells descriptors, the kernel what came in on them; and a
descriptor that is shut down, by a copy of it, ends like any other connection (research: M12, M21).
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from achilles.net.transport import Route

STALL_SECONDS = 2.0  # of our own, after which nobody is late

_TCP_INFO = getattr(sockets, "TCP_INFO", None)
_BYTES_RECEIVED = struct.Struct("@128xQ")  # of Linux' tcp_info


class Connection:
    """One connection, from its acceptance to its end."""

    __slots__ = ("fd", "heard_at", "is_gone", "received", "route")

    def __init__(self, fd: int, now: float) -> None:
        self.fd = fd
        self.heard_at = now
        self.received = 0  # bytes that came out of the socket
        self.route: Route | None = None
        self.is_gone = False

    def backlog(self) -> int | None:
        """How many bytes came in and did not come out; None where the kernel does not tell."""
        with contextlib.suppress(OSError), _copy_of(self.fd) as copy:
            if _TCP_INFO is not None and copy.family in (sockets.AF_INET, sockets.AF_INET6):
                info = copy.getsockopt(sockets.IPPROTO_TCP, _TCP_INFO, _BYTES_RECEIVED.size)
                if len(info) == _BYTES_RECEIVED.size:
                    (received,) = _BYTES_RECEIVED.unpack(info)
                    return max(0, int(received) - self.received)
        return None

    def is_of_this_host(self) -> bool:
        """Whether it came over ipc, where the file system has decided who may."""
        with contextlib.suppress(OSError), _copy_of(self.fd) as copy:
            return copy.family == sockets.AF_UNIX
        return False

    def cut(self) -> None:
        """End it; libzmq will tell as of any other end."""
        with contextlib.suppress(OSError), _copy_of(self.fd) as copy:
            copy.getpeername()  # a listening socket has none
            copy.shutdown(sockets.SHUT_RDWR)


class Connections:
    """All connections of one ROUTER. ``unauthenticated_max`` and ``patience`` (seconds without a
    session) can be set.
    """

    def __init__(self) -> None:
        self.unauthenticated_max = 2048
        self.patience = 5.0
        self.dropped = 0  # for one of these limits
        self.on_refused: Callable[[str, str], object] | None = None  # called with source and reason
        self.by_fd: dict[int, Connection] = {}
        # Those that have said nothing yet, oldest first
        self._strangers: dict[int, Connection] = {}
        self._checks: deque[tuple[float, Connection]] = deque()
        self._checked_at = 0.0
        self._lenient_until = 0.0

    def accepted(self, fd: int, now: float) -> None:
        """A connection was made."""
        self.closed(fd)
        connection = self.by_fd[fd] = Connection(fd, now)
        if not connection.is_of_this_host():
            self._strangers[fd] = connection
        self._checks.append((now + 2 * self.patience, connection))
        if len(self._strangers) > self.unauthenticated_max:
            oldest = next(iter(self._strangers.values()))
            del self._strangers[oldest.fd]
            if oldest is not connection:
                self.dropped += 1
                self._tell(oldest.fd, "more strangers than there may be (broker.unauthenticated)")
                oldest.cut()

    def spoke(self, fd: int) -> Connection | None:
        """The first message has come out of a connection."""
        self._strangers.pop(fd, None)
        return self.by_fd.get(fd)

    def closed(self, fd: int) -> None:
        """A connection has ended."""
        connection = self.by_fd.pop(fd, None)
        self._strangers.pop(fd, None)
        if connection is not None:
            connection.is_gone = True

    def failed(self) -> None:
        """Somebody did not even shake hands as it must; whose key is refused,
        the ZAP handler knows.
        """
        if self.on_refused is not None:
            self.on_refused(
                "somebody", "the connection is not encrypted, or speaks not as ZeroMQ does"
            )

    def _tell(self, fd: int, why: str) -> None:
        if self.on_refused is None:
            return
        source = "somebody"
        with contextlib.suppress(OSError), _copy_of(fd) as copy:
            name = copy.getpeername()
            source = name[0] if name and isinstance(name, tuple) else "a process of this host"
        self.on_refused(source, why)

    def check(self, now: float, has_session: Callable[[Route], bool]) -> None:
        """End those on which there is no session, and was none for a while."""
        if now - self._checked_at > STALL_SECONDS:
            self._lenient_until = now + self.patience
        self._checked_at = now
        checks = self._checks
        while checks and checks[0][0] <= now:
            _, connection = checks.popleft()
            if connection.is_gone:
                continue
            checks.append((now + 2 * self.patience, connection))
            route = connection.route
            if now >= self._lenient_until and (route is None or not has_session(route)):
                self.dropped += 1
                self._tell(connection.fd, "no session on its connection (broker.hello_timeout)")
                connection.cut()

    def hoarder(self, least: int) -> Connection | None:
        """The one of which most came in and did not come out,
        if that is ``least`` bytes and more.
        """
        worst: Connection | None = None
        for connection in self.by_fd.values():
            backlog = connection.backlog() or 0
            if backlog >= least:
                worst, least = connection, backlog
        return worst

    def silent(self, now: float, seconds: float) -> list[Connection]:
        """Those of which the kernel does not tell what came in,
        and out of which nothing came for so long, or ever.
        """
        return [
            connection
            for connection in self.by_fd.values()
            if (connection.route is None or now - connection.heard_at > seconds)
            and connection.backlog() is None
        ]


def _copy_of(fd: int) -> sockets.socket:
    """A socket of our own for the same connection."""
    copy = os.dup(fd)
    try:
        return sockets.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
