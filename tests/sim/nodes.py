"""The processes of a simulated cluster, each around its real cores as the shells in `achilles.net` are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from achilles.core import protocol as p
from achilles.core import submission
from achilles.core.agent import Agent
from achilles.core.dialer import JOINED, Dialer
from achilles.core.link import Packet
from achilles.core.protocol import Group
from achilles.core.sessions import Send, Sessions
from achilles.core.submission import Submission
from tests.sim.oracle import (
    ABANDONED,
    CANCELLED,
    OPEN,
    Truth,
    Violation,
    WatchedScheduler,
    blob_payload,
)
from tests.sim.runners import Host, Runner

if TYPE_CHECKING:
    from tests.sim.world import World

Frames = list[p.Buffer]

LOOP_SECONDS = 0.005  # from when a runner's end could be seen until the worker acts on it
NEVER = float("inf")


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
        deadline = self.next_deadline()
        if deadline < self._wake_at:
            self._wake_at = deadline
            self.world.at(deadline, self._wake, deadline)

    def _wake(self, deadline: float) -> None:
        if deadline != self._wake_at or not self.is_up:
            return  # an earlier timer was set meanwhile
        self._wake_at = NEVER
        if self.paused_until <= self.world.now:
            self.tick()
            if self.next_deadline() <= self.world.now:
                raise Violation(f"{self.name} wants to be woken in the past again")
            self.after_step()

    def next_deadline(self) -> float:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class Broker(Node):
    """The broker's process; a restarted one is another."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"broker {number}")
        plan = world.plan
        scheduler = WatchedScheduler(credit=plan.credit, now=world.now)
        scheduler.oracle = world.oracle
        scheduler.is_sound = plan.is_sound
        epoch = b"epoch" + number.to_bytes(11, "big")
        self.sessions = Sessions(
            scheduler, epoch=epoch, timings=plan.timings, credit=plan.credit, now=world.now
        )
        self.scheduler = scheduler
        self._tick_at = world.now

    def on_frames(self, what: tuple[Connection, Frames]) -> None:
        connection, frames = what
        world = self.world
        packet = Packet(*p.decode(frames))
        if isinstance(packet.message, p.Resync):
            world.marks["resync"] += 1
        token = world.fresh_token() if packet.header.token == p.NO_TOKEN else p.NO_TOKEN
        roles = connection.peer.roles
        sends = self.sessions.receive(connection.route, roles, packet, world.now, token)
        self.transmit(sends)
        self.transmit(self.sessions.tick(world.now))
        if self.sessions.refused:
            raise Violation(f"the broker refused an honest peer: {sends[-3:]}")

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
            leases = client.running + client.prefetched
            if 0 < client.slots_max < leases:
                raise Violation(f"{client.name} holds {leases} of {client.slots_max} slots")


class Peer(Node):
    """A client's or a worker's process, with a session."""

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
        if was_joined and self.dialer.state != JOINED:
            self.world.marks["rejoined"] += 1
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


