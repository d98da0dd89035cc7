"""A bench for the broker's sessions, with the other ends of their links."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from achilles.core import protocol as p
from achilles.core.link import Link, Packet
from achilles.core.liveness import Timings
from achilles.core.scheduler import Scheduler
from achilles.core.sessions import Sessions
from tests.unit.core.bench import Bench, crossed_packet

EPOCH = b"e" * 16
TIMINGS = Timings()
ROLES = ("client", "worker", "admin")
BEAT = p.Heartbeat()


class Peer:
    """The other end of a session: where its connection is, and its link once it was welcomed."""

    def __init__(self, name: str, role: str, python: str, is_back: bool) -> None:
        self.route: Hashable = name
        self.link = Link(p.NO_TOKEN)
        incarnation = name.encode().ljust(16)
        self.hello: p.ClientHello | p.WorkerHello
        if role == "worker":
            self.hello = p.WorkerHello(
                incarnation, "0", python, name, slots=1, pid=42, is_back=is_back
            )
        else:
            self.hello = p.ClientHello(incarnation, role, "0", python, name, is_back=is_back)


class SessionsBench(Bench):
    """A broker's sessions; every message that a peer gets goes through its link."""

    core: Sessions

    def __init__(self, *, credit: int = 0) -> None:
        self.credit = credit
        self.scheduler = Scheduler(credit=credit, now=100.0, epoch=2)
        core = Sessions(self.scheduler, epoch=EPOCH, timings=TIMINGS, credit=credit, now=100.0)
        super().__init__(core)
        self.peers: list[Peer] = []
        self.headers: list[p.Header] = []  # of what the last step sent
        self._tokens = 0

    def step(self, sends: Any) -> None:
        packets = [(to, crossed_packet(packet)) for to, packet in sends]
        self.headers = [packet.header for _, packet in packets]
        super().step([(to, packet.message) for to, packet in packets])
        for to, packet in packets:
            for peer in self.peers:
                if peer.route == to:
                    self._arrive(peer, packet)

    def _arrive(self, peer: Peer, packet: Packet) -> None:
        if isinstance(packet.message, p.Welcome):
            if peer.link.token != packet.message.token:
                peer.link = Link(packet.message.token)
        elif packet.header.token == peer.link.token != p.NO_TOKEN:
            if not isinstance(packet.message, p.Gone):
                peer.link.receive(packet, self.now)

    def peer(
        self, name: str, role: str = "client", python: str = "3.11", is_back: bool = False
    ) -> Peer:
        """A peer that has not said hello yet."""
        self.peers.append(Peer(name, role, python, is_back))
        return self.peers[-1]

    def hello(self, peer: Peer, *roles: str) -> None:
        """A hello on a route that may speak for ``roles``; for any, if none is given."""
        self.take(peer.route, Packet(p.Header(p.NO_TOKEN, 0, 0), peer.hello), *roles)

    def join(self, name: str, role: str = "client", *, is_back: bool = False) -> Peer:
        """A peer that has joined, and seen what it was told."""
        peer = self.peer(name, role, is_back=is_back)
        self.hello(peer)
        assert self.sent()[0] == (name, self.welcome(peer))
        return peer

    def welcome(self, peer: Peer) -> p.Welcome:
        """The welcome to the peer's session."""
        return p.Welcome(
            token=peer.link.token,
            epoch=EPOCH,
            name=peer.hello.name,
            credit=self.credit,
            heartbeat_interval=TIMINGS.heartbeat_interval,
            lost_after=TIMINGS.lost_after,
        )

    def say(self, peer: Peer, message: p.Wire, *roles: str) -> None:
        """A message of the peer's session."""
        self.take(peer.route, peer.link.wrap(message), *roles)

    def take(self, route: Hashable, packet: Packet, *roles: str) -> None:
        """A packet on a route."""
        self._tokens += 1
        token = b"token%011d" % self._tokens
        arrived = crossed_packet(packet)
        self.step(self.core.receive(route, frozenset(roles or ROLES), arrived, self.now, token))

    def wait(self, seconds: float) -> None:
        """Time passes, and the broker ticks often enough;
        nothing may be sent but at the very end.
        """
        end = self.now + seconds
        while self.now < end:
            self.tick(min(1.0, end - self.now))

    def lose(self, peer: Peer, seconds: float) -> None:
        """A peer is silent for so long; all others are heard."""
        end = self.now + seconds
        while self.now < end:
            for other in self.peers:
                if other is not peer:
                    self.say(other, BEAT)
                    assert self.sent() == [(other.route, BEAT)]
            self.tick(min(1.0, end - self.now))


def cut(peer: Peer, reason: str) -> list[tuple[Hashable, Any]]:
    """What a peer is told that broke the protocol."""
    return [(peer.route, p.Refused(reason=reason)), (peer.route, p.Gone())]


def submit(*ids: int, fn: int = 0) -> p.Submit:
    """Tasks without blobs."""
    return p.Submit(fn=fn, init=0, ids=list(ids), payloads=[b"%d" % id for id in ids])
