"""Benches for cores: every message crosses the codec, the invariants hold after every step,
and no send goes unseen.

What a step sends goes to the bench's outbox. `Bench.sent` empties it; the next step, and the end of
the test (see `conftest`), insist that it is empty. So a test compares whole lists, and a step
without a look at `sent` sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar, get_args

import msgspec

from achilles.core import protocol as p
from achilles.core.chunking import MEASURED_TASKS
from achilles.core.link import Packet
from achilles.core.scheduler import Scheduler

M = TypeVar("M")

CLIENT, OTHER, WORKER, SECOND = "client", "other", "worker", "second"
BROKER = "broker"
TAUGHT = 1_000_000  # ids of tasks that only tell how long they take

_OF_RUNNERS = get_args(p.RunnerCommand | p.RunnerEvent)
_decode_of_runners = msgspec.msgpack.Decoder(p.RunnerCommand | p.RunnerEvent).decode


def crossed_packet(packet: Packet) -> Packet:
    """The packet after the codec."""
    return Packet(*p.decode([bytes(frame) for frame in p.encode(*packet)]))


def crossed(message: M) -> M:
    """The message after the codec; one of runners, which never crosses a wire,
    after what its types allow.
    """
    if isinstance(message, _OF_RUNNERS):
        return _decode_of_runners(msgspec.msgpack.encode(message))  # type: ignore[no-any-return]
    packet = Packet(p.Header(p.NO_TOKEN, 0, 0), message)  # type: ignore[arg-type]
    return crossed_packet(packet).message  # type: ignore[return-value]


class Bench:
    """A core, its time, and its outbox."""

    made: ClassVar[list[Bench]] = []  # by the running test

    def __init__(self, core: Any) -> None:
        self.core = core
        self.now = 100.0
        self._outbox: list[tuple[Any, Any]] = []
        self.made.append(self)

    def sent(self) -> list[tuple[Any, Any]]:
        """All that the last step sent, as ``(to, message)``."""
        sends, self._outbox = self._outbox, []
        return sends

    def check_outbox(self) -> None:
        """Assert that nothing was sent that nobody looked at."""
        assert not self._outbox, f"nobody looked at {self._outbox}"

    def step(self, sends: Iterable[Any]) -> None:
        """Take in what the core sent."""
        self.check_outbox()
        self.core.check_invariants()
        self._outbox = [(to, crossed(message)) for to, message in sends]

    def tick(self, seconds: float) -> None:
        """Time passes; a deadline that lies behind must not stay."""
        self._tick_at(self.now + seconds)

    def tick_when_due(self) -> None:
        """Time passes until the core wants a tick, to the bit."""
        due = self.core.next_deadline()
        assert due is not None, "no tick is wanted"
        self._tick_at(due)

    def _tick_at(self, now: float) -> None:
        self.now = now
        self.step(self.core.tick(now))
        due = self.core.next_deadline()
        assert due is None or due > self.now, "a deadline that a tick did not move"


class SchedulerBench:
    """A scheduler with ``workers`` workers of ``slots`` slots,
    and one client that has sent blob 1.
    """

    def __init__(self, workers: int = 1, slots: int = 1, *, credit: int = 0) -> None:
        self.now = 100.0
        self.core = Scheduler(credit=credit, now=self.now)
        self.join_client(CLIENT)
        for name in (WORKER, SECOND)[:workers]:
            self.join_worker(name, slots)

    def join_client(self, name: str, slots_max: int = 0) -> None:
        """A client with one blob."""
        hello = p.ClientHello(bytes(16), "client", "0", "3", name, slots_max)
        self._check(self.core.join(name, crossed(hello), self.now))
        self.say(name, p.Blob(0, 1, b"f"))

    def join_worker(self, name: str, slots: int = 1, *, tags: list[str] | None = None) -> list[Any]:
        """A worker."""
        hello = p.WorkerHello(bytes(16), "0", "3", name, slots, 1, tags or [])
        return self._check(self.core.join(name, crossed(hello), self.now))

    def say(self, peer: str, message: Any) -> list[Any]:
        """A peer's message; what the scheduler sends in answer, as (to, message)."""
        return self._check(self.core.receive(peer, crossed(message), self.now))

    def submit(self, *ids: int, peer: str = CLIENT, fn: int = 1, chunk_max: int = 0) -> list[Any]:
        """Tasks of one function."""
        payloads: list[p.Payload] = [b"%d" % id for id in ids]
        return self.say(peer, p.Submit(fn, 0, list(ids), payloads, chunk_max))

    def done(self, peer: str, run: p.Run, *, seconds: float = 1.0) -> list[Any]:
        """All of a chunk's results; ``seconds`` a task."""
        count = len(run.ids)
        values: list[p.Payload] = [b"v%d" % id for id in run.ids]
        message = p.Done(run.lease, list(range(count)), bytes(count), values, seconds * count)
        return self.say(peer, message)

    def teach(
        self, seconds: float, peer: str = CLIENT, *, options: p.Options | None = None
    ) -> None:
        """Have it known how long a client's function takes,
        by as many tasks as it wants to know that from.
        """
        ids = list(range(TAUGHT, TAUGHT + MEASURED_TASKS))
        payloads: list[p.Payload] = [b"x"] * len(ids)
        sends = self.say(peer, p.Submit(1, 0, ids, payloads, options=options))
        while found := [(to, run) for to, run in sends if isinstance(run, p.Run)]:
            sends = [send for to, run in found for send in self.done(to, run, seconds=seconds)]

    def leave(self, peer: str, reason: str = "gone", *, charge: bool = True) -> list[Any]:
        """A session ends."""
        return self._check(self.core.leave(peer, self.now, reason, charge=charge))

    def tick(self, seconds: float) -> list[Any]:
        """Time passes."""
        self.now += seconds
        return self._check(self.core.tick(self.now))

    def _check(self, sends: Iterable[Any]) -> list[Any]:
        self.core.check_invariants()
        return [(to, crossed(message)) for to, message in sends]


def runs(sends: list[Any]) -> list[p.Run]:
    """The chunks among what was sent."""
    return [message for _, message in sends if isinstance(message, p.Run)]


def of(sends: list[Any], kind: type[M]) -> list[M]:
    """The messages of one kind among what was sent."""
    return [message for _, message in sends if isinstance(message, kind)]
