"""What a client does with the letters of runners: it answers those that ask for a module,
and prints what tasks print.

Where calls are sealed, so are letters: the client's modules are for runners of its cluster, and
nobody else prints here. Each has its own thread. The I/O thread then waits for no disk, and for a
terminal no longer than `PRINT_SECONDS`,
and a blocking callback of the user's never delays a module.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable

from achilles.core import protocol as p
from achilles.runtime.seal import ANSWER, ONCE_SIZE, OUTPUT, QUESTION, TAG_SIZE, Sealer
from achilles.sources import REQUEST, answer

NUMBER_SIZE = REQUEST.size

_LOG = logging.getLogger("achilles.client")


class Desk:
    """Takes letters from the I/O thread; ``reply`` may be called from any thread."""

    def __init__(self, reply: Callable[[p.Letter], None], sealer: Sealer | None = None) -> None:
        self._reply = reply
        self._sealer = sealer
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
            request, once = letter.body, b""
            if self._sealer is not None:
                number, once, tag, name = _open_question(request)
                if not self._sealer.is_sealed(QUESTION, once, name, tag):
                    _LOG.warning("a request for a module that is not sealed was not answered")
                    continue
                request = number + name
            try:
                body = answer(request)
            except Exception:  # a finder of the user's own may raise anything
                _LOG.exception("a runner's request for a module failed")
                body = request[:NUMBER_SIZE]
            if self._sealer is not None:
                body += self._sealer.letter(ANSWER, once, body[NUMBER_SIZE:])
            self._reply(p.Letter(letter.worker, letter.runner, letter.client, p.IMPORT, body))


def _open_question(body: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Its number, what is used once, its tag, and the module's name."""
    at = (NUMBER_SIZE, NUMBER_SIZE + ONCE_SIZE, NUMBER_SIZE + ONCE_SIZE + TAG_SIZE)
    return body[: at[0]], body[at[0] : at[1]], body[at[1] : at[2]], body[at[2] :]


SEALED = ONCE_SIZE + TAG_SIZE  # what is before a sealed piece
WORKERS_MAX = 4096
PRINT_SECONDS = 1.0
PENDING_MAX = 4 << 20


class Printer:
    """Prints what tasks print, on what `sys.stdout` and `sys.stderr` are at that moment."""

    def __init__(self, sealer: Sealer | None = None) -> None:
        self._sealer = sealer
        self._counts: dict[bytes, bytes] = {}  # by worker, of the last piece
        self._pieces: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_idle = threading.Condition(self._lock)
        self._pending = 0  # bytes
        self._is_stuck = False  # it did not keep up, and is not waited for until it has

    def put(self, letter: p.Letter) -> None:
        """A task has printed; returns when that is printed here, or soon."""
        body = letter.body if self._sealer is None else self._open(self._sealer, letter.body)
        if not body:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="achilles-output", daemon=True)
            self._thread.start()
        piece = body[1:]
        with self._lock:
            if self._pending > PENDING_MAX:
                return  # nobody reads it
            self._pending += len(piece)
            self._pieces.put((body[0], piece))
            if not self._is_stuck:
                is_printed = self._is_idle.wait_for(lambda: not self._pending, PRINT_SECONDS)
                self._is_stuck = not is_printed

    def close(self) -> None:
        """No more comes."""
        if self._thread is not None:
            self._pieces.put(None)

    def _open(self, sealer: Sealer, body: bytes) -> bytes:
        """The stream and the piece; nothing if no worker of this cluster wrote it,
        or it came before.
        """
        once, tag, body = body[:ONCE_SIZE], body[ONCE_SIZE:SEALED], body[SEALED:]
        worker, count = once[: ONCE_SIZE // 2], once[ONCE_SIZE // 2 :]
        if not sealer.is_sealed(OUTPUT, once, body, tag) or count <= self._counts.get(worker, b""):
            _LOG.warning("something to be printed that no worker has sealed was dropped")
            return b""
        if len(self._counts) >= WORKERS_MAX:
            del self._counts[next(iter(self._counts))]
        self._counts[worker] = count
        return body

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
