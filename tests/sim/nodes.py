"""The processes of a simulated cluster, each around its real cores as the shells in `achilles.net`
are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from achilles.core import protocol as p
from achilles.core import tables
from achilles.core.dialer import JOINED, Dialer
from achilles.core.link import Packet
from achilles.core.recovery import stable_number
from achilles.core.sessions import Send
from achilles.errors import ProtocolError
from tests.sim.oracle import (
    NEVER,
    Truth,
    Violation,
)
from tests.sim.runners import Host, Runner
from tests.sim.watch import WatchedAgent, WatchedScheduler, WatchedSessions

if TYPE_CHECKING:
    from tests.sim.world import World

Frames = list[p.Buffer]

NOT_FOR_CLIENTS = (p.Done, p.Returned, p.Crashed, p.Drain, p.Results, p.Run, p.Revoke, p.Shutdown)
AWAY_SECONDS = 5.0  # a worker that drains waits for another broker, as in `net.worker`
LOOP_SECONDS = 0.005  # from when a runner's end could be seen until the worker acts on it


class Connection:
    """A peer's connection to the broker: two FIFO directions, until it is cut."""

    __slots__ = (
        "down_at",
        "down_mute_until",
        "factor",
        "is_open",
        "late_until",
        "peer",
        "route",
        "up_at",
        "up_mute_until",
    )

    def __init__(self, route: int, peer: Peer, factor: float) -> None:
        self.route = route
        self.peer = peer
        self.factor = factor  # how much slower than the others
        self.is_open = True
        self.late_until = -1.0  # what was that far when it was cut still arrives
        self.up_at = 0.0
        self.down_at = 0.0
        self.up_mute_until = 0.0  # till then it loses what is sent
        self.down_mute_until = 0.0


