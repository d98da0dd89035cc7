"""ZeroMQ sockets in a loop: non-blocking, with an outbox for what a socket does not take at once.

Rules
    1. A socket is used by the loop's thread alone.
    2. Nothing here blocks, and nothing here is trusted to arrive: see ``core.link``.
    3. A message is handed on as soon as it is read, one for each time that a socket is found ready,
       so that none waits for others to be read, and no socket for another.
    4. A routing id says where to send an answer, never who asks: ZeroMQ lets a peer take the id of
       one that has just gone. Connection and user are those that libzmq attaches to each message.
    5. A message has at most `FRAMES_MAX` frames. What goes on beyond that is handed on as far as it
       was read, for the codec to refuse, and the rest is read and dropped, a little at a time.
    6. To and from a peer of this host large payloads pass as references; see ``net.near``.
    7. A message is sent whole or not at all, whatever this process has run out of;
       see ``net.frames``.
    8. To and from a peer of this host everything goes through pipes, where there can be some;
       see ``net.pipes``.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Sequence
from errno import ENOMEM
from functools import partial
from time import monotonic
from typing import Any

import zmq

from achilles.core.protocol import FRAMES_MAX, Buffer, sign_of_life
from achilles.errors import ProtocolError
from achilles.net import near, pipes
from achilles.net.connections import Connection, Connections
from achilles.net.endpoint import LOCAL_USER, MAXMSGSIZE
from achilles.net.frames import prepared
from achilles.net.loop import POLLIN, SocketLoop
from achilles.net.pipes import OUTBOX_MAX, Pipes

DROPPED_AT_ONCE = 1000  # frames, while other sockets wait
UNKNOWN_FD = -1
# Bytes with which a message begins, by which those for the codec and those for us are told apart
KIND = 2

# Plain integers: arithmetic on pyzmq's enums costs more than the calls that it is for.
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)
EVENTS = int(zmq.EVENTS)
SRCFD = int(zmq.SRCFD)

# pyzmq's own `send` without the Python around it, which is for kinds of sockets that we do not use.
_send_one = zmq.backend.Socket.send

_EVENT = struct.Struct("=HI")
_ACCEPTED, _DISCONNECTED = (
    int(zmq.EVENT_ACCEPTED),
    int(zmq.EVENT_DISCONNECTED),
)  # both tell a descriptor
_FAILED = frozenset(  # these tell a reason
    map(int, (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL))
)

OnFrames = Callable[[list[Buffer]], object]

_LOG = logging.getLogger("achilles.net")


class DealerPort:
    """A DEALER in a loop. What it sends while there is no connection is dropped:
    the link sends it again.

    ``on_frames(frames)`` is called for each message. ``is_local``: it is connected over ipc. Then
    `fold` does something, unless ``folds`` is set to False, and so does `offer_pipes`;
    ``hands_on``: what comes may be folded again.
    ``on_pipes_lost()``: what was in pipes may not have arrived.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        loop: SocketLoop,
        on_frames: OnFrames,
        *,
        is_local: bool = False,
        hands_on: bool = False,
        on_pipes_lost: Callable[[], object] = lambda: None,
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._on_frames = on_frames
        self._on_pipes_lost = on_pipes_lost
        self._is_local = self.folds = is_local
        self._hands_on = hands_on
        self._pipes: Pipes | None = None
        self._offer: Pipes | None = None  # that waits for its answer
        self._offered = 0  # its number
        self._outbox: deque[Sequence[Buffer]] = deque()
        self._is_dropping = False  # the rest of an endless message
        loop.watch(socket, self._receive)

    def fold(self, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        """The frames as they are to be sent."""
        return near.fold(frames) if self.folds else frames

    def offer_pipes(self) -> None:
        """A connection was made: have all that follows go through pipes,
        if it is a local one and there can be some.
        """
        self._drop_pipes()
        if not self._is_local or not pipes.IS_AVAILABLE:
            return
        try:
            ends, theirs, frame, self._offered = pipes.offer()
        except OSError as error:
            _LOG.info("messages go over ipc, because there are no pipes for them: %s", error)
            return
        self._offer = Pipes(
            ends, self._loop, self._take, self._lost, frame_max=MAXMSGSIZE, theirs=theirs
        )
        self.send([frame])

    def end_pipes(self) -> None:
        """The connection is gone, and they with it; what has come through them is handed on."""
        if self._pipes is not None:
            self._pipes.drain()
        self._drop_pipes()

    def _take_answer(self, kind: bytes, frame: Buffer) -> None:
        """What became of the pipes that were offered;
        an earlier connection's answer may come late.
        """
        offer = self._offer
        if offer is None or pipes.answered(frame) != self._offered:
            return
        self._offer = None
        if kind == pipes.REFUSED:
            offer.close()
            return
        if len(self._outbox) >= OUTBOX_MAX:
            self._outbox.pop()  # the link sends it again; this nobody would
        self.send([pipes.SWITCHED])
        self._pipes = offer
        self._loop.has_pipes(+1)
        offer.begin()

    def _drop_pipes(self) -> None:
        if self._offer is not None:
            self._offer.close()
            self._offer = None
        if self._pipes is not None:
            self._pipes.close()
            self._pipes = None
            self._loop.has_pipes(-1)

    def _lost(self, error: ProtocolError | None) -> None:
        """The pipes have ended, or are of no use."""
        if error is not None:
            _LOG.warning("what came through a pipe was no message of ours: %s", error)
        self._drop_pipes()
        self.send([pipes.ENDED])
        self._on_pipes_lost()

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send, or keep for later."""
        if self._pipes is not None:
            self._pipes.send(frames)
            return
        outbox = self._outbox
        self._loop.uses_sockets = True
        if outbox or not _send(self._socket, frames):
            if not outbox:
                self._loop.watch(self._socket, self._flush_and_receive, write=True)
            if len(outbox) < OUTBOX_MAX:
                outbox.append(frames)

    def flush(self) -> None:
        """Try again what was kept."""
        if self._pipes is not None and self._pipes.has_outbox:
            self._pipes.flush()
        outbox = self._outbox
        while outbox and _send(self._socket, outbox[0]):
            outbox.popleft()
        if not outbox:
            self._loop.watch(self._socket, self._receive)

    @property
    def has_outbox(self) -> bool:
        """Whether something is kept that was not taken from us yet."""
        return bool(self._outbox) or (self._pipes is not None and self._pipes.has_outbox)

    def close(self) -> None:
        """Close the socket."""
        self._drop_pipes()
        self._loop.unwatch(self._socket)
        self._socket.close(0)

    def _receive(self) -> None:
        """Hand on the message that is there."""
        if self._is_dropping:
            self._is_dropping = _drop_rest(self._socket)
            return
        frame: Any = self._socket.recv(NOBLOCK, copy=False)
        frames: list[Buffer] = [memoryview(frame)]
        if frame.more:
            self._is_dropping = _receive_rest(self._socket, frames)
        self._take(frames)

    def _take(self, frames: list[Buffer]) -> None:
        """A message has come, by the socket or through a pipe."""
        if self._is_local:
            kind = bytes(frames[0][:KIND])
            if kind in near.KINDS:
                frames = _unfold(self, frames, self.send, keep=self._hands_on)
            elif kind in pipes.ANSWERS:
                self._take_answer(kind, frames[0])
                return
        if frames:
            self._on_frames(frames)

    def _flush_and_receive(self) -> None:
        self.flush()
        if _events(self._socket) & POLLIN:
            self._receive()


class Route:
    """A peer's connection to a ROUTER, as long as it lasts,
    and the user that the transport has authenticated there.

    An empty ``user`` is one whom nothing vouches for; ``fd`` is the connection's descriptor, where
    libzmq tells it. If it ``is_local``, it came over ipc; then `fold` does something,
    unless ``folds`` is set to False.
    """

    __slots__ = ("connection", "fd", "folds", "identity", "is_local", "pipes", "port", "user")

    def __init__(self, port: RouterPort, identity: bytes, user: str, fd: int = UNKNOWN_FD) -> None:
        self.port = port
        self.identity = identity
        self.user = user
        self.fd = fd
        self.connection = port.connections.spoke(fd) or Connection(fd, monotonic())
        self.connection.route = self
        self.is_local = self.folds = user == LOCAL_USER
        self.pipes: Pipes | None = None

    def fold(self, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        """The frames as they are to be sent there."""
        return near.fold(frames) if self.folds else frames


class RouterPort:
    """A ROUTER in a loop.

    ``on_frames(route, frames)`` is called for each message,
    ``on_closed(route)`` when a route's connection has ended.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        loop: SocketLoop,
        on_frames: Callable[[Route, list[Buffer]], object],
        on_closed: Callable[[Route], object],
        *,
        frame_max: int = MAXMSGSIZE,
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._on_frames = on_frames
        self._on_closed = on_closed
        self._frame_max = frame_max
        self._is_dropping = False  # the rest of an endless message
        self.connections = Connections()
        self._routes: dict[bytes, Route] = {}
        self._route_by_fd: dict[int, Route] = {}
        # What is kept by route; a ROUTER does not tell when one of its peers can take more.
        self.outboxes: dict[Route, deque[Sequence[Buffer]]] = {}
        self._monitor = socket.get_monitor_socket(_ACCEPTED | _DISCONNECTED | sum(_FAILED))
        loop.watch(socket, self._receive)
        loop.register(self._monitor.FD, self._look_for_closed)
        # A descriptor signals only to a reader that has found its socket empty
        self._look_for_closed()

    def send(self, route: Route, frames: Sequence[Buffer]) -> None:
        """Send, or keep for later; to a route that is gone, drop."""
        if route.pipes is not None:
            route.pipes.send(frames)
            return
        self._loop.uses_sockets = True
        if route not in self.outboxes:
            try:
                if self._send_to(route, frames):
                    return
            except zmq.ZMQError:
                self._lost(route)
                return  # EHOSTUNREACH: the link will send it again, if the peer comes back
            self.outboxes[route] = deque()
        outbox = self.outboxes[route]
        if len(outbox) < OUTBOX_MAX:
            outbox.append(frames)

    def flush(self) -> None:
        """Try again what was kept."""
        for route, outbox in list(self.outboxes.items()):
            self._loop.uses_sockets = True
            try:
                while outbox and self._send_to(route, outbox[0]):
                    outbox.popleft()
            except zmq.ZMQError:
                outbox.clear()
            if not outbox:
                del self.outboxes[route]

    def close(self) -> None:
        """Close the socket."""
        for route in self._routes.values():
            self._drop_pipes(route)
        self._loop.unregister(self._monitor.FD)
        self._loop.unwatch(self._socket)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _send_to(self, route: Route, frames: Sequence[Buffer]) -> bool:
        """Send without blocking; False if the route's connection does not take it now.
        For want of memory it may be lost.

        Raises:
            zmq.ZMQError: the route is gone.
        """
        socket = self._socket
        ready = None
        if len(frames) > 1:
            ready = prepared(frames)
            if ready is None:
                return True
        try:
            _send_one(socket, route.identity, SNDMORE | NOBLOCK)
        except zmq.Again:
            return False
        try:
            if ready is None:
                _send_one(socket, frames[0], NOBLOCK)
            else:
                _send_all(socket, ready)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            _pass_over(error)
            _send_one(socket, b"", NOBLOCK)  # ends what was begun, and takes no memory
        return True

    def _receive(self) -> None:
        """Hand on the message that is there."""
        socket = self._socket
        if self._is_dropping:
            self._is_dropping = _drop_rest(socket)
            return
        identity = socket.recv(NOBLOCK)
        frame: Any = socket.recv(NOBLOCK, copy=False)
        frames: list[Buffer] = [memoryview(frame)]
        if frame.more:
            self._is_dropping = _receive_rest(socket, frames)
        self._take(self._route(identity, frame), frames)

    def _take(self, route: Route, frames: list[Buffer]) -> None:
        """A message has come from there, by the socket or through a pipe."""
        route.connection.received += sum(map(len, frames))
        if route.is_local:
            kind = bytes(frames[0][:KIND])
            if kind in near.KINDS:
                frames = _unfold(route, frames, partial(self.send, route), keep=True)
            elif kind == pipes.OFFER:
                frames = self._accept_pipes(route, frames)
            elif kind == pipes.SWITCHED:
                if route.pipes is not None:  # they may have ended meanwhile
                    route.pipes.begin()
                return
            elif kind == pipes.ENDED:
                self._end_pipes(route)
                return
        if frames:
            self._on_frames(route, frames)

    def _accept_pipes(self, route: Route, frames: list[Buffer]) -> list[Buffer]:
        """From here on all goes through these pipes, if they can be had;
        what is for the codec to refuse.
        """
        self._drop_pipes(route)
        try:
            number = pipes.number_of(frames[0])
        except ProtocolError:
            return frames
        try:
            if self._loop.pipes >= pipes.PAIRS_MAX or route in self.outboxes:
                raise OSError("there are many pipes, or messages that wait to be sent")
            ends = pipes.accept(frames[0])
        except OSError as error:
            _LOG.debug("the messages of another process go over ipc: %s", error)
            self.send(route, [pipes.answer(pipes.REFUSED, number)])
            return []
        self.send(route, [pipes.answer(pipes.ACCEPTED, number)])
        route.pipes = Pipes(
            ends,
            self._loop,
            partial(self._take, route),
            partial(self._lost_pipes, route),
            frame_max=self._frame_max,
        )
        self._loop.has_pipes(+1)
        return []

    def _end_pipes(self, route: Route) -> None:
        """They are no way any more; what has come through them, begun or not, is handed on."""
        if route.pipes is not None:
            route.pipes.drain()
        self._drop_pipes(route)

    def _lost_pipes(self, route: Route, error: ProtocolError | None) -> None:
        self._drop_pipes(route)
        if error is not None:
            self._on_frames(route, [b""])  # for the codec to refuse

    def _drop_pipes(self, route: Route) -> None:
        if route.pipes is not None:
            route.pipes.close()
            route.pipes = None
            self._loop.has_pipes(-1)

    def _route(self, identity: bytes, frame: Any) -> Route:
        """Where a message came from, by what libzmq says of this very message."""
        try:
            fd = frame.get(SRCFD)
        except zmq.ZMQError:
            fd = UNKNOWN_FD
        try:
            user = frame.get("User-Id")
        except zmq.ZMQError:
            user = ""  # not authenticated
        route = self._routes.get(identity)
        if route is not None and route.fd == fd and route.user == user:
            return route
        # Before a number that is free again is taken for the former connection's
        self._look_for_closed()
        if identity in self._routes:
            self._end(self._routes[identity])
        if fd in self._route_by_fd:
            self._end(self._route_by_fd[fd])
        route = self._routes[identity] = Route(self, identity, user, fd)
        if fd != UNKNOWN_FD:
            self._route_by_fd[fd] = route
        return route

    def _lost(self, route: Route) -> None:
        """The socket does not know the route; where no descriptor tells of its end, this does."""
        if route.fd == UNKNOWN_FD and self._routes.get(route.identity) is route:
            del self._routes[route.identity]

    def _end(self, route: Route) -> None:
        """A route's connection has ended."""
        self._end_pipes(route)
        if self._routes.get(route.identity) is route:
            del self._routes[route.identity]
        if self._route_by_fd.get(route.fd) is route:
            del self._route_by_fd[route.fd]
        self.outboxes.pop(route, None)
        self._on_closed(route)

    def _look_for_closed(self) -> None:
        """Take in what the monitor tells of connections."""
        while _events(self._monitor) & POLLIN:
            told, *_ = self._monitor.recv_multipart(NOBLOCK)
            event, fd = _EVENT.unpack_from(told)
            if event == _ACCEPTED:
                self.connections.accepted(fd, monotonic())
            elif event in _FAILED:
                self.connections.failed()
            else:
                self.connections.closed(fd)
                route = self._route_by_fd.get(fd)
                if route is not None:
                    self._end(route)


def _send(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> bool:
    """Send without blocking; False if the socket does not take it now.
    For want of memory it may be lost.
    """
    try:
        if len(frames) == 1:
            _send_one(socket, frames[0], NOBLOCK)
            return True
        ready = prepared(frames)
        if ready is not None:
            _send_all(socket, ready)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        _pass_over(error)
    return True


def _send_all(socket: zmq.Socket[bytes], frames: Sequence[zmq.Frame]) -> None:
    for frame in frames[:-1]:
        _send_one(socket, frame, SNDMORE | NOBLOCK)
    _send_one(socket, frames[-1], NOBLOCK)


def _pass_over(error: zmq.ZMQError) -> None:
    """What there is no memory for is as good as lost: the link sends it again."""
    if error.errno != ENOMEM:
        raise error


def _unfold(
    end: DealerPort | Route,
    frames: list[Buffer],
    answer: Callable[[list[Buffer]], None],
    *,
    keep: bool,
) -> list[Buffer]:
    """What is to be handed on of a message from there that is not for the codec as it is."""
    if frames[0] == near.REFUSAL:
        end.folds = False
        return []
    try:
        try:
            return near.unfold(frames, keep=keep)
        except (OSError, MemoryError) as error:
            lost = sign_of_life(frames[1])
            _LOG.info("large payloads of another process come in full from here on: %s", error)
            answer([near.REFUSAL])
            return [lost]
    except (ProtocolError, IndexError):
        return frames  # for the codec to refuse


def _receive_rest(socket: zmq.Socket[bytes], frames: list[Buffer]) -> bool:
    """The remaining frames of a message, none of them copied;
    whether there are more than a message can have.
    """
    for _ in range(FRAMES_MAX):
        frame: Any = socket.recv(NOBLOCK, copy=False)
        frames.append(memoryview(frame))
        if not frame.more:
            return False
    return True


def _drop_rest(socket: zmq.Socket[bytes]) -> bool:
    """Drop some of the frames that are left of a message; whether there are more yet."""
    for _ in range(DROPPED_AT_ONCE):
        frame: Any = socket.recv(NOBLOCK, copy=False)
        if not frame.more:
            return False
    return True


def _events(socket: zmq.Socket[bytes]) -> int:
    events: int = socket.getsockopt(EVENTS)  # type: ignore[assignment]
    return events
