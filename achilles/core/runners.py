"""What the agent keeps: its chunks and its runners."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.chunking import (
    CHUNK_SECONDS_MAX,
    IDLE_SECONDS,
    LATE_SECONDS,
    STUCK_SECONDS,
    Estimate,
)
from achilles.errors import ProtocolError

CHUNKS_MAX = 2  # the one that runs, and one behind it
LONG_SECONDS = CHUNK_SECONDS_MAX / 2  # of a task that comes alone, however many are queued
START_SECONDS = 0.2  # a runner that has shown nothing yet is perhaps still starting


class Chunk:
    """A lease as the worker sees it: ``open`` holds the indexes of its tasks that were not reported
    yet.

    ``seq`` names it at its runner; 0 while it has none. ``given`` is how many tasks that has of it:
    the first ones, for what is taken back was behind them.
    """

    __slots__ = ("given", "is_lent", "open", "root", "run", "seq")

    def __init__(self, run: p.Run) -> None:
        self.run = run
        self.root = run.root or run.client
        self.seq = 0
        self.is_lent = False
        self.given = len(run.ids)
        self.open: set[int] = set(range(self.given))

    @property
    def needs(self) -> tuple[int, ...]:
        """The numbers of all blobs that its tasks need."""
        run = self.run
        return tuple(blob for blob in (run.fn, run.init, *run.blobs) if blob)

    def take_last(self, count: int) -> range:
        """Take so many tasks back from the runner; their indexes."""
        self.given -= count
        return range(self.given, self.given + count)


class Runner:
    """A child process, its chunks in order, and when it last got on.

    ``submitted`` holds the client and the id of each task that its tasks have submitted and that
    has no outcome.
    """

    __slots__ = (
        "_estimate",
        "_estimated",
        "chunks",
        "condemned",
        "fault",
        "fault_kind",
        "given",
        "has_begun",
        "has_submitted",
        "is_killed",
        "is_retiring",
        "is_wanted",
        "loaded",
        "number",
        "progress_at",
        "recalled_at",
        "results",
        "seq",
        "submitted",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.chunks: deque[Chunk] = deque()
        self.loaded: set[tuple[int, int]] = set()
        self.seq = 0
        self._estimate = Estimate()
        self._estimated = (0, 0)  # the client and its function that it ran last
        self.given = 0
        self.results = 0
        self.has_begun = False  # its first task, as far as is known
        self.progress_at = 0.0
        self.recalled_at = 0.0
        # The broker wants what waits there for another worker,
        # and asked before any result was shown
        self.is_wanted = False
        self.is_retiring = False
        # (seq, index) of tasks to be ended, and why
        self.condemned: dict[tuple[int, int], str] = {}
        self.is_killed = False
        self.fault = ""  # why it was killed, if it was its own fault
        self.fault_kind = p.CRASHED
        self.submitted: set[tuple[int, int]] = set()
        self.has_submitted = False

    @property
    def is_open(self) -> bool:
        """Whether it may be given work."""
        return not (self.is_retiring or self.condemned or self.is_killed)

    @property
    def is_lent(self) -> bool:
        """Whether its task waits for others."""
        return any(chunk.is_lent for chunk in self.chunks)

    def works_for(self, client: int) -> bool:
        """Whether it has tasks of that client, or of clients that are tasks of it."""
        return any(chunk.root == client for chunk in self.chunks)

    @property
    def shown_at(self) -> float:
        """When it got on, or was called back, last."""
        return max(self.progress_at, self.recalled_at)

    @property
    def stuck_at(self) -> float | None:
        """When what waits behind its running task has waited long enough; None if nothing does."""
        chunks = self.chunks
        has_more = len(chunks) > 1 or (chunks and len(chunks[0].open) > 1)
        return self.shown_at + self._patience(chunks[0]) if has_more else None

    def is_late(self, now: float) -> bool:
        """Whether what is put behind its running task would be called back at once."""
        return bool(self.chunks) and now >= self.shown_at + self._patience(self.chunks[0])

    def observe(self, run: p.Run, tasks: int, seconds: float) -> None:
        """Take in that tasks of a chunk took so long together."""
        if self._estimated != (run.client, run.fn):
            self._estimated = run.client, run.fn
            self._estimate = Estimate()
        self._estimate.observe(tasks, seconds)

    def takes_long(self, run: p.Run) -> bool:
        """Whether it is known here that a task like these takes so long that nothing should wait
        behind it on one runner.
        """
        each = self._estimate.seconds
        return each is not None and each > LONG_SECONDS and self._estimated == (run.client, run.fn)

    def _patience(self, chunk: Chunk) -> float:
        """How long to wait for a result of the chunk that it runs,
        before others are called back.
        """
        if not self.results:
            return START_SECONDS
        if self.is_wanted:
            return IDLE_SECONDS
        each = self._estimate.seconds
        if each is None or self._estimated != (chunk.run.client, chunk.run.fn):
            return STUCK_SECONDS
        return min(len(chunk.open) * each + LATE_SECONDS, STUCK_SECONDS)

    @property
    def times_out_at(self) -> float | None:
        """When its running task has run for longer than it may; None if nothing limits it.

        A runner that starts slowly takes nothing off its first task's time: that counts from when
        it is known to run, because it was not among what was called back.
        """
        if not self.chunks or not self.chunks[0].run.timeout or self.condemned:
            return None
        if self.has_begun:
            return self.progress_at + self.chunks[0].run.timeout
        return max(self.progress_at, self.recalled_at) + START_SECONDS

    def check_invariants(self) -> None:
        """Assert what holds of every runner."""
        assert len(self.chunks) <= CHUNKS_MAX, "a runner holds too many chunks"
        for chunk in self.chunks:
            assert chunk.open, "a finished chunk is kept"


def relayed(runner: Runner, letter: p.FromRunner) -> p.Relay:
    """What a task says as a client, for the broker; the runner's account of its tasks follows it.

    Raises:
        ProtocolError: it is nothing that a task says.
    """
    client = letter.client
    seq, message = envelope.unpack(letter.body)
    match message:
        case p.Submit(ids=ids):
            runner.submitted.update([(client, id) for id in ids])
        case p.Cancel(ids=ids):
            runner.submitted.difference_update([(client, id) for id in ids])
        case p.Blob() | p.Forget() | p.StatusRequest():
            pass
        case _:
            raise ProtocolError(f"a task does not send {type(message).__name__}")
    runner.has_submitted = True
    lease = 0
    for chunk in runner.chunks:
        if chunk.seq == seq and chunk.root == client:
            lease = chunk.run.lease
    return p.Relay(runner.number, client, lease, message)


def crossed(chunks: Iterable[Chunk], last_seq: int) -> list[tuple[int, int]]:
    """The chunks that were sent to a runner later than the last one that its host was given."""
    return [
        (chunk.seq, len(chunk.run.ids))
        for chunk in chunks
        if 0 < (chunk.seq - last_seq) % 255 < 128
    ]


def without_first(unstarted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same counts, but for the very first task."""
    if not unstarted:
        return unstarted
    (seq, count), *rest = unstarted
    return [(seq, count - 1), *rest]