class Node:
    """A process: it can be stopped for a while; what comes then is handled when it goes on."""

    is_cheap = False  # to be checked: it is, after each of its steps

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_up = True
        self.paused_until = 0.0
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._wake_at = NEVER

    def deliver(self, function: Callable[[Any], None], argument: Any) -> None:
        """Have the process handle something, now or when it goes on."""
        if not self.is_up:
            return
        if self.paused_until > self.world.now:
            self._inbox.append((function, argument))
            return
        function(argument)
        self.after_step()

    def pause(self, seconds: float) -> None:
        """Stop the process (SIGSTOP)."""
        if self.is_up and self.paused_until <= self.world.now:
            self.paused_until = self.world.now + seconds
            self.world.at(self.paused_until, self.go_on, None)

    def go_on(self, _: None) -> None:
        self.paused_until = 0.0
        while self._inbox and self.is_up:
            function, argument = self._inbox.popleft()
            function(argument)
            self.after_step()
        if self.is_up:
            self.tick()
            self.after_step()

    def after_step(self) -> None:
        """Check the core and set the timer."""
        self.world.count_step(self)
        self._wake_by(self.next_deadline())

    def _wake_by(self, deadline: float) -> None:
        if deadline < self._wake_at:
            self._wake_at = deadline
            self.world.at(deadline, self._wake, deadline)

    def _wake(self, deadline: float) -> None:
        if deadline != self._wake_at or not self.is_up:
            return  # an earlier timer was set meanwhile
        self._wake_at = NEVER
        if self.paused_until <= self.world.now:
            self.tick()
            following = self.next_deadline()
            if following <= self.world.now:
                raise Violation("timers", f"{self.name} wants to be woken in the past again")
            self.world.count_step(self)
            self._wake_by(following)

    def next_deadline(self) -> float:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class Broker(Node):
    """The broker's process; a restarted one is another."""

    def __init__(self, world: World, number: int, awaited: frozenset[int] | None) -> None:
        super().__init__(world, f"broker {number}")
        plan = world.plan
        scheduler = WatchedScheduler(
            credit=plan.credit,
            now=world.now,
            epoch=number,
            recovery=plan.timings.recovery,
            patience=plan.timings.client_lost_after,
            awaited=awaited,
            oracle=world.oracle,
            marks=world.marks,
            is_sound=plan.is_sound,
            on_recovered=self.on_recovered,
            on_left=self._on_left,
        )
        epoch = b"epoch" + number.to_bytes(11, "big")
        self.sessions = WatchedSessions(
            scheduler, epoch=epoch, timings=plan.timings, credit=plan.credit, now=world.now
        )
        self.sessions.watch(world.marks)
        self.scheduler = scheduler
        self._tick_at = world.now

    def on_recovered(self) -> None:
        """From here on, what is held by workers that are not back may run elsewhere."""
        back = {
            worker.number
            for worker in self.scheduler._workers.values()
            if not worker.is_returning and not worker.is_gone
        }
        for worker in self.world.workers:
            if worker.stable_number not in back and worker.is_up:
                worker.let_go_of_acknowledged()
                held = [truth for truth in worker.begun() if truth.is_held]
                if held and self.world.is_prompt:
                    raise Violation("back in time", f"{worker.name} is not back, and has {held[0]}")
                self.world.oracle.let_go(held, f"{worker.name} is not back")

    def _on_left(self, worker: tables.Worker) -> None:
        """A worker's session ended, perhaps before it had told all that it holds."""
        for one in self.world.workers:
            if one.stable_number == worker.number:
                self.world.oracle.let_go(one.begun(), f"{one.name} was given up")

    def on_frames(self, what: tuple[Connection, Frames]) -> None:
        connection, frames = what
        world = self.world
        refused = self.sessions.refused
        try:
            packet = Packet(*p.decode(frames))
        except ProtocolError as error:
            self.transmit(self.sessions.malformed(connection.route, str(error), world.now))
            self._refused(connection, str(error))
            return
        self._mark(packet)
        session = self.sessions._by_token.get(packet.header.token)
        is_wrong = session is not None and (
            packet.header.ack > session.link.sent
            or (session.role == "client" and isinstance(packet.message, NOT_FOR_CLIENTS))
        )
        token = world.fresh_token() if packet.header.token == p.NO_TOKEN else p.NO_TOKEN
        roles = connection.peer.roles
        sends = self.sessions.receive(connection.route, roles, packet, world.now, token)
        self.transmit(sends)
        self.transmit(self.sessions.tick(world.now))
        if self.sessions.refused > refused:
            self._refused(connection, str(sends[-3:]))
        if is_wrong and packet.header.token in self.sessions._by_token:
            raise Violation("a hostile peer is cut", f"{connection.peer.name} said {packet}")

    def _refused(self, connection: Connection, text: str) -> None:
        if not connection.peer.is_hostile:
            raise Violation("an honest peer is refused", text)
        self.world.marks["session: > refused"] += 1

    def _mark(self, packet: Packet) -> None:
        header, message = packet
        marks = self.world.marks
        session = self.sessions._by_token.get(header.token)
        if session is None:
            marks["peer: told that its session is gone"] += header.token != p.NO_TOKEN
        elif isinstance(message, p.Resync):
            marks["link: sends again"] += 1
        elif isinstance(message, p.Heartbeat):
            marks["link: misses the last message"] += header.seq > session.link.received
        else:
            marks["link: gets a message twice"] += header.seq <= session.link.received
            marks["link: misses a message"] += header.seq > session.link.received + 1

    def on_closed(self, route: int) -> None:
        self.sessions.closed(route, self.world.now)

    def tick(self) -> None:
        """The real loop ticks at least once a second."""
        self._tick_at = self.world.now + self.world.plan.timings.heartbeat_interval
        self.transmit(self.sessions.tick(self.world.now))

    def next_deadline(self) -> float:
        deadline = self.sessions.next_deadline()
        return self._tick_at if deadline is None else min(deadline, self._tick_at)

    def transmit(self, sends: Iterable[Send]) -> None:
        for route, packet in sends:
            assert isinstance(route, int)
            self.world.send_down(route, packet)

    def check(self) -> None:
        self.sessions.check_invariants()
        for client in self.scheduler._clients.values():
            leases = client.running + client.prefetched - self._adopted(client)
            if 0 < client.slots_max < leases:
                text = f"{client.name} holds {leases} of {client.slots_max} slots"
                raise Violation("slots_max", text)

    def places(self) -> list[tuple[Truth, int]]:
        """Each leased task, and the number of the worker that has it."""
        oracle = self.world.oracle
        return [
            (oracle.tasks[oracle.numbers[lease.client.number], task.id], worker.number)
            for worker in self.scheduler._workers.values()
            for lease in worker.leases.values()
            for task in lease.tasks
            if task is not None
        ]

    def _adopted(self, client: tables.Client) -> int:
        workers = self.scheduler._workers.values()
        leases = [lease for worker in workers for lease in worker.leases.values()]
        is_own = self.scheduler._dispatcher.is_own
        return sum(one.client is client and not is_own(one.number) for one in leases)


