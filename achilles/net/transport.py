"""ZeroMQ sockets in a `Loop`: non-blocking, with an outbox for what a socket does not take at once.

Rules
    1. A socket is used by the loop's thread alone.
    2. Nothing here blocks, and nothing here is trusted to arrive: see ``core.link``.
    3. ZeroMQ's descriptor only tells of changes, and any call on the socket can use a change up. So a socket is asked
       for input before a wait unless nothing was done with it since it was last found empty. A monitor, which is
       only ever read, and to its end, does not need that.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from achilles.core.protocol import Buffer
from achilles.runtime.loop import Loop

RECEIVE_MAX = 256  # messages before the loop looks at anything else
OUTBOX_MAX = 10_000

# Plain integers: arithmetic on pyzmq's enums costs more than the calls that it is for.
NOBLOCK, SNDMORE, RCVMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.RCVMORE)
EVENTS, POLLIN, POLLOUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)

_EVENT = struct.Struct("=HI")


class DealerPort:
    """A DEALER in a loop. What it sends while there is no connection is dropped: the link sends it again."""

    def __init__(self, socket: zmq.Socket[bytes], loop: Loop) -> None:
        self._socket = socket
        self._loop = loop
        self._outbox: deque[Sequence[Buffer]] = deque()
        self._is_known_empty = False
        loop.register(socket.FD, self._changed)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send, or keep for later."""
        self._is_known_empty = False
        if self._outbox or not _send(self._socket, frames):
            if len(self._outbox) < OUTBOX_MAX:
                self._outbox.append(frames)

    @property
    def has_outbox(self) -> bool:
        """Whether something is kept that the socket did not take yet."""
        return bool(self._outbox)

    @property
    def has_input(self) -> bool:
        """Whether `receive` would give something, or something kept could be sent."""
        if self._is_known_empty:
            return False
        wanted = POLLIN | POLLOUT if self._outbox else POLLIN
        has_input = bool(_events(self._socket) & wanted)
        self._is_known_empty = not has_input and not self._outbox
        return has_input

    def receive(self) -> list[list[Buffer]]:
        """What has come, at most `RECEIVE_MAX` messages."""
        if self._is_known_empty:
            return []
        outbox = self._outbox
        while outbox and _send(self._socket, outbox[0]):
            outbox.popleft()
        messages: list[list[Buffer]] = []
        while len(messages) < RECEIVE_MAX:
            if not _events(self._socket) & POLLIN:
                self._is_known_empty = not outbox
                break
            frames: list[Buffer] = [self._socket.recv(NOBLOCK)]
            _receive_rest(self._socket, frames)
            messages.append(frames)
        return messages

    def _changed(self) -> None:
        self._is_known_empty = False

    def close(self) -> None:
        """Close the socket."""
        self._loop.unregister(self._socket.FD)
        self._socket.close(0)


