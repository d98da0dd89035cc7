"""Who is alive: how long silence may last, and what a stall of one's own means.

Rules
    1. Any message is a sign of life; a heartbeat is what is sent when there is no other.
    2. Only silence is measured, on this side's monotonic clock;
       no times are compared between hosts.
    3. Whoever has slept itself may not call others dead for it:
       after a stall all silences begin anew (amnesty).
    4. A large message is announced, because nothing else is heard until it is there: for as long as
       a slow connection takes for it, silence is excused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

STALL_SECONDS = 3.0
ANNOUNCED_BYTES = 1 << 20  # a message from this size on is announced
RATE_MIN = (
    1 << 20
)  # bytes a second; on a slower connection a large message may cost its sender the session

K = TypeVar("K", bound=Hashable)


class Timings(NamedTuple):
    """Seconds; the defaults are DESIGN's, tests divide all of them by one number."""

    heartbeat_interval: float = 1.0
    suspect_after: float = 5.0
    lost_after: float = 15.0
    grace: float = 2.0  # after a connection was seen to close
    client_lost_after: float = 30.0
    client_grace: float = 10.0
    # In which workers come back to a new broker before it gives out what they may hold
    recovery: float = 3.0


class Silence(Generic[K]):
    """How long each of a set of peers has been silent, for one limit that all of them share.

    Sorted by construction: who was heard last stands last, so the next to expire stands first.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._heard: OrderedDict[K, float] = OrderedDict()
        self._excused: dict[K, float] = {}  # until when

    def heard(self, peer: K, now: float) -> bool:
        """The peer has shown life, or begins to be watched: whether it does."""
        is_new = peer not in self._heard
        self._heard[peer] = now
        self._heard.move_to_end(peer)
        if self._excused:
            self._excused.pop(peer, None)
        return is_new

    def excuse(self, peer: K, until: float) -> None:
        """The peer may be silent for longer this once: what it sends takes its time."""
        if peer in self._heard:
            self._excused[peer] = until

    def forget(self, peer: K) -> None:
        """The peer is watched no more."""
        self._heard.pop(peer, None)
        self._excused.pop(peer, None)

    def expired(self, now: float) -> list[K]:
        """Those whose silence has reached the limit, and is not excused;
        they are watched no more.
        """
        due = []
        for peer, at in self._heard.items():
            if now < at + self.limit:  # exactly what `next_deadline` says, rounding included
                break
            due.append(peer)
        if not due:
            return due
        gone = [peer for peer in due if self._excused.get(peer, now) <= now]
        for peer in gone:
            self.forget(peer)
        for peer in due:
            if peer in self._heard:  # excused, so it is looked at again a limit later
                self._heard[peer] = now
                self._heard.move_to_end(peer)
        return gone

    def amnesty(self, now: float) -> None:
        """All silences begin anew."""
        for peer in self._heard:
            self._heard[peer] = now

    def next_deadline(self) -> float | None:
        """When the first silence reaches the limit."""
        for at in self._heard.values():
            return at + self.limit
        return None

    def __contains__(self, peer: K) -> bool:
        return peer in self._heard
