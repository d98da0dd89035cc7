"""The worker's shell: a session with the broker, the agent's core, and the host of the runners.
No user code.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

import achilles
from achilles.core import protocol as p
from achilles.core.agent import Agent, Send
from achilles.errors import BrokerUnreachableError
from achilles.net.loop import SocketLoop
from achilles.net.memory import Leftovers
from achilles.net.peer import Dial, Peer
from achilles.runtime.host import RunnerHost
from achilles.runtime.memory import resident
from achilles.runtime.shared import store

CLOSE_SECONDS = 5.0
CARE_SECONDS = 0.1
SILENT_SECONDS = 1.5  # without a first session, before that is said
ALONE_SECONDS = 10.0  # without a word of the broker, before that is said
AWAY_SECONDS = 5.0  # a worker that drains waits for another broker

_LOG = logging.getLogger("achilles.worker")


class Worker:
    """Lends ``slots`` slots of this host to a broker.

    Args:
        dial: makes a socket to the broker's endpoint for workers.
        code: the code key: its runners run what clients have sealed with it, and nothing else.
            None is for measurements.
        name: what the worker is called in status and errors.
        memory_limit: bytes that a runner may have for itself; None: any number.
        captures: what tasks print goes to their client, instead of where our own output goes.
        connect_timeout: seconds until the first session must have begun.
        cluster: the broker's public key, by which a task knows executors of its own cluster.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        code: bytes | None,
        slots: int,
        name: str,
        tags: Sequence[str],
        connect_timeout: float,
        memory_limit: int | None = None,
        captures: bool = True,
        cluster: str = "",
    ) -> None:
        self.loop = SocketLoop()
        hello = p.WorkerHello(
            secrets.token_bytes(16),
            achilles.__version__,
            python_version(),
            name,
            slots,
            os.getpid(),
            list(tags),
        )
        self._peer = Peer(dial, self.loop, hello, self._from_broker, hands_on=True)
        self._leftovers = Leftovers()
        self._agent = Agent(slots)
        self._host = RunnerHost(
            register=self.loop.register,
            unregister=self.loop.unregister,
            path=None,
            cwd=None,
            is_remote=True,
            captures=captures,
            code=code,
            cluster=cluster,
        )
        self._sends: deque[Send] = deque()
        self._connect_by = monotonic() + connect_timeout
        self._complain_at = monotonic() + SILENT_SECONDS
        self._memory_limit = memory_limit
        self._is_debugged = _LOG.isEnabledFor(logging.DEBUG)
        self._care_at = 0.0  # when to see again to what need not be seen to at each step
        self._was_joined = False
        self._is_alone = False  # nothing is heard of the broker, and that was said
        self._cut_off_at: float | None = None
        self._on_joined: Callable[[], None] = lambda: None
        self._farewell: p.Goodbye | None = None  # waits until the broker has all reports
        self._has_asked = False  # whether it has them
        self._is_over = False
        self.ended_by = "it was stopped"

    def run(
        self,
        wanted_end: Callable[[], int],
        on_joined: Callable[[], None],
        on_draining: Callable[[int], None] = lambda running: None,
    ) -> int:
        """Work until the broker ends the session, or a drain is over; how many tasks were given up.

        ``wanted_end()``: 0 to go on, 1 to drain, 2 to end now. ``on_draining(running)`` is called
        when it takes no more tasks, with how many run. What has ended it is in ``ended_by`` then.

        Raises:
            BrokerUnreachableError: no session within ``connect_timeout`` seconds,
                or the broker refused or revoked it.
        """
        self._on_joined = on_joined
        is_draining = False
        try:
            while not self._is_over:
                if self._agent.is_draining and not is_draining:
                    is_draining = True
                    on_draining(self._agent.running)
                end = wanted_end()
                if end >= 2 or (end and self._is_cut_off(monotonic())):
                    break
                if end:
                    self._sends += self._agent.drain()
                self._step()
            return self._agent.running
        finally:
            self.close()

    def _is_cut_off(self, now: float) -> bool:
        """Whether a drain is to end because there is no broker, and none has come soon enough."""
        if self._peer.is_joined:
            return False
        if not self._was_joined or self._agent.is_empty:
            return True
        if self._cut_off_at is None:
            self._cut_off_at = now + AWAY_SECONDS
        return now >= self._cut_off_at

    def close(self) -> None:
        """End the runners and the session."""
        if self._peer.is_joined:
            self._peer.send([p.Goodbye("the worker was stopped")])
        self._host.close(timeout=CLOSE_SECONDS if not self._agent.running else 0.0)
        self._peer.close()
        self.loop.close()

    def _step(self) -> None:
        """Wait until there is something to do, and do it."""
        agent, host = self._agent, self._host
        now = monotonic()
        due = self._peer.tick(now)
        if self._memory_limit is not None and agent.running:
            due = min(due, self._care_at)
        if not self._was_joined:
            due = min(due, max(self._complain_at, self._care_at))
        wanted = agent.next_deadline()
        for deadline in (wanted, host.next_deadline(now)):
            if deadline is not None and deadline < due:
                due = deadline
        timeout = 0.0 if self._sends else max(0.0, due - now)
        if agent.running == 1 and timeout:
            self.loop.wait_for_one(timeout)
        else:
            self.loop.wait(timeout)
        now = monotonic()
        for event in host.collect():
            self._sends += agent.receive(event, now)
        if wanted is not None and now >= wanted:  # a deadline that is new has its turn at once
            self._sends += agent.tick(now)
        if now >= self._care_at:
            self._care(now)
        self._pump(now)

    def _care(self, now: float) -> None:
        """What need not be seen to at each step.

        Raises:
            BrokerUnreachableError: there is no session yet, and there has been enough time for one.
        """
        self._care_at = now + CARE_SECONDS
        self._sends += self._agent.tick(
            now
        )  # also for reports that grow too old, of which no deadline tells
        if self._memory_limit is not None and self._agent.running:
            self._check_memory(self._memory_limit, now)
        self._leftovers.look(now, self._peer.large_at)
        if self._was_joined:
            self._tell_of_silence(now)
        elif now > min(self._complain_at, self._connect_by):
            if now > self._connect_by:
                raise self._peer.problem()
            self._complain_at = math.inf
            left = self._connect_by - now
            _LOG.warning("no session so far; trying for %.0f s: %s", left, self._peer.problem())

    def _tell_of_silence(self, now: float) -> None:
        """Say that the broker is not heard any more, and that it is again."""
        is_alone = self._peer.silent_for(now) > ALONE_SECONDS
        if is_alone and not self._is_alone:
            _LOG.warning(
                "nothing heard of the broker for %.0f s; this worker goes on with what it runs, keeps the results, and looks for it",
                ALONE_SECONDS,
            )
        elif self._is_alone and not is_alone:
            _LOG.info("the broker is heard again")
        self._is_alone = is_alone

    def _from_broker(self, message: p.Wire, now: float) -> None:
        if self._is_debugged:
            _LOG.debug("from the broker: %s", type(message).__name__)
        match message:
            case p.Welcome(epoch=epoch):
                _LOG.info("joined the broker")
                self._hold_unsent(now)
                self._agent.result_max = message.result_max
                self._host.setup["credit"] = message.credit
                self._sends += self._agent.join(epoch, now)
                self._was_joined = True
                self._on_joined()
            case p.Gone():
                _LOG.warning("the broker is gone, or has given this session up; joining again")
                self._agent.hold(self._peer.take_unacknowledged(), now)
            case p.Refused(reason=reason):
                raise BrokerUnreachableError(f"the broker refused this worker: {reason}")
            case p.Goodbye(reason=reason):
                _LOG.info("the broker says goodbye: %s", reason)
                self._sends += self._agent.reset()
                self.ended_by = reason
                self._is_over = True
            case p.Blob(payload=p.Parts() as parts):
                message.payload = store(parts)  # once for all runners
                self._sends += self._agent.receive(message, now)
            case p.Run() | p.Revoke() | p.Blob() | p.Forget() | p.Letter() | p.Drain():
                self._sends += self._agent.receive(message, now)
            case p.Lend() | p.Relay():
                self._sends += self._agent.receive(message, now)
            case _:
                _LOG.warning(
                    "the broker sent a %s, which is not for workers", type(message).__name__
                )

    def _check_memory(self, limit: int, now: float) -> None:
        for number, pid in self._host.pids().items():
            size = resident(pid)
            if size > limit:
                text = f"had {_size(size)} of memory, where {_size(limit)} are allowed"
                self._sends += self._agent.receive(p.RunnerGrown(number, text), now)

    def _hold_unsent(self, now: float) -> None:
        """What was meant for the last session's broker is not for this one,
        before it has heard what it is about.
        """
        unsent = [message for to, message in self._sends if to == "broker"]
        self._agent.hold(unsent, now)  # type: ignore[arg-type]
        self._sends = deque(send for send in self._sends if send.to != "broker")

    def _pump(self, now: float) -> None:
        sends = self._sends
        outgoing: list[p.Wire] = []
        while sends:
            to, message = sends.popleft()
            if self._is_debugged:
                _LOG.debug("to the %s: %s", to, type(message).__name__)
            if to == "host":
                for event in self._host.apply(message):  # type: ignore[arg-type]
                    sends += self._agent.receive(event, now)
            elif isinstance(message, p.Goodbye):
                self._farewell, self._has_asked = message, False
            else:
                outgoing.append(message)  # type: ignore[arg-type]
        if outgoing and self._peer.is_joined:
            self._peer.send(outgoing)
        elif outgoing:
            self._agent.hold(outgoing, now)
        if self._agent.is_drained and not self._is_over:
            self._leave(now, has_sent=bool(outgoing))

    def _leave(self, now: float, *, has_sent: bool) -> None:
        """A drain is over: say so and end, when the broker has all reports. They may be large,
        and a closed socket drops them.
        """
        peer = self._peer
        if self._farewell is None or peer.is_settled or peer.is_deaf(now):
            peer.send([] if self._farewell is None else [self._farewell])
            self.ended_by = "it has finished what it ran"
            self._is_over = True
        elif has_sent or not self._has_asked:
            self._has_asked = True
            peer.inquire()


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def python_version() -> str:
    """The Python version as far as pickles of code depend on it: major and minor."""
    return ".".join(platform.python_version_tuple()[:2])
