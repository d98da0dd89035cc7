"""What carries an executor's tasks, and how long that lives: until all is resolved,
and no longer than the program.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from achilles.errors import ExecutorForkedError
from achilles.mailbox import Mailbox

if TYPE_CHECKING:
    from achilles.core import protocol as p
    from achilles.runtime.arguments import ArgumentTable

_LOG = logging.getLogger("achilles.client")

LIVE: weakref.WeakSet[Backend] = weakref.WeakSet()  # their threads keep them, executor or not
INTERRUPT_SECONDS = 5.0  # for what runs to end by itself after Ctrl-C
SILENT_SECONDS = 1.0  # of those, before that is said
is_exiting = False
connecting = threading.Lock()  # of an executor that was unpickled, when it is first used


class Process:
    """This process's number; asking the kernel at each `submit` would take a twentieth of it."""

    def __init__(self) -> None:
        self.note()
        os.register_at_fork(after_in_child=self.note)

    def note(self) -> None:
        self.pid = os.getpid()


process = Process()


def check_bootstrapped() -> None:
    """A process that `multiprocessing` has started and that still imports the program must not
    start others: that has no end.

    Raises:
        RuntimeError: this is such a process.
    """
    running = sys.modules.get("multiprocessing.process")
    if running is not None and getattr(running.current_process(), "_inheriting", False):
        raise RuntimeError(
            "an executor was made before this process, which multiprocessing has started, has finished its bootstrapping phase: it "
            "runs the main program once more, and would start processes that do so, too. Put what the program does, and its child "
            'processes should not, below `if __name__ == "__main__":`'
        )


class Backend(Protocol):
    """What carries tasks: the I/O thread and all behind it."""

    mailbox: Mailbox
    arguments: ArgumentTable  # in memory of the kind that it passes on
    thread: threading.Thread | None

    def start(self) -> None: ...

    def status(self) -> p.Status: ...

    def cancel_pending(self) -> None: ...

    def kill(self, make_error: Callable[[], BaseException]) -> None: ...

    def discard(self) -> None: ...


class SharedBackend(Backend, Protocol):
    """One that serves several executors."""

    def join(self) -> None: ...


class Core:
    """What outlives an executor that was dropped without a shutdown: its backend,
    until all is resolved.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.lock = threading.Lock()
        self.is_started = False
        self.is_discarded = False  # it ended before it was started
        self.is_shut_down = False
        self._pid = os.getpid()

    def finish(self) -> None:
        """No more tasks come; the I/O thread ends with the last one."""
        if (
            os.getpid() == self._pid
        ):  # a forked child has none of our threads, and perhaps a lock of one
            self.backend.mailbox.finish()
            self._discard_unused()

    def _discard_unused(self) -> None:
        """Free what a backend holds that nobody needed; one that runs does so itself."""
        if self.lock.acquire(blocking=False):  # else it is being started
            try:
                # A task that was taken before the mailbox closed is about to start the backend.
                if not self.is_started and not self.backend.mailbox.unresolved:
                    self.is_discarded = True
                    self.backend.discard()
            finally:
                self.lock.release()

    def join(self) -> None:
        """Wait for the last result, and then for the last callback."""
        if self.is_started:
            _join(self.backend)

    def give_up(self, *, is_urgent: bool) -> None:
        """Ctrl-C, after a shutdown that cancels: what runs has a moment to end unless it
        ``is_urgent``, and is ended then.
        """
        if self.is_started:
            _give_up([self.backend], 0.0 if is_urgent else INTERRUPT_SECONDS)


class TaskCore(Core):
    """That of an executor in a task: its backend is not its own, and outlives it."""

    def __init__(self, backend: SharedBackend) -> None:
        super().__init__(backend)
        self.is_started = True
        self._nested = backend

    def finish(self) -> None:
        """The backend serves other handles, and later tasks."""

    def join(self) -> None:
        """Wait for what the tasks here have submitted so far."""
        self._nested.join()

    def give_up(self, *, is_urgent: bool) -> None:
        """The same: Ctrl-C is for the program, not for its tasks."""
        self.join()


def _join(backend: Backend) -> None:
    """Wait for the last result, and then for the last callback."""
    thread = backend.thread
    is_started = thread is not None and thread.ident is not None  # Ctrl-C can come in between
    if thread is not None and is_started and thread is not threading.current_thread():
        thread.join()
    callbacks = backend.mailbox.callbacks.thread
    if callbacks is not None and callbacks is not threading.current_thread():
        callbacks.join()


def _give_up(backends: Sequence[Backend], seconds: float) -> None:
    """Wait so long for what runs, then end it; a second Ctrl-C ends it at once."""
    from achilles.errors import TerminatedError

    deadline = monotonic() + seconds
    threads = [thread for one in backends if (thread := one.thread) is not None and thread.ident]
    try:
        for thread in threads:
            thread.join(min(SILENT_SECONDS, seconds))
        if any(thread.is_alive() for thread in threads) and monotonic() < deadline:
            _LOG.warning(
                "interrupted: what runs has %g seconds to end by itself; Ctrl-C again ends it now",
                seconds,
            )
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))
    finally:
        for backend in backends:
            backend.mailbox.finish()  # what was to do so may have been interrupted
            if backend.thread is not None and backend.thread.is_alive():
                backend.kill(
                    lambda: TerminatedError("the program was interrupted before the task was done")
                )
        for backend in backends:
            _join(backend)


def _was_interrupted() -> bool:
    """Whether the program ends by Ctrl-C; in an interactive one that was perhaps long ago."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")


def _at_exit() -> None:
    """As the standard library does: what was submitted is finished before the interpreter ends.

    But for Ctrl-C, which there reaches the processes that work, and here the program alone:
    it ends what it has.
    """
    global is_exiting
    is_exiting = True
    backends = list(LIVE)
    for backend in backends:
        backend.mailbox.finish()
    if not _was_interrupted():
        try:
            for backend in backends:
                _join(backend)
            return
        except KeyboardInterrupt:
            pass
    for backend in backends:
        backend.cancel_pending()
    _give_up(backends, INTERRUPT_SECONDS)


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]


def _after_fork() -> None:
    """A forked child has none of the threads that would resolve what it inherits,
    or give back a lock.
    """
    global connecting
    connecting = threading.Lock()
    for backend in list(LIVE):
        backend.mailbox.abandon(
            lambda: ExecutorForkedError(
                "the task is of the parent process, which alone has its result; "
                "make an executor after the fork"
            )
        )
    LIVE.clear()


os.register_at_fork(after_in_child=_after_fork)