class Client(Peer):
    """A client's process; its user submits what the plan says."""

    def __init__(self, world: World, number: int, slots_max: int) -> None:
        hello = p.ClientHello(
            world.fresh_token(), "client", "0", "3.11", f"client-{number}", slots_max
        )
        super().__init__(world, hello.name, hello)
        self.number = number
        self.submission = Submission()
        self._sends: list[submission.Send] = []

    def on_message(self, message: p.Wire) -> None:
        match message:
            case p.Welcome(credit=credit):
                self._sends += self.submission.connect(credit)
            case p.Gone():
                self.submission.disconnect()
            case p.Running() | p.Results() | p.Failed() | p.Cluster():
                self._sends += self.submission.receive(message, self.world.now)
            case _:
                raise Violation(f"{self.name} got {message}")

    def submit(self, tasks: list[Truth]) -> None:
        """The user submits tasks, in runs of one group."""
        at = 0
        while at < len(tasks):
            group = tasks[at].group
            run = []
            while at < len(tasks) and tasks[at].group == group:
                run.append(tasks[at])
                at += 1
            for blob in group[:2]:
                if blob and not self.submission.knows_blob(blob):
                    self.submission.add_blob(blob, blob_payload(self.number, blob))
            ids = [truth.id for truth in run]
            payloads: list[p.Payload] = [truth.payload for truth in run]
            self._sends += self.submission.submit(Group(*group), ids, payloads)
        self.act()

    def cancel(self, tasks: list[Truth]) -> None:
        """The user wants no result of these any more."""
        for truth in tasks:
            self.world.oracle.close(truth, CANCELLED)
            if self.world.plan.is_calm:
                truth.start_by = self.world.now + self.world.plan.round_trip
        self._sends += self.submission.cancel([truth.id for truth in tasks])
        self.act()

    def leave(self, is_polite: bool) -> None:
        """The client ends, with tasks unresolved."""
        self.is_wanted = False
        plan = self.world.plan
        patience = 0.0 if is_polite else plan.timings.client_lost_after + 1.0
        start_by = self.world.now + patience + plan.round_trip
        for truth in self.world.oracle.tasks.values():
            if truth.client != self.number:
                continue
            if truth.state == OPEN:
                self.world.oracle.close(truth, ABANDONED)
                truth.start_by = start_by if plan.is_calm else truth.start_by
            elif not is_polite and self.world.now < truth.start_by < NEVER:
                truth.start_by = start_by  # the word of its cancel is lost
        if is_polite:
            self.transmit(self.dialer.send([p.Goodbye("done")]))
            self.world.linger(self)
        else:
            self.die()

    def act(self) -> None:
        outgoing: list[p.Wire] = []
        oracle = self.world.oracle
        for to, message in self._sends:
            if to == "broker":
                outgoing.append(message)
            elif isinstance(message, p.Results):
                oracle.results(self.number, message)
            elif isinstance(message, p.Failed):
                oracle.failed(self.number, message)
        self._sends.clear()
        self.transmit(self.dialer.send(outgoing))

    def check(self) -> None:
        self.submission.check_invariants()


class Worker(Peer):
    """A worker's process and its runners."""

    def __init__(self, world: World, number: int, life: int, slots: int) -> None:
        name = f"worker-{number}.{life}"
        hello = p.WorkerHello(world.fresh_token(), "0", "3.11", name, slots, 1000 + number)
        super().__init__(world, name, hello)
        self.number = number
        self.life = life
        self.is_draining = False
        self.agent = Agent(slots, tasks_max=world.plan.tasks_max)
        self.host = Host(
            name,
            slots,
            world.oracle,
            clock=lambda: world.now,
            timer=self._set_timer,
            notify=lambda runner: self.deliver(self.on_runner, runner),
            spawn_seconds=world.spawn_seconds,
            watch=world.watch,
        )
        self._sends: list[Any] = []
        self._runs: dict[int, p.Run] = {}
        self._events: list[p.RunnerEvent] = []

    def _set_timer(self, seconds: float, function: Callable[[Any], None], argument: Any) -> None:
        self.world.at(self.world.now + seconds, self._on_timer, (function, argument))

    def _on_timer(self, what: tuple[Callable[[Any], None], Any]) -> None:
        if self.is_up:  # runners run on while the worker is stopped
            what[0](what[1])

    def on_runner(self, runner: Runner) -> None:
        """A runner's channel is ready. Before its events are handled, a message of the broker may be."""
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
            case p.Welcome() | p.Gone():
                self._runs.clear()
                self._sends += self.agent.reset()
            case p.Run(lease=lease):
                if lease in self._runs:
                    raise Violation(f"{self.name} got lease {lease} twice")
                self._runs[lease] = message
                self._sends += self.agent.receive(message, self.world.now)
            case p.Revoke() | p.Blob() | p.Forget() | p.Drain():
                self._sends += self.agent.receive(message, self.world.now)
            case _:
                raise Violation(f"{self.name} got {message}")

    def drain(self, _: None) -> None:
        """The worker is asked to end when it has finished what runs (SIGTERM)."""
        self.is_draining = True
        self.act()

    def act(self) -> None:
        if self.is_draining:
            if self.dialer.state != JOINED:
                self.die()
                return
            self._sends += self.agent.drain()
        now = self.world.now
        for event in self._events:
            self._sends += self.agent.receive(event, now)
        self._events.clear()
        self._sends += self.agent.tick(now)
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
                    payload = self._runs[message.lease].payloads[message.index]
                    self.world.oracle.charged(self.world.oracle.of_payload(payload))
        self.transmit(self.dialer.send(outgoing))
        if self.agent.is_drained:
            self.host.close()
            self.world.linger(self)

    def next_deadline(self) -> float:
        deadline = self.agent.next_deadline()
        call = super().next_deadline()
        return call if deadline is None else min(call, deadline)

    def die(self) -> None:
        self.host.close()
        super().die()

    def check(self) -> None:
        self.agent.check_invariants()
