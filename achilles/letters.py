"""What a client does with the letters of runners: it answers those that ask for a module, and prints what tasks print.

Each has a thread of its own, so that neither the I/O thread waits for a disk or a terminal, nor a user's callback that
blocks keeps a runner waiting for a module.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable

from achilles.core import protocol as p
from achilles.sources import answer

_LOG = logging.getLogger("achilles.client")


class Desk:
    """Takes letters from the I/O thread; ``reply`` may be called from any thread."""

    def __init__(self, reply: Callable[[p.Letter], None]) -> None:
        self._reply = reply
        self._letters: queue.SimpleQueue[p.Letter | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, letter: p.Letter) -> None:
        """A letter has come."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="achilles-letters", daemon=True)
            self._thread.start()
        self._letters.put(letter)

    def close(self) -> None:
        """No more letters come."""
        if self._thread is not None:
            self._letters.put(None)

    def _work(self) -> None:
        while (letter := self._letters.get()) is not None:
            try:
                body = answer(letter.body)
            except Exception:  # a finder of the user's own may raise anything
                _LOG.exception("a runner's request for a module failed")
                body = letter.body[:4]
            self._reply(p.Letter(letter.worker, letter.runner, letter.client, p.IMPORT, body))


PRINT_SECONDS = 1.0
PENDING_MAX = 4 << 20


class Printer:
    """Prints what tasks print, on what `sys.stdout` and `sys.stderr` are at that moment."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_idle = threading.Condition(self._lock)
        self._pending = 0  # bytes
        self._is_stuck = False  # it did not keep up, and is not waited for until it has

    def put(self, letter: p.Letter) -> None:
        """A task has printed; returns when that is printed here, or soon."""
        if not letter.body:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="achilles-output", daemon=True)
            self._thread.start()
        piece = letter.body[1:]
        with self._lock:
            if self._pending > PENDING_MAX:
                return  # nobody reads it
            self._pending += len(piece)
            self._pieces.put((letter.body[0], piece))
            if not self._is_stuck:
                is_printed = self._is_idle.wait_for(lambda: not self._pending, PRINT_SECONDS)
                self._is_stuck = not is_printed

    def close(self) -> None:
        """No more comes."""
        if self._thread is not None:
            self._pieces.put(None)

    def _work(self) -> None:
        while (entry := self._pieces.get()) is not None:
            stream, piece = entry
            try:
                file = sys.stderr if stream == 2 else sys.stdout
                if file is not None:
                    file.write(piece.decode("utf-8", "replace"))
                    file.flush()
            except Exception:
                pass  # the user's own file object, or a closed one
            with self._lock:
                self._pending -= len(piece)
                if not self._pending:
                    self._is_stuck = False
                    self._is_idle.notify_all()