class RouterPort:
    """A ROUTER in a loop; a route is a peer's connection, as long as it lasts.

    ``on_closed(route)`` is called when a route's connection has ended.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], loop: Loop, on_closed: Callable[[bytes], None]
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._on_closed = on_closed
        self._outboxes: dict[bytes, deque[Sequence[Buffer]]] = {}
        self._route_by_fd: dict[int, bytes] = {}
        self._user_by_route: dict[bytes, str] = {}
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._is_known_empty = False
        loop.register(socket.FD, self._changed)
        loop.register(self._monitor.FD, self._look_for_closed)
        self._look_for_closed()  # a socket signals only to a reader that has found it empty

    def send(self, route: bytes, frames: Sequence[Buffer]) -> None:
        """Send, or keep for later; to a route that is gone, drop."""
        self._is_known_empty = False
        outbox = self._outboxes.get(route)
        if outbox is None:
            try:
                if _send(self._socket, [route, *frames]):
                    return
            except zmq.ZMQError:
                return  # EHOSTUNREACH: the link will send it again, if the peer comes back
            outbox = self._outboxes[route] = deque()
        if len(outbox) < OUTBOX_MAX:
            outbox.append(frames)

    def flush(self) -> None:
        """Try again what was kept."""
        self._is_known_empty = False
        for route, outbox in list(self._outboxes.items()):
            try:
                while outbox and _send(self._socket, [route, *outbox[0]]):
                    outbox.popleft()
            except zmq.ZMQError:
                outbox.clear()
            if not outbox:
                del self._outboxes[route]

    @property
    def has_outbox(self) -> bool:
        """Whether something is kept; a ROUTER does not tell when one of its peers can take more."""
        return bool(self._outboxes)

    @property
    def has_input(self) -> bool:
        """Whether `receive` would give something."""
        if self._is_known_empty:
            return False
        self._is_known_empty = not _events(self._socket) & POLLIN
        return not self._is_known_empty

    def receive(self) -> list[tuple[bytes, list[Buffer], str]]:
        """What has come, each with its route and the user that the transport has authenticated there."""
        messages: list[tuple[bytes, list[Buffer], str]] = []
        if self._is_known_empty:
            return messages
        while len(messages) < RECEIVE_MAX:
            if not _events(self._socket) & POLLIN:
                self._is_known_empty = True
                break
            route = self._socket.recv(NOBLOCK)
            frames: list[Buffer] = []
            user = self._user_by_route.get(route)
            if user is not None:
                frames.append(self._socket.recv(NOBLOCK))
            else:
                frame: Any = self._socket.recv(NOBLOCK, copy=False)
                user = self._note(route, frame)
                frames.append(bytes(frame.buffer))
            _receive_rest(self._socket, frames)
            messages.append((route, frames, user))
        return messages

    def close(self) -> None:
        """Close the socket."""
        for each in (self._monitor, self._socket):
            self._loop.unregister(each.FD)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _note(self, route: bytes, frame: Any) -> str:
        """Learn which connection a new route is; its user, as the transport has authenticated it."""
        try:
            fd = frame.get(zmq.SRCFD)
        except zmq.ZMQError:
            fd = -1
        try:
            user = str(frame.get("User-Id"))
        except zmq.ZMQError:
            user = ""  # not authenticated: no role fits it
        self._forget(fd)
        self._route_by_fd[fd] = route
        self._user_by_route[route] = user
        return user

    def _changed(self) -> None:
        self._is_known_empty = False

    def _forget(self, fd: int) -> bytes | None:
        route = self._route_by_fd.pop(fd, None)
        if route is not None:
            self._user_by_route.pop(route, None)
            self._outboxes.pop(route, None)
        return route

    def _look_for_closed(self) -> None:
        while _events(self._monitor) & POLLIN:
            event, *_ = self._monitor.recv_multipart(NOBLOCK)
            _, fd = _EVENT.unpack_from(event)
            route = self._forget(fd)
            if route is not None:
                self._on_closed(route)


def _send(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> bool:
    """Send without blocking; False if the socket does not take it now.

    Raises:
        zmq.ZMQError: the route is gone.
    """
    try:
        # Below pyzmq's threshold of 64 KiB a frame is copied either way; above it, the buffer must not change
        # while it is under way, which holds for payloads.
        if len(frames) == 1:
            socket.send(frames[0], NOBLOCK)
        else:
            socket.send_multipart(frames, NOBLOCK, copy=len(frames) == 2)
    except zmq.Again:
        return False
    return True


def _receive_rest(socket: zmq.Socket[bytes], frames: list[Buffer]) -> None:
    """The remaining frames of a message; they are large, and not copied."""
    while socket.getsockopt(RCVMORE):
        frame: Any = socket.recv(NOBLOCK, copy=False)
        frames.append(frame.buffer)


def _events(socket: zmq.Socket[bytes]) -> int:
    events: int = socket.getsockopt(EVENTS)  # type: ignore[assignment]
    return events
