"""A whole cluster in virtual time: the real cores at every end, a network and runners that are not.

    Submission + Dialer  ══ network ══  Sessions + Scheduler  ══ network ══  Dialer + Agent ── Host (runners)

Everything that happens is a thunk in one heap, ordered by time and then by number. All chance comes
from streams that are seeded by the seed and the stream's name.
Every message crosses the codec on its way.
"""

from __future__ import annotations

import heapq
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from achilles.core import protocol as p
from achilles.core.link import Packet
from achilles.core.runners import START_SECONDS
from achilles.errors import ProtocolError
from tests.sim.clients import Client
from tests.sim.hostile import Hostile
from tests.sim.nodes import Broker, Connection, Frames, Node, Peer, Worker
from tests.sim.oracle import Oracle, Violation
from tests.sim.plan import PROMPT, Plan
from tests.sim.runners import IdleWatch

STEPS_MAX = 400_000
CODEC_STRIDE = 32  # every so many messages are encoded twice
RECONNECT_SECONDS = (0.02, 1.0)
DELAY_MAX = 6.0
# Of the runs whose hosts have too much to do; their clocks would end tasks early
CROWDED_SHARE = 0.25
WAKES = (0.0, 0.0, 0.005, 0.02, 0.08)  # how late a runner without work is there
BEHIND_SECONDS = 0.03  # that something may wait behind a task while a slot is free, anywhere


