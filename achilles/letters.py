"""What a client does with the letters of runners: it answers those that ask for a module.

A thread of its own reads files and writes letters, so that neither the I/O thread waits for a disk nor a user's
callback that blocks keeps a runner waiting for a module.
"""

from __future__ import annotations

import logging
import queue
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
            if letter.kind != p.IMPORT:
                continue
            try:
                body = answer(letter.body)
            except Exception:  # a finder of the user's own may raise anything
                _LOG.exception("a runner's request for a module failed")
                body = letter.body[:4]
            self._reply(p.Letter(letter.worker, letter.runner, letter.client, p.IMPORT, body))
