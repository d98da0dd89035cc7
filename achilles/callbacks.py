"""The thread in which the callbacks of an executor's futures run."""

from __future__ import annotations

import logging
import queue
import threading

from achilles.futures import Future
from achilles.runtime.loop import PatientThread

_LOG = logging.getLogger("concurrent.futures")


class CallbackThread:
    """Calls back, one future after the other, so that who resolves them is not held up.

    It starts with the first one, and ends after those that it was given before `end`. The program's
    end waits for that, as for the standard's.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self._waiting: queue.SimpleQueue[Future | None] = queue.SimpleQueue()

    def put(self, future: Future) -> bool:
        """Run the future's callbacks; False if there can be no thread for it any more."""
        if self.thread is None:
            self.thread = PatientThread(self._run, "achilles-callbacks", daemon=False)
            try:
                self.thread.start()
            except RuntimeError:  # Python 3.12 starts no thread while the interpreter ends
                self.thread = None
                return False
        self._waiting.put(future)
        return True

    def end(self) -> None:
        """None will follow."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (future := self._waiting.get()) is not None:
            try:
                future._invoke_callbacks_here()
            # An Exception is logged before it comes here; those after it still have their turn.
            except BaseException:
                _LOG.exception("a callback of %r ended with more than an Exception", future)
            del future
