"""The session of a client or a worker, from its own side.

Picture
    calling ──Welcome──▶ joined ──Gone──▶ calling …
       └──Refused──▶ refused                         (a hello is repeated until it is answered)

A session outlives connections: `connected` only hurries what the next heartbeat would do. It ends
when the broker says that it does not know it (`Gone`): a new broker, or one that had given us up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from achilles.core import protocol as p
from achilles.core.link import Link, Packet
from achilles.core.liveness import RATE_MIN

HELLO_INTERVAL = 0.5

_ABOUT_SESSIONS = frozenset({p.Welcome, p.Refused, p.Gone})

CALLING, JOINED, REFUSED = "calling", "joined", "refused"


class Step(NamedTuple):
    """What to send, and the messages that the core above is to see,
    `Welcome` and `Gone` among them.
    """

    packets: list[Packet]
    messages: list[p.Wire]


class Dialer:
    """One peer's session with its broker."""

    def __init__(self, hello: p.ClientHello | p.WorkerHello) -> None:
        self._hello = hello
        self._link = Link(p.NO_TOKEN)
        self._heartbeat_interval = 1.0
        self._next_at: float | None = None
        self.state = CALLING
        self.unacknowledged: list[p.Wire] = []  # what the last session's broker has perhaps not got
        # The broker's last sign of life, or when the next may come
        self.heard_at: float | None = None
        self.reason = ""  # why it refused us

    def start(self, now: float) -> list[Packet]:
        """Begin to call."""
        self.state = CALLING
        self._link = Link(p.NO_TOKEN)
        self._next_at = now + HELLO_INTERVAL
        return [self._link.wrap(self._hello)]

    def connected(self, now: float) -> list[Packet]:
        """A connection was made: what was sent before may be lost."""
        if self.state == CALLING:
            return self.start(now)
        return [self._link.wrap(p.Heartbeat())] if self.state == JOINED else []

    @property
    def is_settled(self) -> bool:
        """Whether the broker is known to have all that was sent."""
        return self.state == JOINED and not self._link.unacknowledged

    def send(self, messages: Iterable[p.Wire]) -> list[Packet]:
        """Messages of the core above; only while joined."""
        if self.state != JOINED:
            return []
        return list(map(self._link.wrap, messages))

    def acknowledge(self) -> list[Packet]:
        """Say what has come, at once; the broker does the same."""
        return [self._link.wrap(p.Heartbeat())] if self.state == JOINED else []

    def receive(self, packet: Packet, now: float) -> Step:
        """Take in what the broker sent.

        Raises:
            ProtocolError: it does not fit the session.
        """
        message = packet.message
        is_ours = self.state == JOINED and packet.header.token == self._link.token
        if type(message) in _ABOUT_SESSIONS:
            return self._about_session(message, now, is_ours)
        if not is_ours:
            return Step([], [])
        self.heard_at = now
        is_new, answers = self._link.receive(packet, now)
        if isinstance(message, p.Heartbeat):
            self.heard_at = now + message.coming / RATE_MIN
            return Step(answers, [])
        if not is_new:
            return Step(answers, [])
        return Step(answers, [message])

    def _about_session(self, message: p.Wire, now: float, is_ours: bool) -> Step:
        if isinstance(message, p.Welcome):
            return self._welcome(message, now)
        if isinstance(message, p.Refused):
            if self.state == CALLING:
                self.state, self.reason, self._next_at = REFUSED, message.reason, None
            return Step([], [message])
        if not is_ours:
            return Step([], [])
        self._hello = msgspec.structs.replace(self._hello, is_back=True)
        self.unacknowledged = self._link.kept
        return Step(self.start(now), [message])

    def tick(self, now: float) -> list[Packet]:
        """Repeat the hello, or send a heartbeat."""
        if self._next_at is None or now < self._next_at:
            return []
        if self.state == CALLING:
            return self.start(now)
        self._next_at = now + self._heartbeat_interval
        return [self._link.wrap(p.Heartbeat())]

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        return self._next_at

    def _welcome(self, message: p.Welcome, now: float) -> Step:
        self.heard_at = now
        if self.state == JOINED:
            return Step([], [])  # the answer to a repeated hello
        self.state = JOINED
        self._link = Link(message.token)
        self._heartbeat_interval = message.heartbeat_interval
        self._next_at = now + message.heartbeat_interval
        return Step([], [message])

    def __repr__(self) -> str:
        return f"<Dialer {self.state} | {self._link.unacknowledged} unacknowledged>"
