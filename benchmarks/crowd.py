"""A broker's cores with thousands of simulated sessions, in one thread and in time of their own.

What is said crosses the codec in both directions, and each peer has the real session of its side
(`core.dialer`). Broker and peers take turns: in a turn all that was sent is handled. Only the
broker's turns are measured, in CPU time of this process. Garbage is collected in the peers' turns:
most of what it would look at, peers and messages under way, is not in a broker's memory.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable
from time import process_time
from typing import Any

from achilles.core import protocol as p
from achilles.core.budget import UNLIMITED
from achilles.core.dialer import JOINED, Dialer
from achilles.core.link import Frames, Packet, encoded
from achilles.core.liveness import Timings
from achilles.core.scheduler import Scheduler
from achilles.core.sessions import CLIENT, WORKER, Send, Sessions
from benchmarks.fakes import Answerer, Asker, Load, hello

# Of the simulated time; none of the measured loads lasts until a heartbeat is due
TURN_SECONDS = 1e-5
TICK_SECONDS = 0.1  # as in net.broker
SUBMITTED_TOGETHER = 1000
WARM_TURNS = 4


class Peer:
    """One session from its own side."""

    def __init__(self, route: int, role: str, speaker: Asker | Answerer) -> None:
        self.route = route
        self.roles = frozenset({role})
        self.dialer = Dialer(hello(role, f"{role}-{route}"))
        self.speaker = speaker

    def receive(self, frames: Frames, now: float) -> list[Packet]:
        """Take in a message; the answers."""
        step = self.dialer.receive(Packet(*p.decode(frames)), now)
        said = [one for message in step.messages for one in self.speaker.answer(message)]
        return [*step.packets, *self.dialer.send(said)]


class Crowd:
    """One broker, ``workers`` workers of one slot each, ``clients`` clients.
    ``cpu`` counts the broker's seconds.
    """

    def __init__(self, workers: int, *, clients: int = 1) -> None:
        self.now = 0.0
        self.cpu = 0.0
        self._tick_at = 0.0
        self._turns: deque[tuple[Peer, Frames]] = deque()  # on their way to the broker
        self._tokens = 0
        self._next_client = 0
        scheduler = Scheduler(now=self.now)
        limits = UNLIMITED._replace(sessions=workers + clients)
        self.sessions = Sessions(
            scheduler,
            epoch=bytes(16),
            timings=Timings(),
            credit=0,
            limits=limits,
            now=self.now,
        )
        self.peers: list[Peer] = []
        self.clients: list[tuple[Peer, Asker]] = []
        for _ in range(clients):
            asker = Asker()
            self.clients.append((self._add(CLIENT, asker), asker))
        self.settle()
        cpu = self.cpu
        for _ in range(workers):
            self._add(WORKER, Answerer())
        self.settle()
        self.join_cpu = (self.cpu - cpu) / workers  # seconds a worker
        absent = sum(peer.dialer.state != JOINED for peer in self.peers)
        if absent:
            raise RuntimeError(f"{absent} sessions did not begin")

    def _add(self, role: str, speaker: Asker | Answerer) -> Peer:
        peer = Peer(len(self.peers), role, speaker)
        self.peers.append(peer)
        self._send(peer, peer.dialer.start(self.now))
        return peer

    def _send(self, peer: Peer, packets: Iterable[Packet]) -> None:
        for packet in packets:
            self._turns.extend((peer, frames) for frames in encoded(packet))

    # --- Turns ------------------------------------------------------------------------------------

    def turn(self) -> None:
        """The broker handles what was sent to it, then the peers what it sends."""
        self.now += TURN_SECONDS
        for peer, frames in self._broker():
            self._send(peer, peer.receive(frames, self.now))

    def settle(self) -> None:
        """Take turns until nobody has anything to say."""
        while self._turns:
            self.turn()

    def _broker(self) -> list[tuple[Peer, Frames]]:
        inbox, self._turns = self._turns, deque()
        sessions, peers, now = self.sessions, self.peers, self.now
        out: list[tuple[Peer, Frames]] = []

        def transmit(sends: list[Send]) -> None:
            route: Any  # an index, as given to the sessions
            for route, packet in sends:
                peer = peers[route]
                out.extend((peer, frames) for frames in encoded(packet))

        gc.disable()
        began = process_time()
        for peer, frames in inbox:
            packet = Packet(*p.decode(frames))
            token = self._token() if packet.header.token == p.NO_TOKEN else p.NO_TOKEN
            transmit(sessions.receive(peer.route, peer.roles, packet, now, token))
        due = sessions.scheduler.next_deadline()
        if now >= self._tick_at or (due is not None and now >= due):
            self._tick_at = now + TICK_SECONDS
            transmit(sessions.tick(now))
        self.cpu += process_time() - began
        gc.enable()
        sessions.events.clear()
        return out

    def _token(self) -> bytes:
        self._tokens += 1
        return self._tokens.to_bytes(16, "big")

    # --- Loads ------------------------------------------------------------------------------------

    def submit(self, load: Load, count: int) -> None:
        """Have the clients in turn submit so many tasks;
        the broker takes them in with the next turn.
        """
        while count > 0:
            size = min(count, SUBMITTED_TOGETHER, -(-count // len(self.clients)))
            peer, asker = self.clients[self._next_client % len(self.clients)]
            self._next_client += 1
            self._send(peer, peer.dialer.send(asker.ask(load, size)))
            count -= size

    def run(self, load: Load, tasks: int, queue: int) -> float:
        """The broker's CPU seconds a task, in so many,
        while ``queue`` tasks have no result at any time.

        Raises:
            WrongResult: a result was wrong, or there were two.
        """
        self.submit(load, queue - self.open)
        for _ in range(WARM_TURNS):
            self.turn()  # durations are known from here on, and workers have what they can
            self.submit(load, queue - self.open)
        began, cpu = self.done, self.cpu
        while self.done - began < tasks:
            self.turn()
            self.submit(load, queue - self.open)
        return (self.cpu - cpu) / (self.done - began)

    @property
    def done(self) -> int:
        """How many tasks have had their right result."""
        return sum(asker.done for _, asker in self.clients)

    @property
    def open(self) -> int:
        """How many tasks have no result yet."""
        return sum(len(asker.open) for _, asker in self.clients)

    def idle(self, seconds: float) -> float:
        """The broker's share of a core while nothing is to be done,
        for so long in simulated time.
        """
        cpu, end = self.cpu, self.now + seconds
        began = self.now
        while self.now < end:
            self.now += TICK_SECONDS - TURN_SECONDS
            for peer in self.peers:
                self._send(peer, peer.dialer.tick(self.now))
            self.turn()
        return (self.cpu - cpu) / (self.now - began)