class Peer(Node):
    """A client's or a worker's process, with a session."""

    is_hostile = False

    def __init__(self, world: World, name: str, hello: p.ClientHello | p.WorkerHello) -> None:
        super().__init__(world, name)
        self.dialer = Dialer(hello)
        self.connection: Connection | None = None
        self.is_wanted = True  # it is not leaving
        is_worker = isinstance(hello, p.WorkerHello)
        self.roles = frozenset({"worker" if is_worker else "client"})

    def start(self) -> None:
        self.world.connect(self)
        self.transmit(self.dialer.start(self.world.now))
        self.after_step()

    def on_connected(self, _: None) -> None:
        self.transmit(self.dialer.connected(self.world.now))

    def on_frames(self, what: tuple[Connection, Frames]) -> None:
        was_joined = self.dialer.state == JOINED
        step = self.dialer.receive(Packet(*p.decode(what[1])), self.world.now)
        self.transmit(step.packets)
        is_joined = self.dialer.state == JOINED
        if was_joined != is_joined:
            self.world.marks[
                "peer: joined > calling" if was_joined else "peer: calling > joined"
            ] += 1
        for message in step.messages:
            self.on_message(message)
        self.act()

    def tick(self) -> None:
        self.act()
        self.transmit(self.dialer.tick(self.world.now))

    def next_deadline(self) -> float:
        deadline = self.dialer.next_deadline()
        return NEVER if deadline is None else deadline

    def transmit(self, packets: Iterable[Packet]) -> None:
        for packet in packets:
            self.world.send_up(self.connection, packet)

    def on_message(self, message: p.Wire) -> None:
        raise NotImplementedError

    def act(self) -> None:
        """Hand on what the core above has given out."""
        raise NotImplementedError

    def die(self) -> None:
        """The process is gone (SIGKILL)."""
        self.is_up = False
        self._inbox.clear()
        self.world.cut(self, reconnect=False)


