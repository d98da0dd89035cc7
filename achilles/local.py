"""Embedded mode: the three cores wired to each other in one thread, runners on this machine,
no network.

    user threads ─▶ Mailbox ─▶ Submission ─▶ Scheduler ─▶ Agent ─▶ RunnerHost ═▶ runners
                       ◀──────────  ◀────────────  ◀─────────  ◀───────────

A message that one core gives out is handed to the next as it is;
a step of the loop ends when none is left.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

from achilles.core import agent, dispatch, scheduler, submission
from achilles.core import protocol as p
from achilles.mailbox import Mailbox
from achilles.runtime.arguments import ArgumentTable
from achilles.runtime.authkey import own_authkey
from achilles.runtime.host import RunnerHost
from achilles.runtime.loop import Loop, PatientThread

CLIENT, WORKER = "client", "worker"
CLOSE_SECONDS = 5.0

_LOG = logging.getLogger("achilles.client")


class LocalCluster:
    """A client, a scheduler and a worker with ``slots`` slots, in a thread of this process.

    ``tasks_max``: a runner is replaced after so many tasks; 0: never.
    """

    def __init__(self, slots: int, *, tasks_max: int = 0, name: str = "local") -> None:
        self._loop = Loop()
        self.mailbox = Mailbox(self._loop.wake)
        self.mailbox.cluster = os.urandom(16).hex()
        self.arguments = ArgumentTable()
        self._submission = submission.Submission()
        self._scheduler = scheduler.Scheduler(now=monotonic())
        self._agent = agent.Agent(slots, tasks_max=tasks_max)
        self._host = RunnerHost(
            register=self._loop.register,
            unregister=self._loop.unregister,
            path=list(sys.path),
            cwd=None,
            argv=list(sys.argv),
            authkey=own_authkey(),
            cluster=self.mailbox.cluster,
        )
        self._sends: deque[submission.Send | dispatch.Send | agent.Send] = deque()
        self._requests: deque[Callable[[], None]] = deque()
        self._slots = slots
        self._name = name
        self._deadline = 0.0
        self._is_killed = False
        self.thread: threading.Thread | None = None

    # --- User threads -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the I/O thread; again where Ctrl-C has interrupted that."""
        if self.thread is None:
            self._host.setup["path"] = list(sys.path)  # the program may have changed it by now
            self.thread = PatientThread(self._run, "achilles-io")
        self.thread.start()

    def discard(self) -> None:
        """Free the descriptors; instead of `start`."""
        self._host.close(timeout=0.0)
        self._loop.close()

    def call(self, function: Callable[[], None]) -> None:
        """Have the I/O thread call a function."""
        self._requests.append(function)
        self.mailbox.interrupt()

    def status(self) -> p.Status:
        """The scheduler's numbers."""
        answer: list[p.Status] = []
        is_done = threading.Event()

        def look() -> None:
            answer.append(self._scheduler.status(monotonic()))
            is_done.set()

        self.call(look)
        while self.thread is not None and self.thread.is_alive() and not is_done.wait(0.1):
            pass
        return answer[0] if answer else self._scheduler.status(monotonic())

    def cancel_pending(self) -> None:
        """Cancel what was not dispatched."""
        self.call(self._cancel_pending)

    def kill(self, make_error: Callable[[], BaseException]) -> None:
        """End all runners now; what is unresolved fails."""

        def kill() -> None:
            self._cancel_pending()
            self._cancel(self.mailbox.fail_all(make_error))
            for send in self._agent.reset():
                self._sends.append(send)
            self._is_killed = True

        self.call(kill)

    def __repr__(self) -> str:
        return f"embedded, {self._slots} slots"

    def pids(self) -> dict[int, int]:
        """The runners' process ids by their number."""
        return self._host.pids()

    # --- The I/O thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        mailbox = self.mailbox
        try:
            mailbox.start(threading.current_thread())
            self._join()
            while not self._is_over():
                self._step()
        except BaseException as error:  # a bug of ours must not leave anybody waiting
            _LOG.exception("the I/O thread of an executor ended unexpectedly")
            mailbox.broken = cause = error
            mailbox.finish()
            mailbox.fail_all(lambda: RuntimeError(f"internal error of achilles: {cause!r}"))
        finally:
            mailbox.close()
            self._host.close(timeout=CLOSE_SECONDS)
            self._loop.close()
            self._leave()

    def _join(self) -> None:
        now = monotonic()
        none = bytes(16)
        self._scheduler.join(CLIENT, p.ClientHello(none, "client", "", "", self._name), now)
        worker = p.WorkerHello(none, "", "", self._name, self._slots, os.getpid())
        self._scheduler.join(WORKER, worker, now)
        self._submission.connect(0)

    def _is_over(self) -> bool:
        is_done = self.mailbox.is_done and not self._requests
        return is_done and (self._is_killed or self._submission.is_finished)

    def _leave(self) -> None:
        """Let go of what was not done: the garbage collector does not look into tasks."""
        now = monotonic()
        for peer in (CLIENT, WORKER):
            self._scheduler.leave(peer, now, "the executor has ended", charge=False)

    def _step(self) -> None:
        """Wait until there is something to do, and do it."""
        mailbox = self.mailbox
        is_idle = mailbox.is_idle() and not self._requests
        timeout = self._timeout()
        if is_idle and mailbox.unresolved == 1:
            self._loop.wait_for_one(timeout)
        else:
            self._loop.wait(timeout if is_idle else 0.0)
        mailbox.is_awake = True
        while self._requests:
            self._requests.popleft()()
        if mailbox.has_mail:
            self._take_mail()
        self._sends += mailbox.ends(self._submission)
        now = monotonic()
        for event in self._host.collect():
            self._sends += self._agent.receive(event, now)
        if now >= self._deadline:
            self._sends += self._agent.tick(now)
            self._sends += self._scheduler.tick(now)
        self._pump(now)

    def _take_mail(self) -> None:
        batches, cancels = self.mailbox.drain()
        for batch in batches:
            self._sends += self.mailbox.submit_to(self._submission, batch)
        self._cancel(cancels)

    def _cancel_pending(self) -> None:
        now = monotonic()
        self._take_mail()  # what was submitted before the call may start where a slot is free
        self._pump(now)
        self._scheduler.hold(CLIENT)  # what comes back now is not given out again
        self._sends += self._agent.give_back()
        self._pump(now)
        self._sends += self._scheduler.tick(math.inf)  # what has started is announced
        self._pump(now)
        self._cancel(self.mailbox.cancel_pending())
        self._sends += self._scheduler.release(CLIENT, now)

    def _pump(self, now: float) -> None:
        """Hand messages from core to core until there are none."""
        sends = self._sends
        while sends:
            to, message = sends.popleft()
            if to == "host":
                for event in self._host.apply(message):  # type: ignore[arg-type]
                    sends += self._agent.receive(event, now)
            elif to == WORKER:
                sends += self._agent.receive(message, now)  # type: ignore[arg-type]
            elif to == CLIENT:
                sends += self._submission.receive(message, now)  # type: ignore[arg-type]
            elif to == "user":
                self._cancel(self.mailbox.receive(message))  # type: ignore[arg-type]
            else:
                peer = WORKER if isinstance(message, _FROM_WORKER) else CLIENT
                sends += self._scheduler.receive(peer, message, now)  # type: ignore[arg-type]

    def _cancel(self, ids: Sequence[int]) -> None:
        if ids:
            self.mailbox.drop(ids)
            self._sends += self._submission.cancel(list(ids))

    def _timeout(self) -> float | None:
        """How long to wait; `_deadline` is when the cores want a tick."""
        self._deadline = math.inf
        for deadline in (self._scheduler.next_deadline(), self._agent.next_deadline()):
            if deadline is not None and deadline < self._deadline:
                self._deadline = deadline
        now = monotonic()
        wanted = self._host.next_deadline(now)
        at = self._deadline if wanted is None or wanted > self._deadline else wanted
        return None if at == math.inf else max(0.0, at - now)


_FROM_WORKER = (p.Done, p.Returned, p.Crashed, p.Drain, p.Relay, p.Letter)
