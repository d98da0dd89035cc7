"""What tasks print: read from their runner's pipes, in whole lines where that can be, and no faster than somebody can read it.

Rules
    1. Nothing here blocks, and nothing waits in memory but the beginning of a line.
    2. A runner may print `BURST` bytes at once and `RATE` bytes a second in the long run; what is more is
       dropped, and a line says how much.
"""

from __future__ import annotations

import contextlib
import os
import select
from select import PIPE_BUF

BURST = 1 << 20
RATE = 64 << 10
LINE_MAX = 8 << 10  # a longer line is sent in pieces
PIECE_MAX = 32 << 10  # in one letter
READ_MAX = 1 << 16


def print_own(piece: bytes, fd: int = 2) -> None:
    """Print what is nobody's on our stderr: as much of it as that takes at once."""
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):  # nobody reads it any more
        for at in range(
            0, len(piece), PIPE_BUF
        ):  # a pipe that is ready takes so much without waiting
            if ready.poll(0):
                os.write(fd, piece[at : at + PIPE_BUF])


class OutputPipe:
    """The read end of a runner's stdout (1) or stderr (2), which must not block."""

    def __init__(self, fd: int, stream: int) -> None:
        self.fd = fd
        self.stream = stream
        self.is_open = True
        self._line = b""
        self._budget = float(BURST)
        self._counted_at: float | None = None
        self._dropped = 0

    @property
    def has_rest(self) -> bool:
        """Whether the beginning of a line was read, and not the end."""
        return self.is_open and bool(self._line)

    def read(self, now: float, *, is_all: bool) -> list[bytes]:
        """What is to be sent on; ``is_all``: the beginning of a line, too."""
        pieces: list[bytes] = []
        while self.is_open:
            try:
                data = os.read(self.fd, READ_MAX)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.is_open = bool(data)
            pieces += self._admit(self._lines(data), now)
        if self._line and (is_all or not self.is_open):
            line, self._line = self._line, b""
            pieces += self._admit(line, now)
        return pieces

    def _lines(self, data: bytes) -> bytes:
        """The whole lines so far."""
        data = self._line + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > LINE_MAX:
            end = len(data)
        self._line = data[end:]
        return data[:end]

    def _admit(self, data: bytes, now: float) -> list[bytes]:
        """As much of ``data`` as may be sent, in pieces."""
        if not data:
            return []
        if self._counted_at is not None:
            self._budget = min(float(BURST), self._budget + (now - self._counted_at) * RATE)
        self._counted_at = now
        if len(data) > self._budget:
            self._dropped += len(data)
            return []
        self._budget -= len(data)
        if self._dropped:
            data = b"[achilles: %d bytes of output were dropped here]\n" % self._dropped + data
            self._dropped = 0
        return [data[at : at + PIECE_MAX] for at in range(0, len(data), PIECE_MAX)]
