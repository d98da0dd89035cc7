"""The broker's shell: ROUTER sockets, one loop, and the cores; it never looks into a payload."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any

import zmq

from achilles.core import protocol as p
from achilles.core.budget import Limits
from achilles.core.link import Packet, encoded
from achilles.core.liveness import Timings
from achilles.core.scheduler import EPOCHS, Scheduler
from achilles.core.sessions import Send, Sessions
from achilles.errors import ConfigError, ProtocolError
from achilles.net.audit import Audit
from achilles.net.endpoint import Gatekeeper
from achilles.net.loop import SocketLoop
from achilles.net.memory import LARGE, Leftovers, MemoryWatch
from achilles.net.transport import Route, RouterPort

FAREWELL_SECONDS = 0.5
TICK_SECONDS = 0.1  # how finely silences are measured
OUTBOX_INTERVAL = 0.005  # a ROUTER does not tell when a peer that was full can take more

_LOG = logging.getLogger("achilles.broker")

Roles = Mapping[str, frozenset[str]]
_NO_ROLES: frozenset[str] = frozenset()


class Broker:
    """Serves clients and workers on sockets that are bound already.

    Args:
        sockets: each with the roles that its users have at present:
            who is not in the mapping has none.
        gatekeeper: the ZAP handler.
        credit: tasks that a client may have unresolved.
        limits: what else peers may have.
        reload: reads the keys anew; then those sessions are cut whose key is gone.
        awaited: the numbers of the workers that the last broker had; None: not known.
        on_workers: is told the numbers of workers that are new and of those that are gone,
            before any of the new gets work.
    """

    def __init__(
        self,
        sockets: Iterable[tuple[zmq.Socket[bytes], Callable[[], Roles]]],
        gatekeeper: Gatekeeper,
        *,
        timings: Timings,
        credit: int,
        limits: Limits,
        reload: Callable[[], None],
        awaited: frozenset[int] | None = None,
        on_workers: Callable[[set[int], set[int]], None] | None = None,
    ) -> None:
        now = monotonic()
        self.loop = SocketLoop()
        self._next_tick = now
        self.loop.register(gatekeeper.socket.FD, gatekeeper.answer)
        gatekeeper.answer()  # a socket signals only to a reader that has found it empty
        epoch = secrets.token_bytes(16)
        scheduler = Scheduler(
            credit=credit,
            limits=limits,
            now=now,
            epoch=int.from_bytes(epoch, "big") % EPOCHS,
            recovery=timings.recovery,
            patience=timings.client_lost_after,
            awaited=awaited,
        )
        self._on_workers = on_workers
        self._sessions = Sessions(
            scheduler,
            epoch=epoch,
            timings=timings,
            credit=credit,
            limits=limits,
            now=now,
        )
        self.audit = Audit(_LOG)
        self._reload = reload
        self._is_debugged = _LOG.isEnabledFor(logging.DEBUG)
        self._roles: dict[RouterPort, Callable[[], Roles]] = {}
        for socket, roles in sockets:
            port = RouterPort(
                socket, self.loop, self._receive, self._closed, frame_max=limits.frame
            )
            port.connections.unauthenticated_max = limits.unauthenticated
            port.connections.patience = limits.hello_timeout
            self._roles[port] = roles
        self._leftovers = Leftovers()
        self._large_at = -math.inf  # when a large message came, or a session ended
        self._memory = MemoryWatch(
            limits.memory, [port.connections for port in self._roles], self._end_largest
        )

    def run(self, is_stopping: Callable[[], bool]) -> int:
        """Serve until ``is_stopping()`` or an administrator's shutdown; then say goodbye.

        How many tasks had no result then.
        """
        while not is_stopping() and not self._sessions.is_shutting_down:
            self.step()
        status = self._sessions.scheduler.status(monotonic())
        self._transmit(self._sessions.farewell("the broker was shut down"))
        deadline = monotonic() + FAREWELL_SECONDS
        while monotonic() < deadline and not self._sessions.is_alone:
            self.step(max(0.0, deadline - monotonic()))
        return status.queued + status.running

    def step(self, timeout_max: float = 1.0) -> None:
        """Wait up to ``timeout_max`` seconds for input, and handle what there is."""
        soon = self._sessions.scheduler.next_deadline()
        at = self._next_tick if soon is None or soon > self._next_tick else soon
        for port in self._roles:
            if port.outboxes:
                port.flush()
                timeout_max = min(timeout_max, OUTBOX_INTERVAL)
        self.loop.wait(max(0.0, min(at - monotonic(), timeout_max)))
        now = monotonic()
        if now >= at:
            self._transmit(self._sessions.tick(now))
            self._next_tick = now + TICK_SECONDS
            self._look_after(now)

    def close(self) -> None:
        """Close the sockets and the loop."""
        for port in self._roles:
            port.close()
        self.loop.close()

    def _look_after(self, now: float) -> None:
        """Hold connections and memory to their limits, and tell what was counted."""
        self.audit.tick(now)
        for port in self._roles:
            port.connections.check(now, self._sessions.is_reached_on)
        self._leftovers.look(now, self._large_at)
        said = self._memory.look(now)
        if said:
            _LOG.warning("memory: %s", said)

    def _end_largest(self, now: float) -> bool:
        sends = self._sessions.end_largest(now)
        self._transmit(sends)
        return bool(sends)

    def _receive(self, route: Route, frames: list[p.Buffer]) -> None:
        now = monotonic()
        route.connection.heard_at = now
        if len(frames) > 1 or len(frames[0]) >= LARGE:
            self._large_at = now
        try:
            packet = Packet(*p.decode(frames))
        except ProtocolError as error:
            self._transmit(self._sessions.malformed(route, str(error), now))
            return
        if self._is_debugged:
            _LOG.debug("from %s: %s", route.user or "somebody", type(packet.message).__name__)
        token = secrets.token_bytes(16) if packet.header.token == p.NO_TOKEN else p.NO_TOKEN
        roles = self._roles[route.port]().get(route.user, _NO_ROLES)
        self._transmit(self._sessions.receive(route, roles, packet, now, token))
        if self._sessions.reloaders:
            self._reload_keys(now)

    def _roles_of(self, route: Route) -> frozenset[str]:
        return self._roles[route.port]().get(route.user, _NO_ROLES)

    def _reload_keys(self, now: float) -> None:
        try:
            self._reload()
        except ConfigError as error:
            _LOG.error("the keys cannot be read anew, and stay as they were: %s", error)
            self._transmit(self._sessions.reloaded(0, str(error)))
            return
        _LOG.info("the keys were read anew")

        def is_allowed(route: Any, role: str) -> bool:
            return role in self._roles_of(route)

        self._transmit(self._sessions.cut_unless(is_allowed, now))

    def _transmit(self, sends: Iterable[Send]) -> None:
        if self._sessions.events:
            self._large_at = monotonic()  # what one that has ended had is free
            self._tell()
        changes = self._sessions.scheduler.changes
        if changes:
            if self._on_workers is not None:
                for new, gone in changes:
                    self._on_workers(new, gone)
            changes.clear()
        route: Any  # a Route, as given to the sessions
        for route, packet in sends:
            if self._is_debugged:
                _LOG.debug("to %s: %s", route.user or "somebody", type(packet.message).__name__)
            for frames in encoded(packet, route.fold):
                route.port.send(route, frames)

    def log_refusals(self, gatekeeper: Gatekeeper) -> None:
        """Log from now on who is refused before a message of theirs is read."""
        gatekeeper.on_refused = self._refuse
        for port in self._roles:
            port.connections.on_refused = self._refuse

    def _refuse(self, source: str, why: str) -> None:
        self.audit.refuse(source, why, monotonic())

    def _tell(self) -> None:
        """Log what has happened to sessions."""
        events = self._sessions.events
        while events:
            event = events.popleft()
            route: Any = event.route  # a Route, as given to the sessions
            user = route.user or "a user without a name"
            if event.is_refusal:
                self._refuse(user, event.text)
            else:
                self.audit.note(f"{event.text} ({user})")

    def _closed(self, route: Route) -> None:
        self._sessions.closed(route, monotonic())