class World:
    """One simulated run. ``stride``: cores with much state are checked after so many steps each."""

    def __init__(
        self, plan: Plan, *, stride: int, log: Callable[[str], None] | None = None
    ) -> None:
        self.plan = plan
        self.now = 0.0
        self.marks: Counter[str] = Counter()  # what happened how often
        self.oracle = Oracle(
            self.marks,
            plan.losses_max,
            is_exact=plan.is_sound,
            is_prompt="worker-pause" not in plan.kinds,
        )
        self.trace = 0  # a checksum of every message and its time
        self.steps = 0
        self.is_healed = False
        self.drop = 0.0  # the share of messages that the network loses
        self.slowness = 1.0
        self._log = log
        self._stride = stride
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._pushed = self._sent = 0
        self._tokens = 0
        self._network = plan.stream("network")
        self._spawning = plan.stream("runners")
        self._waking = plan.stream("wakes")
        self._is_crowded = not plan.has_timeouts and self._waking.random() < CROWDED_SHARE
        self._routes: dict[int, Connection] = {}
        self._route = 0
        self.hostile: Hostile | None = None
        self.watch: IdleWatch | None = None
        if plan.is_calm and not plan.has_tags:
            slack = 3 * plan.round_trip
            self.watch = IdleWatch(BEHIND_SECONDS + slack, START_SECONDS + slack)
        self._broker_number = 1
        self.broker = Broker(self, 1, frozenset())
        self.clients = [Client(self, n, slots_max) for n, slots_max in enumerate(plan.clients)]
        self.workers = [Worker(self, n, 1) for n in range(len(plan.workers))]

    @property
    def is_prompt(self) -> bool:
        """Whether each worker should be back with a new broker within its time for that."""
        return self.plan.kinds <= PROMPT and self.plan.scale == 1 and self.plan.delay <= 0.01

    # --- Time -------------------------------------------------------------------------------------

    def at(self, time: float, function: Callable[[Any], None], argument: Any) -> None:
        """Have something happen."""
        self._pushed += 1
        heapq.heappush(self._heap, (time, self._pushed, function, argument))

    def run_until(self, time: float) -> None:
        """Let everything happen that happens before that moment."""
        heap = self._heap
        while heap and heap[0][0] <= time:
            self.now, _, function, argument = heapq.heappop(heap)
            function(argument)
        self.now = time

    def count_step(self, node: Node) -> None:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Violation("no circles", f"{STEPS_MAX} steps")
        if node.is_cheap or self.steps % self._stride == 0:
            node.check()

    # --- Chance -----------------------------------------------------------------------------------

    def fresh_token(self) -> bytes:
        self._tokens += 1
        return self._tokens.to_bytes(16, "big")

    def wake_seconds(self) -> float:
        """How long a runner without work takes to begin with what it is given."""
        return self._waking.choice(WAKES) if self._is_crowded else 0.0

    def spawn_seconds(self) -> float:
        return self.plan.spawn_seconds * (0.5 + self._spawning.random())

    def _delay(self, connection: Connection) -> float:
        mean = self.plan.delay * self.slowness * connection.factor
        return min(self._network.expovariate(1.0) * mean, 4 * mean, DELAY_MAX / self.plan.scale)

    # --- The network ------------------------------------------------------------------------------

    def connect(self, peer: Peer) -> None:
        """A new connection of the peer, which it may or may not be told of."""
        if not peer.is_up or peer.connection is not None:
            return
        if not self.broker.is_up:
            self.at(self.now + self._reconnect_seconds(), self.connect, peer)
            return
        self._route += 1
        factor = (
            1.0
            if self.plan.is_sound or self.plan.is_calm
            else self._network.choice((1.0, 1.0, 3.0))
        )
        peer.connection = self._routes[self._route] = Connection(self._route, peer, factor)
        if self._network.random() < 0.85:
            peer.deliver(peer.on_connected, None)
        else:
            self.marks["fault: a connection that the peer does not see"] += 1

    def cut(self, peer: Peer, *, reconnect: bool = True) -> None:
        """The peer's connection breaks. What is under way is lost, or a part of it comes late."""
        connection = peer.connection
        if connection is None:
            return
        peer.connection = None
        connection.is_open = False
        chance = self._network
        if chance.random() < 0.3:
            late = chance.choice((4 * self.plan.delay, 2.0 / self.plan.scale))
            connection.late_until = self.now + chance.random() * late
            self.marks["fault: a cut lets a part through"] += 1
        if chance.random() < 0.75:
            noticed_at = self.now + chance.expovariate(1.0) * 0.2
            self.at(noticed_at, self._notice_close, (self.broker, connection.route))
        else:
            self.marks["fault: a cut that the broker does not see"] += 1
        if reconnect:
            self.at(self.now + self._reconnect_seconds(), self.connect, peer)

    def _reconnect_seconds(self) -> float:
        return self._network.uniform(*RECONNECT_SECONDS)

    def linger(self, peer: Peer) -> None:
        """The peer ends; what it has sent arrives."""
        connection = peer.connection
        peer.die()
        if connection is not None:
            connection.late_until = connection.up_at

    def _notice_close(self, what: tuple[Broker, int]) -> None:
        broker, route = what
        broker.deliver(broker.on_closed, route)

    def send_up(self, connection: Connection | None, packet: Packet) -> None:
        """From a peer to the broker."""
        frames = self._encode(packet)
        if connection is not None:
            self.send_frames(connection, frames)

    def send_frames(self, connection: Connection, frames: Frames) -> None:
        """The same of what may be no message at all."""
        if connection.up_mute_until > self.now or self._is_dropped():
            return
        connection.up_at = max(connection.up_at, self.now + self._delay(connection))
        self.at(connection.up_at, self._arrive_up, (connection, frames, self.broker))

    def send_down(self, route: int, packet: Packet) -> None:
        """From the broker to a peer."""
        frames = self._encode(packet)
        connection = self._routes[route]
        if not connection.is_open or connection.down_mute_until > self.now or self._is_dropped():
            return
        connection.down_at = max(connection.down_at, self.now + self._delay(connection))
        self.at(connection.down_at, self._arrive_down, (connection, frames))

    def _encode(self, packet: Packet) -> Frames:
        frames = p.encode(*packet)
        self._sent += 1
        if self._sent % CODEC_STRIDE == 0:
            again = p.encode(*p.decode(frames))
            if b"".join(again) != b"".join(frames):
                raise Violation("codec", f"{packet} is another message on the other side")
        return frames

    def _is_dropped(self) -> bool:
        if not self.drop or self._network.random() >= self.drop:
            return False
        self.marks["fault: a message is dropped"] += 1
        return True

    def _arrive_up(self, what: tuple[Connection, Frames, Broker]) -> None:
        connection, frames, broker = what
        if (connection.is_open or self.now <= connection.late_until) and broker.is_up:
            self._note("▲", connection, frames)
            broker.deliver(broker.on_frames, (connection, frames))

    def _arrive_down(self, what: tuple[Connection, Frames]) -> None:
        connection, frames = what
        if connection.is_open or self.now <= connection.late_until:
            self._note("▼", connection, frames)
            connection.peer.deliver(connection.peer.on_frames, (connection, frames))

    def _note(self, direction: str, connection: Connection, frames: Frames) -> None:
        self.trace = zlib.crc32(frames[0], zlib.crc32(_TIME.pack(self.now), self.trace))
        if not connection.is_open:
            self.marks["fault: a message comes after its connection"] += 1
        if self._log:
            try:
                header, message = p.decode(frames)
            except ProtocolError as error:
                self.note(f"{direction} {connection.peer.name} {error}")
                return
            where = f"{connection.peer.name} #{connection.route}"
            self._log(
                f"{self.now:10.4f} {direction} {where} {header.seq}/{header.ack} {str(message)[:300]}"
            )

    def fault(self, site: str, where: str = "") -> None:
        """Something goes wrong; ``site`` is one of those in `tests.sim.coverage`."""
        self.marks[f"fault: {site}"] += 1
        self.note(f"{site} {where}")

    def note(self, text: str) -> None:
        """Say in the log what happens."""
        if self._log:
            self._log(f"{self.now:10.4f} * {text}")

    # --- What befalls processes -------------------------------------------------------------------

    def misbehave(self, chance: random.Random) -> None:
        """A hostile peer comes, or does its worst."""
        if self.hostile is None:
            self.hostile = Hostile(self, len(self.plan.clients))
            self.hostile.start()
        else:
            self.hostile.deliver(self.hostile.misbehave, chance)

    def restart_worker(self, worker: Worker) -> None:
        """A new process in the place of one that is gone."""
        if self.workers[worker.number] is worker:
            new = Worker(self, worker.number, worker.life + 1)
            self.workers[worker.number] = new
            new.start()

    def kill_broker(self) -> None:
        """The broker is gone, with all that it knew."""
        if not self.broker.is_up:
            return
        self.broker.is_up = False
        workers = [worker for worker in self.workers if worker.is_up]
        places = [place for worker in workers for place in worker.places()]
        places += self.broker.places()
        self.oracle.broker_lost(
            truth
            for worker in workers
            for truth in worker.note_held()
            if all(number == worker.stable_number for one, number in places if one is truth)
        )
        for peer in [*self.clients, *self.workers, *([self.hostile] if self.hostile else [])]:
            self.cut(peer)

    def restart_broker(self, _: None) -> None:
        if not self.broker.is_up:
            self._broker_number += 1
            known = self.broker.scheduler.workers if self.plan.is_supervised else None
            awaited = None if known is None else frozenset(known)
            self.broker = Broker(self, self._broker_number, awaited)
            if not self.broker.scheduler._recovery.is_open:
                self.broker.on_recovered()
            self.broker.after_step()

    def heal(self) -> None:
        """From here on nothing goes wrong any more."""
        self.is_healed = True
        self.drop = 0.0
        self.slowness = 1.0
        self.restart_broker(None)
        if self.hostile:
            self.hostile.die()
        for worker in list(self.workers):
            worker.host.is_black_hole = False
            if not worker.is_up:
                self.restart_worker(worker)
        for connection in self._routes.values():
            connection.up_mute_until = connection.down_mute_until = 0.0
        for node in [self.broker, *self.clients, *self.workers]:
            if node.paused_until > self.now:
                node.paused_until = self.now
                self.at(self.now, node.go_on, None)


_TIME = struct.Struct("<d")