class Worker(Peer):
    """A worker's process and its runners."""

    is_cheap = True

    def __init__(self, world: World, number: int, life: int) -> None:
        name = f"worker-{number}.{life}"
        slots = world.plan.workers[number]
        self.tags = world.plan.tags[number]
        hello = p.WorkerHello(
            world.fresh_token(), "0", "3.11", name, slots, 1000 + number, list(self.tags)
        )
        super().__init__(world, name, hello)
        self.number = number
        self.life = life
        self.is_draining = False
        self.agent = WatchedAgent(slots, tasks_max=world.plan.tasks_max)
        self.agent.marks = world.marks
        self.host = Host(
            name,
            slots,
            world.oracle,
            clock=lambda: world.now,
            timer=self._set_timer,
            notify=lambda runner: self.deliver(self.on_runner, runner),
            spawn_seconds=world.spawn_seconds,
            wake_seconds=world.wake_seconds,
            watch=world.watch,
        )
        self.host.is_present = lambda: self.agent._epoch == world.broker.sessions._epoch
        self._sends: list[Any] = []
        self._runs: dict[int, list[Truth]] = {}
        self.stable_number = stable_number(hello.incarnation)
        self.away_at = 0.0
        self._sent: list[p.Done] = []
        self._events: list[p.RunnerEvent] = []

    def _set_timer(self, seconds: float, function: Callable[[Any], None], argument: Any) -> None:
        self.world.at(self.world.now + seconds, self._on_timer, (function, argument))

    def _on_timer(self, what: tuple[Callable[[Any], None], Any]) -> None:
        if self.is_up:  # runners run on while the worker is stopped
            what[0](what[1])

    def on_runner(self, runner: Runner) -> None:
        """A runner's channel is ready. Before its events are handled,
        a message of the broker may be.
        """
        is_end = runner.is_dead and not self.world.plan.is_calm
        self._events += self.host.collect(runner)
        if is_end:
            self.world.at(self.world.now + LOOP_SECONDS, self._on_loop, None)
        else:
            self.act()

    def _on_loop(self, _: None) -> None:
        self.deliver(lambda _: self.act(), None)

    def on_message(self, message: p.Wire) -> None:
        match message:
            case p.Welcome(epoch=epoch):
                self._join(epoch)
            case p.Gone():
                self.away_at = self.world.now
                self.let_go_of_acknowledged()
                self.agent.hold(self.dialer.unacknowledged, self.world.now)
            case p.Run(lease=lease):
                if lease in self._runs:
                    raise Violation("fresh lease", f"{self.name} got lease {lease} twice")
                self._runs[lease] = list(map(self.world.oracle.of_payload, message.payloads))
                self._sends += self.agent.receive(message, self.world.now)
            case p.Revoke() | p.Blob() | p.Forget() | p.Drain():
                self._sends += self.agent.receive(message, self.world.now)
            case _:
                raise Violation("role", f"{self.name} got {message}")

    def _join(self, epoch: bytes) -> None:
        unsent = [message for to, message in self._sends if to == "broker"]
        self.agent.hold(unsent, self.world.now)
        self._sends = [send for send in self._sends if send[0] != "broker"]
        if epoch == self.agent._epoch:
            self.world.oracle.let_go(self.begun(), f"{self.name} was given up")
            for runner in self.host.runners.values():
                runner.is_written_off = True
        sends = self.agent.join(epoch, self.world.now)
        told: list[Any] = [message for to, message in sends if to == "broker"]
        self.transmit(self.dialer.send(told))
        self._sends += [send for send in sends if send.to == "host"]

    def begun(self) -> list[Truth]:
        """The tasks that run here, and those whose values no broker may have."""
        found = [
            runner.current.truth
            for runner in self.host.runners.values()
            if runner.current and not (runner.is_dead or runner.is_written_off)
        ]
        rows = [
            row
            for event in self._events
            if isinstance(event, p.RunnerDone)
            for row in event.results
        ]
        rows += [
            row
            for runner in self.host.runners.values()
            if not runner.is_written_off
            for row in runner.outbox
        ]
        held = [*self.dialer._link.kept, *self.agent._holding._reports]
        values = [row[4] for row in rows if row[2] == p.VALUE]
        for message in held:
            if isinstance(message, p.Done):
                rows_of = zip(message.statuses, message.payloads, strict=True)
                values += [payload for status, payload in rows_of if status == p.VALUE]
        return [*found, *map(self.world.oracle.of_result, values)]

    def places(self) -> list[tuple[Truth, int]]:
        """Each task that it is to run, and its own number."""
        chunks = self.agent._chunks.values()
        held = [(chunk.run.lease, index) for chunk in chunks for index in chunk.open]
        return [(self._runs[lease][index], self.stable_number) for lease, index in held]

    def note_held(self) -> list[Truth]:
        """The broker is gone: what is held here now. An acknowledgement may be on its way yet."""
        self._sent = [one for one in self.dialer._link.kept if isinstance(one, p.Done)]
        return self.begun()

    def let_go_of_acknowledged(self) -> None:
        """The broker that is gone had these results, which is known by now."""
        kept = list(map(id, [*self.dialer._link.kept, *self.dialer.unacknowledged]))
        for message in self._sent:
            if id(message) not in kept:
                truths = map(self.world.oracle.of_result, message.payloads)
                self.world.oracle.let_go(truths, "the broker had its result")
        self._sent.clear()

    def drain(self, _: None) -> None:
        """The worker is asked to end when it has finished what runs (SIGTERM)."""
        self.is_draining = True
        self.act()

    def act(self) -> None:
        if self.is_draining:
            if self.dialer.state != JOINED and (self.agent.is_empty or self._is_cut_off):
                self.die()
                return
            self._sends += self.agent.drain()
        now = self.world.now
        for event in self._events:
            self._sends += self.agent.receive(event, now)
        self._events.clear()
        self._sends += self.agent.tick(now)
        if not self._sends and not self.agent.is_drained:
            return
        sends, outgoing = deque(self._sends), []
        self._sends.clear()
        while sends:
            to, message = sends.popleft()
            if to == "host":
                for event in self.host.apply(message):
                    sends += self.agent.receive(event, now)
            else:
                outgoing.append(message)
                if isinstance(message, p.Crashed):
                    truth = self._runs[message.lease][message.index]
                    self.world.oracle.charged(truth, message.kind)
        if self.dialer.state == JOINED:
            self.transmit(self.dialer.send(outgoing))
        elif outgoing:
            self.agent.hold(outgoing, now)
        if self.agent.is_drained:
            self.host.close()
            self.world.linger(self)

    def next_deadline(self) -> float:
        deadline = self.agent.next_deadline()
        call = super().next_deadline()
        return call if deadline is None else min(call, deadline)

    @property
    def _is_cut_off(self) -> bool:
        return self.world.now >= self.away_at + AWAY_SECONDS / self.world.plan.scale

    def die(self) -> None:
        self.let_go_of_acknowledged()
        self.world.oracle.let_go(self.begun(), f"{self.name} died")
        self.host.close()
        super().die()

    def check(self) -> None:
        self.agent.check_invariants()
