"""What tasks print: read from their runner's pipes, in whole lines where that can be,
and no faster than somebody can read it.

Rules
    1. Nothing here blocks, and nothing waits in memory but the beginning of a line.
    2. A client's tasks may print `BURST` bytes at once on one runner and `RATE` bytes a second in
       the long run, whatever others print there. Where it is more, everything is dropped for
       `PAUSE` seconds, and then a line says how much: sooner where nothing more can be told,
       because the client's last task here is done, or the pipe has ended.
    3. Each byte is sent on or counted in such a line.
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
# At once: more than a pipe holds, and no more,
# for who prints without an end would never let go of its host
READS_MAX = 32
PAUSE = 1.0


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


class _Quota:
    """What one client's tasks may print, and how much was dropped since a line said so."""

    __slots__ = ("_counted_at", "_due_at", "_left", "dropped")

    def __init__(self, now: float) -> None:
        self._left = float(BURST)
        self._counted_at = now
        self._due_at = 0.0  # when the line is due, if something was dropped
        self.dropped = 0

    def is_as_new(self, now: float) -> bool:
        """Whether nothing is known of what was printed before."""
        self._refill(now)
        return not self.dropped and self._left >= BURST

    def admit(self, data: bytes, now: float) -> bytes:
        """As many lines of ``data`` as may be sent, behind the one that is due."""
        self._refill(now)
        if self.dropped and now < self._due_at:
            self.dropped += len(data)
            return b""
        end = len(data)
        if end <= self._left and not self.dropped:
            self._left -= end
            return data
        if end > self._left:
            end = data.rfind(b"\n", 0, int(self._left)) + 1
        notice = self.notice()
        if end < len(data):
            self.dropped = len(data) - end
            self._due_at = now + PAUSE
        self._left -= end
        return notice + data[:end]

    def notice(self) -> bytes:
        """The line that says how much was dropped, if anything was;
        then nothing has to be told any more.
        """
        count, self.dropped = self.dropped, 0
        return b"[achilles: %d bytes of output were dropped here]\n" % count if count else b""

    def _refill(self, now: float) -> None:
        self._left = min(float(BURST), self._left + (now - self._counted_at) * RATE)
        self._counted_at = now


class OutputPipe:
    """The read end of a runner's stdout (1) or stderr (2), which must not block.

    What is read is always of one client, by its number; None: it is nobody's.
    """

    def __init__(self, fd: int, stream: int) -> None:
        self.fd = fd
        self.stream = stream
        self.is_open = True
        self.line = b""  # the beginning of one, of which the end was not read yet
        self._quotas: dict[int | None, _Quota] = {}  # of those that printed lately

    def owes(self, client: int | None) -> bool:
        """Whether the client is still to be told of what was dropped."""
        quota = self._quotas.get(client)
        return quota is not None and quota.dropped > 0

    def read(self, now: float, client: int | None, *, is_all: bool) -> list[bytes]:
        """What is to be sent on; ``is_all``: the beginning of a line, too."""
        quota = self._quotas.get(client) or self._begin(client, now)
        pieces: list[bytes] = []
        for _ in range(READS_MAX):
            try:
                data = os.read(self.fd, READ_MAX)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if lines := self._lines(data):
                pieces += _cut(quota.admit(lines, now))
            if not data:
                self.is_open = False
                break
        if self.line and (is_all or not self.is_open):
            line, self.line = self.line, b""
            pieces += _cut(quota.admit(line, now))
        if quota.dropped:
            pieces += _cut(quota.admit(b"", now) if self.is_open else quota.notice())
        return pieces

    def last_notice(self, client: int | None) -> bytes:
        """What the client is to be told at its end here; nothing where it knows."""
        quota = self._quotas.get(client)
        return b"" if quota is None else quota.notice()

    def _begin(self, client: int | None, now: float) -> _Quota:
        """Somebody prints who has not done so lately; those who have not either are forgotten."""
        self._quotas = {one: q for one, q in self._quotas.items() if not q.is_as_new(now)}
        quota = self._quotas[client] = _Quota(now)
        return quota

    def _lines(self, data: bytes) -> bytes:
        """The whole lines so far."""
        data = self.line + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > LINE_MAX:
            end = len(data)
        self.line = data[end:]
        return data[:end]


def _cut(data: bytes) -> list[bytes]:
    return [data[at : at + PIECE_MAX] for at in range(0, len(data), PIECE_MAX)]
