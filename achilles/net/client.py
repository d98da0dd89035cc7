"""A client's shell: the I/O thread that owns the session with a broker."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from time import monotonic

import achilles
from achilles.core import protocol as p
from achilles.core.dispatch import ANNOUNCE_CHUNK_SECONDS
from achilles.core.submission import Send, Submission
from achilles.core.waiting import WARN_SECONDS, Conditions, Curiosity, advice
from achilles.errors import AchillesError, BrokerLostError, BrokerUnreachableError
from achilles.letters import Desk, Printer
from achilles.mailbox import Mailbox
from achilles.net.keys import code_of, find_join, given_join
from achilles.net.loop import SocketLoop
from achilles.net.near import store_near
from achilles.net.peer import Dial, Peer, dialer_to
from achilles.net.worker import python_version
from achilles.runtime.allowed import Allowed
from achilles.runtime.arguments import ArgumentTable
from achilles.runtime.loop import PatientThread
from achilles.runtime.seal import Seal, Sealer
from achilles.runtime.shared import COPY_SECONDS, copy, forget_copy

STATUS_SECONDS = 5.0
WATCH_SECONDS = 0.5
OBSTACLE_SECONDS = WARN_SECONDS  # that nobody may run a task, before it is said
SILENCE_SECONDS = WARN_SECONDS  # the same of a broker that says nothing
FLUSH_SECONDS = 2.0
OUTLASTED_SECONDS = 5.0  # a silent broker is not waited for, where only what was cancelled may run
# Within it the broker tells what it has dispatched of what it was sent.
ANNOUNCED_SECONDS = ANNOUNCE_CHUNK_SECONDS + 0.03

_LOG = logging.getLogger("achilles.client")


def connection(
    address: str,
    *,
    home: Path,
    join: str | None,
    slots_max: int,
    connect_timeout: float,
    broker_timeout: float,
    prints: bool = True,
    results: Sequence[str] | None = None,
) -> Connection:
    """A connection, not yet started, to the broker at ``address``.

    ``results``: what those may name beside plain data; None: everything. ``prints``: what its tasks
    print is printed here, else dropped. Its key is this user's,
    which is in ``home``, or that of the ``join`` file.

    Raises:
        ConfigError: ``address`` is no endpoint, or the join file is not in order.
        BrokerUnreachableError: there is no key for a broker there.
    """
    found = given_join(join, "client", address) if join else find_join(home, "client", address)
    made = Connection(
        dialer_to(found),
        code=code_of(found, home),
        is_local=found.endpoint().scheme == "ipc",
        address=found.address,
        slots_max=slots_max,
        connect_timeout=connect_timeout,
        broker_timeout=broker_timeout,
        prints=prints,
    )
    made.mailbox.cluster = found.broker_public
    if results is not None:
        made.mailbox.allowed = Allowed(results)
    return made


class Connection:
    """A client's session with the broker at ``address``, in a thread of this process.

    It seals with the ``code`` key. None is for measurements against workers without one.
    ``is_local``: the broker is on this host.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        code: bytes | None,
        address: str,
        is_local: bool = False,
        slots_max: int = 0,
        connect_timeout: float = 10.0,
        broker_timeout: float = 60.0,
        prints: bool = True,
    ) -> None:
        self._loop = SocketLoop()
        self.mailbox = Mailbox(self._loop.wake)
        sealer = None if code is None else Sealer(Seal(code))
        self.mailbox.sealer = sealer
        self.arguments = ArgumentTable(
            is_far=True, store=store_near if is_local else copy, is_sealed=sealer is not None
        )
        self._desk = Desk(self._reply, sealer)
        self._printer = Printer(sealer) if prints else None
        self.mailbox.on_letter = self._take_letter
        self._submission = Submission()
        self._dial = dial
        self._address = address
        self._slots_max = slots_max
        self._connect_timeout = connect_timeout
        self._broker_timeout = broker_timeout
        self._sends: deque[Send] = deque()
        self._requests: deque[Callable[[], None]] = deque()
        self._statuses: deque[Callable[[p.Status], None]] = deque()
        self._joined = threading.Event()
        self._is_given_up = False  # nobody waits for a session any more
        self._failure: AchillesError | None = None
        self._next_watch = 0.0
        self._cancel_at: float | None = None  # when to cancel what is not running by then
        self._is_killed = False
        self._killing: Callable[[], BaseException] | None = None  # and what the rest fails with
        self._curiosity = Curiosity()
        self._obstacles = Conditions(OBSTACLE_SECONDS)
        self._silence = Conditions(SILENCE_SECONDS)
        self.thread: threading.Thread | None = None

    # --- User threads -----------------------------------------------------------------------------

    def start(self) -> None:
        """Connect; again where Ctrl-C has interrupted that, as long as its thread has not noticed.

        Raises:
            BrokerUnreachableError: no session within ``connect_timeout`` seconds.
        """
        if self.thread is None:
            self.thread = PatientThread(self._run, "achilles-io")
        try:
            self.thread.start()
            while not self._joined.wait(0.1):
                if not self.thread.is_alive():
                    break
        except BaseException:  # Ctrl-C: the thread ends by itself, and frees what it uses
            self._is_given_up = True
            self._loop.wake()
            raise
        if self._failure is not None:
            raise self._failure

    def discard(self) -> None:
        """Free the descriptors; instead of `start`, or after one that was interrupted."""
        if self.thread is not None:
            return
        self._desk.close()
        self._loop.close()

    def call(self, function: Callable[[], None]) -> None:
        """Have the I/O thread call a function."""
        self._requests.append(function)
        self.mailbox.interrupt()

    def _take_letter(self, letter: p.Letter) -> None:
        """In the I/O thread: a runner has written."""
        if letter.kind == p.IMPORT:
            self._desk.put(letter)
        elif self._printer is not None:
            self._printer.put(letter)

    def _reply(self, letter: p.Letter) -> None:
        """From any thread: answer a runner."""
        self.call(lambda: self._sends.append(Send("broker", letter)))

    def status(self) -> p.Status:
        """The broker's numbers.

        Raises:
            BrokerUnreachableError: no answer in time.
        """
        answer: list[p.Status] = []
        is_done = threading.Event()

        def take(status: p.Status) -> None:
            answer.append(status)
            is_done.set()

        def ask() -> None:
            self._statuses.append(take)
            self._sends.append(Send("broker", p.StatusRequest()))

        self.call(ask)
        deadline = monotonic() + STATUS_SECONDS
        while not is_done.wait(0.1) and monotonic() < deadline:
            if self.thread is None or not self.thread.is_alive():
                raise self._failure or BrokerUnreachableError(
                    f"this executor is shut down, and has no session with {self._address} any more"
                )
        if not answer:
            raise BrokerUnreachableError(
                f"the broker at {self._address} did not answer within {STATUS_SECONDS:g} s"
            )
        return answer[0]

    def cancel_pending(self) -> None:
        """Cancel what was not dispatched."""

        def cancel_soon() -> None:
            self._cancel_at = monotonic() + ANNOUNCED_SECONDS

        self.call(cancel_soon)

    def kill(self, make_error: Callable[[], BaseException]) -> None:
        """Fail what is unresolved, as soon as the broker has told what runs of it,
        which is ended where it runs.
        """

        def kill_soon() -> None:
            self._killing = make_error
            self._cancel_at = monotonic() + ANNOUNCED_SECONDS

        self.call(kill_soon)

    def __repr__(self) -> str:
        return self._address

    # --- The I/O thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        mailbox = self.mailbox
        hello = p.ClientHello(
            secrets.token_bytes(16),
            "client",
            achilles.__version__,
            python_version(),
            f"{socket.gethostname()}-{os.getpid()}",
            self._slots_max,
        )
        peer: Peer | None = None
        try:
            mailbox.start(threading.current_thread())
            peer = Peer(self._dial, self._loop, hello, self._from_broker)
            self._connect(peer)
            while not (mailbox.is_closing and self._is_over(peer)):
                self._step(peer)
            mailbox.wake_sleepers()
            peer.send([p.Goodbye("done")])
            peer.flush(FLUSH_SECONDS)
        except AchillesError as error:
            self._fail(error)
        except BaseException as error:  # a bug of ours must not leave anybody waiting
            _LOG.exception("the I/O thread of an executor ended unexpectedly")
            self._fail(BrokerLostError(f"internal error of achilles: {error!r}"))
        finally:
            mailbox.close()
            self._desk.close()
            if self._printer is not None:
                self._printer.close()
            if peer is not None:
                peer.close()
            self._loop.close()
            forget_copy(inf)
            self._joined.set()

    def _is_over(self, peer: Peer) -> bool:
        if not self.mailbox.is_done or self._requests:
            return False
        if self._is_killed or self._submission.is_finished:
            return True
        return peer.silent_for(monotonic()) > OUTLASTED_SECONDS  # nothing is owed to us

    def _connect(self, peer: Peer) -> None:
        """Wait for the session to begin.

        Raises:
            BrokerUnreachableError: it does not.
        """
        deadline = monotonic() + self._connect_timeout
        while not peer.is_joined:
            now = monotonic()
            if now > deadline or self._is_given_up:
                raise peer.problem()
            self._loop.wait(max(0.0, min(deadline, peer.tick(now)) - now))
        self._joined.set()

    def _step(self, peer: Peer) -> None:
        mailbox = self.mailbox
        now = monotonic()
        due = peer.tick(now)
        if now >= self._next_watch:
            self._next_watch = now + WATCH_SECONDS
            self._watch(peer, now)
        due = min(due, self._next_watch)
        if self._cancel_at is not None:
            due = min(due, self._cancel_at)
        is_idle = mailbox.is_idle() and not self._requests and not self._sends
        self._loop.wait(max(0.0, due - now) if is_idle else 0.0)
        mailbox.is_awake = True
        while self._requests:
            self._requests.popleft()()
        if mailbox.has_mail:
            self._take_mail()
        if self._cancel_at is not None and monotonic() >= self._cancel_at:
            self._cancel_pending()
        if mailbox.is_closing:
            self._sends += mailbox.ends(self._submission)
        self._pump(peer)

    def _take_mail(self) -> None:
        batches, cancels = self.mailbox.drain()
        for batch in batches:
            self._sends += self.mailbox.submit_to(self._submission, batch)
        if cancels:
            self._cancel(cancels)

    def _cancel_pending(self) -> None:
        make_error, self._cancel_at = self._killing, None
        is_killing = make_error is not None
        self._take_mail()
        self._cancel(self.mailbox.cancel_pending(), kill=is_killing)
        if make_error is not None:
            self._cancel(self.mailbox.fail_all(make_error), kill=True)
            self._is_killed = True

    def _from_broker(self, message: p.Wire, now: float) -> None:
        match message:
            case p.Welcome():
                self.mailbox.credit = message.credit
                self._sends += self._submission.connect(
                    message.credit,
                    credit_bytes=message.credit_bytes,
                    argument_max=message.argument_max,
                )
            case p.Gone():
                _LOG.warning("the broker at %s lost this session; resubmitting", self._address)
                self._submission.disconnect()
            case p.Refused(reason=reason):
                raise BrokerUnreachableError(
                    f"the broker at {self._address} refused this client: {reason}"
                )
            case p.Goodbye(reason=reason):
                raise BrokerLostError(f"the broker at {self._address} is gone: {reason}")
            case p.Status(is_brief=True):
                self._tell_of_obstacles(message.waiting, now)
            case p.Status():
                while self._statuses:
                    self._statuses.popleft()(message)
            case (
                p.Running()
                | p.Results()
                | p.Failed()
                | p.Cluster()
                | p.Credit()
                | p.Finished()
                | p.Letter()
            ):
                self._sends += self._submission.receive(message, now)
            case _:
                _LOG.warning(
                    "the broker sent a %s, which is not for clients", type(message).__name__
                )

    def _pump(self, peer: Peer) -> None:
        sends = self._sends
        outgoing: list[p.Wire] = []
        while sends:
            to, message = sends.popleft()
            if to == "broker":
                outgoing.append(message)
            else:
                unwanted = self.mailbox.receive(message)  # type: ignore[arg-type]
                if unwanted:
                    self._cancel(unwanted)
        if outgoing:
            peer.send(outgoing)

    def _cancel(self, ids: Sequence[int], *, kill: bool = False) -> None:
        if ids:
            self.mailbox.drop(ids)
            self._sends += self._submission.cancel(list(ids), kill=kill)

    def _watch(self, peer: Peer, now: float) -> None:
        """Give up a broker that is gone for long; find out why tasks wait.

        Raises:
            BrokerLostError: nothing was heard of the broker for ``broker_timeout`` seconds.
        """
        forget_copy(now - COPY_SECONDS)
        silent_for = peer.silent_for(now)
        if silent_for > self._broker_timeout:
            raise BrokerLostError(
                f"nothing was heard of the broker at {self._address} for {silent_for:.0f} s; "
                "tasks without a result have failed; make a new executor when it is back"
            )
        unresolved = len(self._submission)
        if self._curiosity.is_due(now, is_waiting=unresolved > 0):
            self._sends.append(Send("broker", p.StatusRequest(is_brief=True)))
        since = {"silence": now - silent_for} if unresolved and silent_for > WATCH_SECONDS else {}
        if self._silence.observe(since, now):
            _LOG.warning(
                "nothing was heard of the broker at %s for %.0f s; %s its answer, and fails after %g s (client.broker_timeout)",
                self._address,
                silent_for,
                "1 task awaits" if unresolved == 1 else f"each of {unresolved} tasks awaits",
                self._broker_timeout,
            )

    def _tell_of_obstacles(self, waiting: list[p.Waiting], now: float) -> None:
        """Say which tasks nobody may run, when that has been so for a while."""
        current = {(one.reason, *one.tags): one for one in waiting if len(self._submission)}
        for key in self._obstacles.observe(dict.fromkeys(current, now), now):
            one = current[key]
            which = f" (see: achilles status --explain {one.id})" if one.id else ""
            _LOG.warning(
                "%s at the broker at %s: %s; %s%s",
                "1 task waits" if one.count == 1 else f"{one.count} tasks wait",
                self._address,
                one.reason,
                advice(one, self._address),
                which,
            )

    def _fail(self, error: AchillesError) -> None:
        """The session is over for good: everything fails, and nothing new is taken."""
        self._failure = error
        self.mailbox.broken = error
        self.mailbox.finish()
        self.mailbox.fail_all(lambda: type(error)(*error.args))
