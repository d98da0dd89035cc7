"""A connection to the broker, from a client or a worker: the socket, its renewal,
and the session on it.
"""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable, Iterable
from math import inf
from time import monotonic, sleep

import zmq

from achilles.core import protocol as p
from achilles.core.dialer import JOINED, Dialer
from achilles.core.link import Packet, encoded
from achilles.core.liveness import RATE_MIN
from achilles.errors import (
    BrokerUnreachableError,
    EncryptionMismatchError,
    KeyRefusedError,
    NotABrokerError,
    ProtocolError,
    WrongBrokerError,
)
from achilles.net.endpoint import RECONNECT_MAX, Dialed, WatchEvent, dial_dealer
from achilles.net.frames import has_room
from achilles.net.keys import Join
from achilles.net.loop import SocketLoop
from achilles.net.transport import DealerPort

BACKOFF_FIRST, BACKOFF_MAX = 0.1, RECONNECT_MAX
ACKNOWLEDGED_BYTES = 2 << 20  # after so many in large messages the broker is told at once
WELCOME_SECONDS = 5.0  # a socket on which a session was called for in vain for so long is replaced
# A socket of a session on which nothing was heard for so long is replaced, too
SILENCE_SECONDS = 6.0

Dial = Callable[[], Dialed]

_LOG = logging.getLogger("achilles.net")

_ABOUT_SESSIONS = (p.Welcome, p.Gone, p.Refused)
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

# By process; none is let go of in a fork, where it is the parent's. Not the program's own, which
# `zmq.Context.instance()` would be: to end that one would wait for our sockets.
_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def _certainty(problem: BrokerUnreachableError | None) -> int:
    """How much it was told, rather than guessed from a connection that ended:
    what is less may only follow from it.
    """
    if isinstance(problem, KeyRefusedError | EncryptionMismatchError):
        return 3
    if isinstance(problem, WrongBrokerError):
        return 2
    return int(isinstance(problem, NotABrokerError))


def dialer_to(join: Join) -> Dial:
    """What makes sockets to the broker that ``join`` tells of;
    it raises a BrokerUnreachableError if there can be none now.
    """

    def dial() -> Dialed:
        endpoint = join.endpoint()
        try:
            return dial_dealer(_context(), endpoint, join.keys, join.running_pid())
        except (OSError, zmq.ZMQError) as error:
            if error.errno not in _SHORTAGES:
                raise
            raise BrokerUnreachableError(
                f"this process cannot connect to {endpoint}: it may have too few descriptors or threads more "
                f"({os.strerror(error.errno)}); see ulimit -n and -u"
            ) from None

    return dial


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """This process's context for all sockets to brokers.

    Raises:
        OSError: there is no room for it; libzmq would end the process.
    """
    pid = os.getpid()
    context = _contexts.get(pid)
    if context is not None:
        return context
    if not has_room():
        raise OSError(errno.EMFILE, "there is no room for a context")
    return _contexts.setdefault(pid, zmq.Context())


