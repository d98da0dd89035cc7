"""The memory of brokers and workers: what of it is kept for the next large message, and who has to
go when the broker's is too much.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable

from achilles.net.connections import Connections
from achilles.runtime.shared import kept_bytes

SLACK = 64 << 20  # beyond the limit: the process itself, and what is between two looks
HOARD = 8 << 20  # bytes on one connection that may be on their way
SILENT_SECONDS = 3.0  # peers say something each second
PAUSE = 1.0  # for memory to be given back, before somebody else has to go

KEPT = 128 << 20  # bytes that are kept of what large messages were in
LARGE = 1 << 16  # bytes of one frame; of many frames is what has large payloads
CALM_SECONDS = 2.0  # without a large message, before that is given back

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class MemoryWatch:
    """Looks at the memory of this process, and ends whoever has most of it while it is more than
    ``limit`` bytes (0: any).

    ``end_largest(now)`` ends the session that holds most; whether there was one.
    """

    def __init__(
        self,
        limit: int,
        connections: Iterable[Connections],
        end_largest: Callable[[float], bool],
        *,
        used: Callable[[], int] | None = None,
    ) -> None:
        self._limit = limit
        self._connections = list(connections)
        self._end_largest = end_largest
        self._used = used or in_use
        self._next_at = 0.0
        self.shed = 0  # how often somebody had to go

    def look(self, now: float) -> str:
        """See to it; what was done, for the log, or nothing."""
        if not self._limit or now < self._next_at:
            return ""
        used = self._used()
        if used > self._limit + SLACK:
            _trim()  # what is free is nobody's
            used = self._used()
        if used <= self._limit + SLACK:
            return ""
        self._next_at = now + PAUSE
        done = self._relieve(now)
        _trim()
        if done:
            self.shed += 1
        return f"{used >> 20} MiB are in use, {self._limit >> 20} are the limit (broker.memory): {done or 'nobody to end'}"

    def _relieve(self, now: float) -> str:
        for connections in self._connections:
            hoarder = connections.hoarder(HOARD)
            if hoarder is not None:
                hoarder.cut()
                return "ended the connection that sends a message without an end"
        if self._end_largest(now):
            return "ended the session that holds most"
        silent = [one for each in self._connections for one in each.silent(now, SILENT_SECONDS)]
        for connection in silent:
            connection.cut()
        return f"ended {len(silent)} connections of which nothing came" if silent else ""


class Leftovers:
    """Has the C library keep the memory of large messages for the next ones;
    it would give each back at once, and take new.

    New memory for 64 MiB takes 25 ms. What is free is given back when no large message has come for
    a while.
    """

    def __init__(self) -> None:
        self._looked_at = -math.inf
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # not with every C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_MMAP_THRESHOLD, KEPT)
            mallopt(_TRIM_THRESHOLD, KEPT)

    def look(self, now: float, large_at: float) -> None:
        """Give it back, if it is time; ``large_at`` is when the last large message came,
        or something was let go of.
        """
        if self._looked_at < large_at <= now - CALM_SECONDS:
            self._looked_at = now
            _trim()


def in_use() -> int:
    """The bytes that this process has, in memory of its own or as large payloads to be handed on;
    0 where that is not known.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            resident, shared = (int(number) * _PAGE for number in file.read().split()[1:3])
    except (OSError, IndexError, ValueError):
        return 0
    kept = kept_bytes()
    return resident - min(shared, kept) + kept  # some of what is kept is in memory here, too


def _trim() -> None:
    """Give free memory back to the system, where the C library can."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
