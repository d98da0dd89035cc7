"""A bench for cores: every message crosses the codec, and the invariants hold after every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from achilles.core import protocol as p
from achilles.core.scheduler import Scheduler

M = TypeVar("M")

CLIENT, OTHER, WORKER, SECOND = "client", "other", "worker", "second"


def crossed(message: M) -> M:
    """The message after the codec."""
    frames = p.encode(p.Header(p.NO_TOKEN, 0, 0), message)  # type: ignore[arg-type]
    return p.decode([bytes(frame) for frame in frames])[1]  # type: ignore[return-value]


class SchedulerBench:
    """A scheduler with ``workers`` workers of ``slots`` slots, and one client that has sent blob 1."""

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

    def join_worker(self, name: str, slots: int = 1) -> list[Any]:
        """A worker."""
        hello = p.WorkerHello(bytes(16), "0", "3", name, slots, 1)
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
