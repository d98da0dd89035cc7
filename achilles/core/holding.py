"""What a worker keeps for the next broker: reports that no broker has acknowledged,
and the leases they are about.

A worker whose broker is gone goes on. What it has to report is held until a broker knows it, within
the bounds below; what would be beyond them is forgotten, and runs again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from achilles.core import protocol as p
from achilles.core.runners import Chunk

HELD_SECONDS = 600.0  # without a broker; then nobody waits any more
HELD_BYTES = 256 << 20
OWN_BYTES = 160  # of a report, beside what it brings: a task may print a million short lines
MARGIN = 64

Report = p.Done | p.Crashed | p.Letter


class Holding:
    """Reports of a worker with so many ``slots``, while it has no session."""

    def __init__(self, slots: int) -> None:
        # As many as a broker can think to be open at once, and more:
        # all others' last reports have reached it.
        self._ended: deque[Chunk] = deque(maxlen=2 * slots + MARGIN)
        self._reports: deque[Report] = deque()
        self._size = 0
        self.since: float | None = None  # when the last session was found to be over

    def __len__(self) -> int:
        return len(self._reports)

    def ended(self, chunk: Chunk) -> None:
        """All of the chunk's tasks were reported."""
        chunk.run.payloads = []
        self._ended.append(chunk)

    def add(self, messages: Iterable[p.Wire], now: float) -> None:
        """These messages did not reach the broker that is gone, as far as is known."""
        if self.since is None:
            self.since = now
        for message in messages:
            if isinstance(message, p.Done | p.Crashed) or (
                isinstance(message, p.Letter) and message.kind == p.OUTPUT
            ):
                self._reports.append(message)
                self._size += _size_of(message)
        while self._size > HELD_BYTES:
            self._size -= _size_of(self._reports.popleft())

    def is_too_old(self, now: float) -> bool:
        """Whether nobody can be thought to wait for this any more."""
        return self.since is not None and now >= self.since + HELD_SECONDS

    def clear(self) -> None:
        """Nobody wants any of it."""
        self._reports.clear()
        self._ended.clear()
        self._size, self.since = 0, None

    def take(
        self, chunks: Iterable[Chunk], blobs: Collection[tuple[int, int]]
    ) -> tuple[list[p.Held], list[Report]]:
        """What to tell a new broker: the leases with open tasks or reports, and then the reports.

        ``chunks`` are those with open tasks, in the order in which they run;
        ``blobs`` those that the worker has.
        """
        reports, reported = list(self._reports), self._by_lease()
        known: dict[int, Chunk] = {chunk.run.lease: chunk for chunk in chunks}
        open_leases = set(known)
        known.update((one.run.lease, one) for one in self._ended if one.run.lease in reported)
        held = []
        for lease, chunk in known.items():
            indexes = set(reported.get(lease, ()))
            if lease in open_leases:
                indexes |= chunk.open
            run = chunk.run
            has = [blob for blob in chunk.needs if (run.client, blob) in blobs]
            held.append(p.Held(lease, run.client, run.ids, sorted(indexes), has, run.attempt))
        self._reports.clear()
        self._size, self.since = 0, None
        return held, [one for one in reports if isinstance(one, p.Letter) or one.lease in known]

    def _by_lease(self) -> dict[int, list[int]]:
        """The indexes of reported tasks."""
        reported: dict[int, list[int]] = {}
        for report in self._reports:
            if isinstance(report, p.Done):
                reported.setdefault(report.lease, []).extend(report.indexes)
            elif isinstance(report, p.Crashed):
                reported.setdefault(report.lease, []).append(report.index)
        return reported


def _size_of(report: Report) -> int:
    match report:
        case p.Done(payloads=payloads):
            return OWN_BYTES + sum(map(p.size_of, payloads))
        case p.Letter(body=body):
            return OWN_BYTES + len(body)
        case p.Crashed(reason=reason):
            return OWN_BYTES + len(reason)
