"""A session's two directions: every message arrives once and in order, or the session ends.

Rules
    1. Messages that matter are numbered from 1, in each direction for itself,
       and kept until acknowledged.
    2. Each header acknowledges what its sender has received without a gap.
    3. Whoever sees a gap asks once for a resend
       (`Resync`); everything from the gap on is sent again.
    4. Heartbeats are not numbered; they tell the last number sent,
       so that a lost tail shows as a gap too.

Why: ZeroMQ drops messages on every reconnect, at the high-water mark, and for peers it does not
know, and says nothing. With this the cores above see a channel that only ever ends,
never one with holes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from achilles.core import protocol as p
from achilles.core.liveness import ANNOUNCED_BYTES
from achilles.errors import ProtocolError

UNACKED_MAX = 32  # received messages without an answer, after which an acknowledgement is sent
RESYNC_INTERVAL = 0.5

_UNNUMBERED = frozenset(
    {p.Heartbeat, p.Resync, p.ClientHello, p.WorkerHello, p.Welcome, p.Refused, p.Gone}
)


Frames: TypeAlias = Sequence[p.Buffer]
Fold: TypeAlias = Callable[[Frames], Frames]


class Packet(NamedTuple):
    """A message with its header, as it goes to the codec."""

    header: p.Header
    message: p.Wire


def _in_full(frames: Frames) -> Frames:
    return frames


def encoded(packet: Packet, fold: Fold = _in_full) -> list[Frames]:
    """The packet's frames, of which ``fold`` makes what travels; before those of a large one, those
    of a heartbeat that announces it.

    That one tells of no message sent that its receiver could not have yet, so that it shows no gap.
    """
    frames: Frames = p.encode(*packet)
    if len(frames) > 1:
        frames = fold(frames)
    if len(frames) == 1:
        return [frames]
    size = sum(memoryview(frame).nbytes for frame in frames)
    if size < ANNOUNCED_BYTES:
        return [frames]
    header = packet.header
    before = p.Header(header.token, header.seq - 1, header.ack)
    return [p.encode(before, p.Heartbeat(min(size, p.COMING_MAX))), frames]


class Link:
    """One side of a session."""

    __slots__ = (
        *("_acked", "_asked_at", "_asked_for", "_kept", "_resent_at", "_resent_for"),
        *("received", "sent", "token"),
    )

    def __init__(self, token: bytes) -> None:
        self.token = token
        self.sent = 0
        self.received = 0
        self._acked = 0  # the last acknowledgement that we sent
        self._kept: deque[Packet] = deque()
        self._asked_for = -1
        self._asked_at = 0.0
        self._resent_for = -1
        self._resent_at = 0.0

    def wrap(self, message: p.Wire) -> Packet:
        """The message ready to be sent; numbered and kept if it is one that matters."""
        self._acked = self.received
        if type(message) in _UNNUMBERED:
            return Packet(p.Header(self.token, self.sent, self.received), message)
        self.sent += 1
        packet = Packet(p.Header(self.token, self.sent, self.received), message)
        self._kept.append(packet)
        return packet

    def receive(self, packet: Packet, now: float) -> tuple[bool, list[Packet]]:
        """Whether the message is to be handled, and what to send in answer.

        Raises:
            ProtocolError: it acknowledges what was never sent.
        """
        header, message = packet
        if header.ack > self.sent:
            raise ProtocolError(f"message {header.ack} is acknowledged; {self.sent} were sent")
        kept = self._kept
        while kept and kept[0].header.seq <= header.ack:
            kept.popleft()
        if type(message) is p.Resync:
            return False, self._resend(header.ack, now)
        if type(message) in _UNNUMBERED:
            return True, self._ask(now) if header.seq > self.received else []
        if header.seq == self.received + 1:
            self.received += 1
            is_due = self.received - self._acked >= UNACKED_MAX
            return True, [self.wrap(p.Heartbeat())] if is_due else []
        return False, self._ask(now) if header.seq > self.received else []

    @property
    def unacknowledged(self) -> int:
        """How many messages are kept for a resend."""
        return len(self._kept)

    @property
    def kept(self) -> list[p.Wire]:
        """The messages that are not known to have arrived."""
        return [packet.message for packet in self._kept]

    def _resend(self, ack: int, now: float) -> list[Packet]:
        """All that is kept; but not for who asks for the same more often than `_ask` does."""
        if self._resent_for == ack and now - self._resent_at < RESYNC_INTERVAL / 2:
            return []
        self._resent_for, self._resent_at = ack, now
        self._acked = self.received
        return [
            Packet(p.Header(self.token, packet.header.seq, self.received), packet.message)
            for packet in self._kept
        ]

    def _ask(self, now: float) -> list[Packet]:
        """Ask for a resend, unless that was just done."""
        if self._asked_for == self.received and now - self._asked_at < RESYNC_INTERVAL:
            return []
        self._asked_for, self._asked_at = self.received, now
        return [self.wrap(p.Resync())]
