"""An executor's backend inside a task: what it submits goes through its runner's side channel.

    the task's threads ─▶ Mailbox ─▶ Submission ─letters─▶ the runner's host ─▶ the broker (or the embedded scheduler)
                              ◀──────────  ◀──────────────

It is the same client as that of the task: no session with the broker of its own, no socket, no key
but the code key. A runner has one connection for each client that it works for; all handles of that
client's executors share it, and it lives as long as the runner.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.submission import Send, Submission
from achilles.errors import (
    AchillesError,
    BrokerLostError,
    BrokerUnreachableError,
    ExecutorForkedError,
    ProtocolError,
)
from achilles.mailbox import INIT_BLOB, Mailbox
from achilles.runtime import context
from achilles.runtime.arguments import ArgumentTable
from achilles.runtime.functions import FunctionTable
from achilles.runtime.loop import PatientThread
from achilles.runtime.seal import Sealer
from achilles.runtime.shared import copy
from achilles.runtime.side import NESTED, RunnerSide

STATUS_SECONDS = 5.0

_connections: dict[int, NestedConnection] = {}
_lock = threading.Lock()


def connection(credit: int, slots: int) -> NestedConnection | None:
    """The connection of the client whose task runs here; None where this is no runner."""
    side, client = context.side, context.client
    if side is None or not client:
        return None
    with _lock:
        found = _connections.get(client)
        if found is None or found.root != context.root:
            found = _connections[client] = NestedConnection(side, client, credit, slots)
            found.start()
        return found


def connection_to(cluster: str) -> NestedConnection | None:
    """The same, if the task runs on a worker of that cluster:
    a session of its own would wait for slots that such tasks hold.
    """
    is_here = bool(cluster) and cluster == context.cluster
    return connection(context.credit, 0) if is_here else None


def forget(client: int) -> None:
    """The client has gone."""
    with _lock:
        found = _connections.pop(client, None)
    if found is not None:
        found.close()


def _close_all() -> None:
    """The runner exits: what was submitted ends with it."""
    for one in _connections.values():
        one.close()


threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def _after_fork() -> None:
    """The forked child has none of the threads that would resolve what it inherits."""
    for one in _connections.values():
        one.mailbox.abandon(
            lambda: ExecutorForkedError("the task was submitted in the parent process")
        )
    _connections.clear()


os.register_at_fork(after_in_child=_after_fork)


class NestedConnection:
    """A client's connection in a runner. ``credit``: how many unresolved tasks the broker takes;
    ``slots``: for now.
    """

    def __init__(self, side: RunnerSide, client: int, credit: int, slots: int) -> None:
        self._side = side
        self._client = client
        self.root = context.root
        self._letters: SimpleQueue[bytes | None] = SimpleQueue()
        self.mailbox = Mailbox(lambda: self._letters.put(None))
        if context.seal is not None:
            self.mailbox.sealer = Sealer(context.seal, self.root)
        self.mailbox.cluster = context.cluster
        self.mailbox.credit = credit
        self.mailbox.slots = slots
        self.arguments = ArgumentTable(store=copy, is_far=not context.is_embedded)
        self.functions = FunctionTable(self.arguments)
        self.table_lock = threading.RLock()
        self._submission = Submission()
        self._submission.connect(credit)
        self._sends: deque[Send] = deque()
        self._requests: deque[Callable[[], None]] = deque()
        self._statuses: deque[Callable[[p.Status], None]] = deque()
        self._stepped = threading.Condition()
        self._is_busy = False
        self._is_over = False
        self.thread: threading.Thread | None = None

    # --- The task's threads -----------------------------------------------------------------------

    def start(self) -> None:
        """Start the I/O thread."""
        if self.thread is None:
            self.thread = PatientThread(self._run, "achilles-nested")
        self.thread.start()
        self._side.handle(NESTED, self._take_letter)
        self._side.before_results(self.flush)

    def call(self, function: Callable[[], None]) -> None:
        """Have the I/O thread call a function."""
        self._requests.append(function)
        self.mailbox.interrupt()

    def flush(self) -> None:
        """Wait until the broker was sent all that was submitted:
        a task that has ended may submit nothing more.
        """
        if not self._is_sent:
            self._wait_until(lambda: self._is_sent)

    @property
    def _is_sent(self) -> bool:
        is_drained = not self.mailbox.has_mail and not self._is_busy
        return is_drained and not self._submission.has_backlog

    def join(self) -> None:
        """Wait until everything that was submitted so far is resolved."""
        mark = self.mailbox.mark()
        self._wait_until(lambda: self._is_sent and self.mailbox.is_resolved_to(mark))

    def status(self) -> p.Status:
        """The broker's numbers.

        Raises:
            BrokerUnreachableError: no answer in time.
        """
        answer: list[p.Status] = []

        def ask() -> None:
            self._statuses.append(answer.append)
            self._sends.append(Send("broker", p.StatusRequest()))

        self.call(ask)
        self._wait_until(lambda: bool(answer), monotonic() + STATUS_SECONDS)
        if not answer:
            raise BrokerUnreachableError(f"no answer within {STATUS_SECONDS:g} s")
        return answer[0]

    def cancel_pending(self) -> None:
        """Cancel what was not dispatched."""
        self.call(self._cancel_pending)

    def kill(self, make_error: Callable[[], BaseException]) -> None:
        """Fail what is unresolved now; what runs of it is ended where it runs."""

        def kill() -> None:
            self._cancel_pending(kill=True)  # one of them may run, and not have been announced
            self._cancel(self.mailbox.fail_all(make_error), kill=True)

        self.call(kill)

    def discard(self) -> None:
        """Nothing to free: it serves other executors."""

    def close(self) -> None:
        """End the I/O thread."""
        self._side.not_before_results(self.flush)
        self._is_over = True
        self._letters.put(None)
        if self.thread is not None:
            self.thread.join(STATUS_SECONDS)

    def __repr__(self) -> str:
        return "in a task"

    def _wait_until(self, holds: Callable[[], bool], deadline: float | None = None) -> None:
        """Wait for what a step of the I/O thread brings about."""
        with self._stepped:
            while not holds() and self.thread is not None and self.thread.is_alive():
                left = 1.0 if deadline is None else min(1.0, deadline - monotonic())
                if left <= 0:
                    return
                self._stepped.wait(left)

    # --- The side channel's thread ----------------------------------------------------------------

    def _take_letter(self, client: int, body: bytes) -> None:
        connection = _connections.get(client)
        if connection is not None:
            connection._letters.put(body)

    # --- The I/O thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        self.mailbox.start(threading.current_thread())
        try:
            while not self._is_over:
                self._step()
            self._fail(BrokerLostError("the runner of the task has ended"))
        except OSError:
            self._fail(BrokerLostError("the worker of this task is gone"))
        except BaseException as error:  # a bug of ours must not leave anybody waiting
            self._fail(BrokerLostError(f"internal error of achilles: {error!r}"))
        finally:
            self.mailbox.close()

    def _step(self) -> None:
        """Wait until there is something to do, and do it."""
        mailbox = self.mailbox
        body = self._letters.get() if mailbox.is_idle() and not self._requests else None
        mailbox.is_awake = True
        self._is_busy = True
        try:
            while True:
                if body is not None:
                    self._receive(body)
                body = self._letters.get_nowait()
        except Empty:
            pass
        while self._requests:
            self._requests.popleft()()
        self._take_mail()
        self._pump()
        with self._stepped:
            self._is_busy = False
            self._stepped.notify_all()

    def _take_mail(self) -> None:
        batches, cancels = self.mailbox.drain()
        for batch in batches:
            self._sends += self.mailbox.submit_to(self._submission, batch)
        self._cancel(cancels)

    def _cancel_pending(self, *, kill: bool = False) -> None:
        self._take_mail()
        self._cancel(self.mailbox.cancel_pending(), kill=kill)

    def _cancel(self, ids: Sequence[int], *, kill: bool = False) -> None:
        if ids:
            self.mailbox.drop(ids)
            self._sends += self._submission.cancel(list(ids), kill=kill)

    def _receive(self, body: bytes) -> None:
        match envelope.unpack(body)[1]:
            case p.Status() as status:
                while self._statuses:
                    self._statuses.popleft()(status)
            case p.Running() | p.Results() | p.Failed() | p.Cluster() as message:
                self._sends += self._submission.receive(message, monotonic())
            case message:
                raise ProtocolError(f"the broker does not tell tasks a {type(message).__name__}")

    def _pump(self) -> None:
        sends = self._sends
        while sends:
            to, message = sends.popleft()
            if to == "user":
                self._cancel(self.mailbox.receive(message))  # type: ignore[arg-type]
            elif (
                not isinstance(message, p.Blob) or message.blob != INIT_BLOB
            ):  # the root's, for all
                body = envelope.pack(context.seq, message)  # type: ignore[arg-type]
                self._side.send(NESTED, self._client, body)

    def _fail(self, error: AchillesError) -> None:
        """Everything fails, and nothing new is taken."""
        self.mailbox.broken = error
        self.mailbox.finish()  # who has passed its check is in, before all in it fails
        self.mailbox.fail_all(lambda: type(error)(*error.args))
        with self._stepped:
            self._is_busy = False
            self._stepped.notify_all()