class Peer:
    """Keeps a session with a broker over as many sockets as that takes; ``dial`` makes one.

    ``on_message(message, now)`` is called with what the broker sent, and with what befell the
    session: `Welcome`, `Gone`, `Refused`. ``hands_on``: its large payloads are for other processes.

    Raises:
        BrokerUnreachableError: no socket can be made.
    """

    def __init__(
        self,
        dial: Dial,
        loop: SocketLoop,
        hello: p.ClientHello | p.WorkerHello,
        on_message: Callable[[p.Wire, float], object],
        *,
        hands_on: bool = False,
    ) -> None:
        self._dial = dial
        self._loop = loop
        self._dialer = Dialer(hello)
        self._on_message = on_message
        self._hands_on = hands_on
        self.large_at = -inf  # when the last large message came
        self._is_connected = False
        self.was_cut_off = False  # whether a connection that was made has ended, and not by us
        self._received = 0  # bytes, of large messages since the last acknowledgement
        self._backoff = BACKOFF_FIRST
        self._busy_until = 0.0  # with what was sent
        self._since = self._called_at = monotonic()  # when a session was called for first
        self._redial_at: float | None = None
        self._due = 0.0  # when to look again; until then nothing happens but what sets it
        self._problem: BrokerUnreachableError | None = None
        self._open(self._dial(), self._since)

    @property
    def is_joined(self) -> bool:
        """Whether there is a session."""
        return self._dialer.state == JOINED

    @property
    def is_settled(self) -> bool:
        """Whether the broker is known to have all that was sent."""
        return self._dialer.is_settled

    def is_deaf(self, now: float) -> bool:
        """Whether nothing has been heard for so long that nobody is thought to be there,
        on whichever socket.
        """
        heard_at = self._dialer.heard_at or self._since
        return now > max(heard_at, self._busy_until) + SILENCE_SECONDS

    def inquire(self) -> None:
        """Have the broker say what it has."""
        self._transmit(self._dialer.acknowledge())

    def take_unacknowledged(self) -> list[p.Wire]:
        """What the last session's broker has perhaps not got."""
        messages, self._dialer.unacknowledged = self._dialer.unacknowledged, []
        return messages

    def silent_for(self, now: float) -> float:
        """Seconds since the broker's last sign of life, or since the first call;
        0 while a large message may be under way.
        """
        heard_at = self._dialer.heard_at
        return max(0.0, now - (self._since if heard_at is None else heard_at))

    def problem(self) -> BrokerUnreachableError:
        """Why there is no session, as far as is known."""
        return self._problem or BrokerUnreachableError(
            f"no achilles broker answers at {self._dialed.endpoint}; start one with: achilles broker"
        )

    def send(self, messages: Iterable[p.Wire]) -> None:
        """Send messages of the session; without one they are dropped
        (the cores have what matters).
        """
        self._transmit(self._dialer.send(messages))

    def tick(self, now: float) -> float:
        """Heartbeats, repeated hellos, and new sockets in place of dead ones;
        when to call this again.
        """
        if now >= self._due:
            self._due = self._tick(now)
        return self._due

    def _tick(self, now: float) -> float:
        due = self._dialer.next_deadline()
        if due is not None and now >= due:
            self._transmit(self._dialer.tick(now))
            due = self._dialer.next_deadline()
        if self._redial_at is None:
            if self._dialer.state == JOINED:
                dead_at = self._dead_at()
                if now < dead_at:
                    return dead_at if due is None else min(due, dead_at)
                self._redial_at = now  # what was sent is sent again, or was received
            elif now <= (in_vain_at := max(self._opened_at, self._called_at) + WELCOME_SECONDS):
                return in_vain_at if due is None else min(due, in_vain_at)
            else:
                self._redial_at = now + self._pause()
        if now >= self._redial_at:
            try:
                dialed = self._dial()
            except BrokerUnreachableError as error:  # the program has taken what there was
                self._problem = error
                self._redial_at = now + self._pause()
            else:
                self._close_socket()
                self._open(dialed, now)
                return now
        return min(self._redial_at, inf if due is None else due)

    def flush(self, timeout: float) -> None:
        """Give what was sent up to ``timeout`` seconds to leave, as far as that can be known."""
        deadline = monotonic() + timeout
        while self._port.has_outbox and monotonic() < deadline:
            self._port.flush()
            sleep(0.001)

    def close(self) -> None:
        """End without a word."""
        self._close_socket()

    def _receive(self, frames: list[p.Buffer]) -> None:
        """Take in a message."""
        now = monotonic()
        try:
            step = self._dialer.receive(Packet(*p.decode(frames)), now)
        except ProtocolError as error:
            _LOG.warning(
                "the broker at %s sent a malformed message: %s", self._dialed.endpoint, error
            )
            return
        if step.packets:
            self._transmit(step.packets)
        if len(frames) > 1:
            self.large_at = now
            self._received += sum(len(frame) for frame in frames)
            if self._received > ACKNOWLEDGED_BYTES:
                self._received = 0
                self._transmit(self._dialer.acknowledge())
        for message in step.messages:
            if isinstance(message, _ABOUT_SESSIONS):
                self._due = 0.0
                if isinstance(message, p.Gone):
                    self._called_at = now
            self._on_message(message, now)

    def _look(self) -> None:
        """See what befell the connection."""
        now = monotonic()
        self._due = 0.0
        for event in self._dialed.watch.poll():
            if event.is_connected:
                self._is_connected = True
                self._backoff = BACKOFF_FIRST
                self._port.offer_pipes()
                self._transmit(self._dialer.connected(now))
            elif self._is_connected:
                self._is_connected, self.was_cut_off = False, True
                self._port.end_pipes()
            if event.problem is not None:
                self._note(event, now)

    def _open(self, dialed: Dialed, now: float) -> None:
        self._redial_at = None
        self._is_connected = False
        self._opened_at = now
        self._dialed = dialed
        self._port = DealerPort(
            self._dialed.socket,
            self._loop,
            self._receive,
            is_local=self._dialed.endpoint.startswith("ipc:"),
            hands_on=self._hands_on,
            on_pipes_lost=self.inquire,
        )
        self._loop.register(self._dialed.watch.fd, self._look)
        if not self.is_joined:
            self._transmit(self._dialer.start(now))
        self._look()  # a descriptor signals only to a reader that has found its socket empty

    def _close_socket(self) -> None:
        self._loop.unregister(self._dialed.watch.fd)
        self._dialed.watch.close()
        self._port.close()

    def _note(self, event: WatchEvent, now: float) -> None:
        """Remember what is wrong: not what only follows from it,
        as long as nothing has gone better.
        """
        if event.is_connected or _certainty(event.problem) >= _certainty(self._problem):
            self._problem = event.problem
        if event.is_dead and self._redial_at is None:
            self._redial_at = now + self._pause()

    def _pause(self) -> float:
        """How long to wait before the next attempt; others wait for other times."""
        pause = self._backoff * random.uniform(0.5, 1.0)
        self._backoff = min(2 * self._backoff, BACKOFF_MAX)
        return pause

    def _dead_at(self) -> float:
        """When to take the connection for dead: TCP does not tell of a peer that vanished,
        nor of a length that was garbled.

        While large messages are under way, in either direction, nothing else can be heard.
        """
        heard_at = self._dialer.heard_at or self._since
        return max(heard_at, self._opened_at, self._busy_until) + SILENCE_SECONDS

    def _transmit(self, packets: Iterable[Packet]) -> None:
        for packet in packets:
            for frames in encoded(packet, self._port.fold):
                self._port.send(frames)
                if len(frames) > 1:
                    size = sum(memoryview(frame).nbytes for frame in frames)
                    self._busy_until = max(monotonic(), self._busy_until) + size / RATE_MIN
