"""The broker's sessions: who is who, who may say what, who is still there. Around the `Scheduler`.

Rules
    1. A session is known by its token, never by the route that its messages come on:
       routes change with each connection.
    2. A role may send what `ALLOWED` lists for it, and nothing else.
    3. A peer that breaks the protocol loses its session, and nobody else notices.
    4. A hello that is repeated gets the same answer;
       one of a peer that had got further starts a new session.
    5. Every session that ends, ends in the scheduler too, exactly once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeAlias

from achilles.core import protocol as p
from achilles.core.budget import UNLIMITED, Limits, bytes_of
from achilles.core.link import Link, Packet
from achilles.core.liveness import RATE_MIN, STALL_SECONDS, Silence, Timings
from achilles.core.scheduler import Scheduler
from achilles.core.status import labels
from achilles.errors import ProtocolError

Route: TypeAlias = Hashable

CLIENT, WORKER, ADMIN = "client", "worker", "admin"

_ALWAYS = (p.Heartbeat, p.Resync, p.Goodbye)
_OF_PEERS = (*_ALWAYS, p.Letter, p.Resumed)
ALLOWED: dict[str, frozenset[type]] = {
    CLIENT: frozenset(
        {*_OF_PEERS, p.Submit, p.Blob, p.Forget, p.Cancel, p.Finish, p.StatusRequest}
    ),
    ADMIN: frozenset({*_ALWAYS, p.StatusRequest, p.ReloadKeys, p.DrainWorker, p.Shutdown}),
    WORKER: frozenset({*_OF_PEERS, p.Done, p.Returned, p.Crashed, p.Held, p.Relay, p.Drain}),
}


_HELLOS = (p.ClientHello, p.WorkerHello)  # a union would be built at each use
_ANSWERS = (p.Gone, p.Refused, p.Welcome)
_FOR_SCHEDULER = (
    p.Submit,
    p.Blob,
    p.Forget,
    p.Cancel,
    p.Finish,
    p.StatusRequest,
    p.Done,
    p.Returned,
    p.Crashed,
    p.Letter,
    p.Drain,
    p.Relay,
    p.Held,
    p.Resumed,
)

EVENTS_MAX = 1000
OWED_MIN = 4096  # bytes; what is less in one message is not counted


class Send(NamedTuple):
    """A packet on its way to a route."""

    route: Route
    packet: Packet


class Session:
    """A peer that said hello; ``number`` is its name in the scheduler."""

    __slots__ = ("hello", "link", "number", "owed", "role", "route")

    def __init__(
        self, number: int, role: str, route: Route, link: Link, hello: p.ClientHello | p.WorkerHello
    ) -> None:
        self.number = number
        self.role = role
        self.route = route
        self.link = link
        self.hello = hello
        self.owed: deque[tuple[int, int]] = deque()  # (seq, bytes) of results not taken yet

    def __str__(self) -> str:
        return f"session {self.number} of {self.role} {self.hello.name}"


class Event(NamedTuple):
    """Something that is worth a line in the log."""

    route: Route
    text: str
    is_refusal: bool = False


class Sessions:
    """All sessions of one broker process. ``events`` tells the shell what to log."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        epoch: bytes,
        timings: Timings,
        credit: int,
        limits: Limits = UNLIMITED,
        now: float,
    ) -> None:
        self.scheduler = scheduler
        self._epoch = epoch
        self._timings = timings
        self._credit = credit
        self._limits = limits
        self._by_token: dict[bytes, Session] = {}
        self._by_number: dict[Hashable, Session] = {}
        self._by_route: dict[Route, Session] = {}
        self._by_incarnation: dict[bytes, Session] = {}
        self._next_number = 1
        self._seen_at = now
        self._suspects: Silence[bytes] = Silence(timings.suspect_after)
        self._lost = {
            WORKER: Silence[bytes](timings.lost_after),
            CLIENT: Silence[bytes](timings.client_lost_after),
            ADMIN: Silence[bytes](timings.client_lost_after),
        }
        self._closed = {
            WORKER: Silence[bytes](timings.grace),
            CLIENT: Silence[bytes](timings.client_grace),
            ADMIN: Silence[bytes](timings.grace),
        }
        self._ends = (  # whose silence ends a session, and why
            *((watch, "its connection closed") for watch in self._closed.values()),
            *((watch, "it fell silent") for watch in self._lost.values()),
        )
        self.refused = 0
        self.events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self.is_shutting_down = False
        self.reloaders: list[Session] = []  # administrators who wait for the keys to be read anew

    # --- From the sockets -------------------------------------------------------------------------

    def receive(
        self, route: Route, roles: frozenset[str], packet: Packet, now: float, fresh_token: bytes
    ) -> list[Send]:
        """Take in a packet from a route whose transport vouches for ``roles``.

        ``fresh_token``: 16 random bytes, for a session that this may begin.
        """
        if now - self._seen_at > STALL_SECONDS:
            self._notice_stall(now)
        self._seen_at = now
        message = packet.message
        if isinstance(message, _HELLOS):
            return self._hello(route, roles, message, now, fresh_token)
        session = self._by_token.get(packet.header.token)
        if session is None or session.role not in roles:
            if isinstance(message, _ANSWERS):
                return []
            return [Send(route, Packet(p.Header(packet.header.token, 0, 0), p.Gone()))]
        if self._by_route.get(route) is not session:
            self._rebind(session, route)
        sends = self._heard(session, now)
        try:
            sends += self._in_session(session, packet, now)
        except ProtocolError as error:
            sends += self._cut(session, str(error), now)
        return sends

    def malformed(self, route: Route, reason: str, now: float) -> list[Send]:
        """Something that is no message came from the route."""
        session = self._by_route.get(route)
        if session is None:
            self.refused += 1
            self.events.append(Event(route, f"a malformed message: {reason}", is_refusal=True))
            return []
        return self._cut(session, reason, now)

    def closed(self, route: Route, now: float) -> None:
        """The route's connection has ended; its session has a little time to come back."""
        session = self._by_route.pop(route, None)
        if session is not None:
            self._closed[session.role].heard(session.link.token, now)

    def tick(self, now: float) -> list[Send]:
        """Suspect and give up those who are silent."""
        self._notice_stall(now)
        for token in self._suspects.expired(now):
            if session := self._by_token.get(token):
                self.scheduler.suspect(session.number)
        sends = self._from_scheduler(self.scheduler.tick(now))
        for watch, reason in self._ends:
            for token in watch.expired(now):
                if session := self._by_token.get(token):
                    sends += self._end(session, now, reason)
        return sends

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        due = self.scheduler.next_deadline()
        at = self._suspects.next_deadline()
        if at is not None and (due is None or at < due):
            due = at
        for watch, _ in self._ends:
            at = watch.next_deadline()
            if at is not None and (due is None or at < due):
                due = at
        return due

    @property
    def is_alone(self) -> bool:
        """Whether no session has a connection."""
        return not self._by_route

    def cut_unless(self, is_allowed: Callable[[Route, str], bool], now: float) -> list[Send]:
        """The keys were read anew: end the sessions of those who may not be what they are any more.

        Their work goes back to its queues, and nobody is charged for it. Who asked for it may be
        among them, and has its answer first; it counts the others.
        """
        reason = "its key was revoked"
        cut = [one for one in self._by_token.values() if not is_allowed(one.route, one.role)]
        sends = self.reloaded(sum(one not in self.reloaders for one in cut))
        for session in cut:
            sends += self._dismiss(session, reason)
            sends += self._end(session, now, reason, charge=False)
        return sends

    def is_reached_on(self, route: Route) -> bool:
        """Whether there is a session on the route."""
        return route in self._by_route

    def end_largest(self, now: float) -> list[Send]:
        """The broker has too little memory: end the session of the client that holds most,
        and lets others have least.

        It may come back at once, with what it still wants, and begins with a small grant.
        """
        number = self.scheduler.largest()
        session = self._by_number.get(number) if number is not None else None
        if session is None:
            return []
        gone = Send(session.route, Packet(p.Header(session.link.token, 0, 0), p.Gone()))
        return [gone, *self._end(session, now, "the broker has too little memory", charge=False)]

    def reloaded(self, cut: int, error: str = "") -> list[Send]:
        """Answer those who wait for the keys to be read anew."""
        waiting, self.reloaders = self.reloaders, []
        answer = p.KeysReloaded(cut, error[: p.TEXT_MAX])
        return [
            Send(session.route, session.link.wrap(answer))
            for session in waiting
            if session.link.token in self._by_token
        ]

    def farewell(self, reason: str) -> list[Send]:
        """Tell every peer that the broker ends."""
        return [
            Send(session.route, session.link.wrap(p.Goodbye(reason)))
            for session in self._by_token.values()
        ]

    def __repr__(self) -> str:
        return f"<Sessions {len(self._by_token)} | {self.scheduler!r}>"

    # --- Hello ------------------------------------------------------------------------------------

    def _hello(
        self,
        route: Route,
        roles: frozenset[str],
        hello: p.ClientHello | p.WorkerHello,
        now: float,
        fresh_token: bytes,
    ) -> list[Send]:
        role = WORKER if isinstance(hello, p.WorkerHello) else hello.role
        refusal = self._refusal(role, roles, hello)
        if refusal:
            self.refused += 1
            self.events.append(Event(route, f"{role} {hello.name}: {refusal}", is_refusal=True))
            return [Send(route, Packet(p.Header(p.NO_TOKEN, 0, 0), p.Refused(refusal)))]
        sends: list[Send] = []
        session = self._by_incarnation.get(hello.incarnation)
        if session is not None and (
            session.link.received
            or session.role != role
            or (hello.is_back and not session.hello.is_back)  # it was lost before a word was said
        ):
            sends += self._end(session, now, "it began anew")
            session = None
        is_new = session is None
        if session is None:
            session = Session(self._next_number, role, route, Link(fresh_token), hello)
            self._next_number += 1
            self._by_token[fresh_token] = session
            self._by_number[session.number] = session
            self._by_incarnation[hello.incarnation] = session
            if role != ADMIN:  # what those do is told, not that they look
                self.events.append(Event(route, f"{session} begins"))
        self._rebind(session, route)
        resumed = self._heard(session, now)
        joined = self.scheduler.join(session.number, hello, now) if is_new else []
        welcome = p.Welcome(
            session.link.token,
            self._epoch,
            hello.name,
            self._credit,
            self._timings.heartbeat_interval,
            self._timings.lost_after,
            self.scheduler.grant_of(session.number),
            self._limits.argument_max,
            self._limits.result,
        )
        sends += [Send(route, Packet(p.Header(p.NO_TOKEN, 0, 0), welcome)), *resumed]
        return [*sends, *self._from_scheduler(joined)]

    def _refusal(
        self, role: str, roles: frozenset[str], hello: p.ClientHello | p.WorkerHello
    ) -> str:
        """Why this peer gets no session; empty if it does."""
        if role not in roles:
            return f"this key or socket is not for the role {role}; export one with: achilles keys export {role}"
        if self.is_shutting_down:
            return "the broker is shutting down"
        if role == ADMIN:
            return ""
        if len(self._by_token) >= self._limits.sessions and not self._is_known(hello):
            return f"the broker has {len(self._by_token)} sessions, as many as it may (broker.sessions)"
        # All that are there run the same, so one of them tells.
        session = next((one for one in self._by_token.values() if one.role != ADMIN), None)
        if session is not None and session.hello.python != hello.python:
            return (
                f"Python {hello.python} cannot exchange pickles with Python {session.hello.python}, "
                f"which {session.role} {session.hello.name} of this broker runs; all of them need the same"
            )
        return ""

    def _is_known(self, hello: p.ClientHello | p.WorkerHello) -> bool:
        return hello.incarnation in self._by_incarnation

    # --- Sessions ---------------------------------------------------------------------------------

    def _in_session(self, session: Session, packet: Packet, now: float) -> list[Send]:
        message = packet.message
        if type(message) not in ALLOWED[session.role]:
            raise ProtocolError(f"the role {session.role} may not send {type(message).__name__}")
        is_new, answers = session.link.receive(packet, now)
        sends = [Send(session.route, answer) for answer in answers] if answers else []
        if session.owed:
            sends += self._settle(session, packet.header.ack, now)
        if not is_new:
            return sends
        if isinstance(message, _FOR_SCHEDULER):
            received = self.scheduler.receive(session.number, message, now)
            sends += self._from_scheduler(received)
        elif isinstance(message, p.Heartbeat):
            if message.coming:
                self._excuse(session, now + message.coming / RATE_MIN)
            sends.append(Send(session.route, session.link.wrap(p.Heartbeat())))
        elif isinstance(message, p.Shutdown):
            self.is_shutting_down = True
            self.events.append(Event(session.route, f"{session} shuts the broker down"))
            sends.append(Send(session.route, session.link.wrap(p.ShuttingDown())))
        elif isinstance(message, p.ReloadKeys):
            self.reloaders.append(session)
            self.events.append(Event(session.route, f"{session} has the keys read anew"))
        elif isinstance(message, p.DrainWorker):
            sends += self._drain(session, message.name)
        elif isinstance(message, p.Goodbye):
            sends += self._end(session, now, message.reason, charge=False)
        return sends  # of a resync, which the link has answered

    def _drain(self, asker: Session, name: str) -> list[Send]:
        """Have the worker that a status calls so finish what it runs,
        and answer who asked for it.
        """
        self.events.append(Event(asker.route, f"{asker} drains worker {name}"))
        sessions = self._by_token.values()
        workers = [
            (one, hello) for one in sessions if isinstance(hello := one.hello, p.WorkerHello)
        ]
        names = labels([(hello.name, hello.pid) for _, hello in workers])
        called = [one for (one, _), label in zip(workers, names, strict=True) if label == name]
        sends = [Send(one.route, one.link.wrap(p.Drain())) for one in called]
        return [*sends, Send(asker.route, asker.link.wrap(p.WorkerDrains(len(called))))]

    def _from_scheduler(self, sends: Iterable[tuple[Hashable, p.Wire]]) -> list[Send]:
        packets = []
        for to, message in sends:
            session = self._by_number.get(to)
            if session is not None:
                packet = session.link.wrap(message)
                packets.append(Send(session.route, packet))
                if type(message) is p.Results:
                    size = bytes_of(message.payloads)
                    if size >= OWED_MIN:
                        session.owed.append((packet.header.seq, size))
                        self.scheduler.owe(session.number, size, self._seen_at)
        return packets

    def _settle(self, session: Session, ack: int, now: float) -> list[Send]:
        """The peer has everything up to ``ack``."""
        size = 0
        while session.owed and session.owed[0][0] <= ack:
            size += session.owed.popleft()[1]
        if not size:
            return []
        return self._from_scheduler(self.scheduler.owe(session.number, -size, now))

    def _rebind(self, session: Session, route: Route) -> None:
        """The session is reached on this route from now on."""
        if session.route != route:
            self._by_route.pop(session.route, None)
            session.route = route
        self._by_route[route] = session
        self._closed[session.role].forget(session.link.token)

    def _heard(self, session: Session, now: float) -> list[Send]:
        token = session.link.token
        self._lost[session.role].heard(token, now)
        if session.role != WORKER:
            return []
        self.scheduler.heard(session.number, now)
        if self._suspects.heard(token, now):  # it was suspect
            return self._from_scheduler(self.scheduler.resume(session.number, now))
        return []

    def _excuse(self, session: Session, until: float) -> None:
        """Nothing is heard of it until a large message is there."""
        token = session.link.token
        self._lost[session.role].excuse(token, until)
        if session.role == WORKER:
            self._suspects.excuse(token, until)

    def _cut(self, session: Session, reason: str, now: float) -> list[Send]:
        """End the session of a peer that broke the protocol, and tell it."""
        self.events.append(Event(session.route, f"{session}: {reason}", is_refusal=True))
        sends = self._dismiss(session, reason)
        return [*sends, *self._end(session, now, f"it broke the protocol: {reason}")]

    def _dismiss(self, session: Session, reason: str) -> list[Send]:
        """Tell a peer that its session ends, and why."""
        self.refused += 1
        route, token = session.route, session.link.token
        refused = Send(route, Packet(p.Header(p.NO_TOKEN, 0, 0), p.Refused(reason[: p.TEXT_MAX])))
        return [refused, Send(route, Packet(p.Header(token, 0, 0), p.Gone()))]

    def _end(self, session: Session, now: float, reason: str, *, charge: bool = True) -> list[Send]:
        if session.role != ADMIN:
            self.events.append(Event(session.route, f"{session} ends: {reason}"))
        token = session.link.token
        del self._by_token[token]
        del self._by_number[session.number]
        if self._by_route.get(session.route) is session:
            del self._by_route[session.route]
        if self._by_incarnation.get(session.hello.incarnation) is session:
            del self._by_incarnation[session.hello.incarnation]
        self._suspects.forget(token)
        self._lost[session.role].forget(token)
        self._closed[session.role].forget(token)
        return self._from_scheduler(
            self.scheduler.leave(session.number, now, reason, charge=charge)
        )

    def _notice_stall(self, now: float) -> None:
        """Amnesty after a sleep of our own."""
        if now - self._seen_at > STALL_SECONDS:
            self._suspects.amnesty(now)
            for watch, _ in self._ends:
                watch.amnesty(now)
            self.scheduler.amnesty(now)
        self._seen_at = now

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        assert len(self._by_token) == len(self._by_number), "a session has no number"
        for token, session in self._by_token.items():
            assert session.link.token == token, "a session has another token than its name"
            assert token in self._lost[session.role], "a session is not watched"
        on_routes = self._by_route.values()
        assert all(self._by_token.get(s.link.token) is s for s in on_routes), "a dead route is kept"
        self.scheduler.check_invariants()
