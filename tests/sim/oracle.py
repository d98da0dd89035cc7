"""What is true in a simulated world, noted where it happens, and what must therefore come out.

Rules that are held for every task
    1. It has at most one outcome, and none after its client cancelled it or left.
    2. A value is the function's, with the right blobs; an error is the one that the task raises.
    3. It fails as crashed only after three deaths of runners in the middle of it, as lost only after five
       sessions of workers that held it.
       It is charged with no crash but its own.
    4. It starts once, and once more for each thing that befell it (a crash, a lost session, a new broker).
    5. It does not start when it has long been cancelled.
    6. It does not wait behind another one for long while a slot idles.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from achilles.core import protocol as p
from achilles.core.dispatch import Send
from achilles.core.scheduler import CRASHES_MAX, LOSSES_MAX, Scheduler

OPEN, DONE, CANCELLED, ABANDONED = "open", "done", "cancelled", "abandoned"


class Violation(AssertionError):
    """The system did what it must not do."""


@dataclass
class Truth:
    """One task: what it is, and what has happened to it."""

    client: int
    id: int
    group: tuple[int, int, int]  # function, initializer, chunk_max
    seconds: float
    is_poison: bool
    does_raise: bool
    payload: bytes
    state: str = OPEN
    has_failed: bool = False  # the broker gave it up
    starts: int = 0
    excuses: int = 0  # what may have it start again
    crashes: int = 0  # runners that died in the middle of it
    charges: int = 0  # crashes that workers have charged it with
    losses: int = 0  # workers' sessions that ended while they held it
    start_by: float = float("inf")  # after this nobody should want it any more
    ends: int = 0  # sessions of its client that ended, each with its charges
    story: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kind = " poison" if self.is_poison else ""
        return (
            f"task {self.client}/{self.id} ({self.seconds:.4f} s{kind}, {self.state}, {self.starts} starts, "
            f"{self.excuses} excuses, {self.crashes} crashes, {self.losses} losses)"
        )


def task_payload(client: int, id: int, padding: int) -> bytes:
    """A payload that says whose it is."""
    return b"%d/%d/" % (client, id) + b"." * padding


def blob_payload(client: int, blob: int) -> bytes:
    """A function's or an initializer's."""
    return b"blob %d of client %d" % (blob, client)


def join(payload: p.Payload) -> bytes:
    """The payload in one piece."""
    return payload.join() if isinstance(payload, p.Parts) else bytes(payload)


def outcome(fn: bytes, init: bytes, payload: bytes, *, does_raise: bool) -> tuple[int, bytes]:
    """What running it gives: status and payload."""
    return (p.ERROR if does_raise else p.VALUE), b"|".join((fn, init, payload))


class Oracle:
    """All tasks of a world."""

    def __init__(self) -> None:
        self.tasks: dict[tuple[int, int], Truth] = {}
        self.open = 0

    def add(self, truth: Truth) -> None:
        self.tasks[truth.client, truth.id] = truth
        self.open += 1

    def of_payload(self, payload: p.Payload) -> Truth:
        client, id, _ = join(payload).split(b"/", 2)
        return self.tasks[int(client), int(id)]

    # --- What happens -----------------------------------------------------------------------------

    def started(self, truth: Truth, where: str, now: float) -> None:
        if now > truth.start_by:
            raise Violation(
                f"{truth} started {now - truth.start_by:.3f} s later than a cancel takes"
            )
        truth.starts += 1
        truth.story.append(f"started at {where}")
        if truth.starts > 1 + truth.excuses:
            raise Violation(f"{truth} started more often than anything explains: {truth.story}")

    def crashed(self, truth: Truth) -> None:
        truth.crashes += 1
        truth.excuses += 1
        truth.story.append("its runner died")
        if truth.crashes > CRASHES_MAX * (1 + truth.ends) + truth.losses:
            raise Violation(f"{truth} was tried again after {CRASHES_MAX} crashes: {truth.story}")

    def charged(self, truth: Truth) -> None:
        truth.charges += 1
        if truth.charges > truth.crashes:
            raise Violation(
                f"{truth} is charged with a crash that it had no part in: {truth.story}"
            )

    def worker_lost(self, is_charged: bool, truths: Iterable[Truth]) -> None:
        for truth in truths:
            truth.losses += is_charged
            truth.excuses += 1
            truth.story.append("its worker's session ended")

    def client_lost(self, client: int | None = None) -> None:
        """A client's session ended, or all did."""
        for truth in self.tasks.values():
            if truth.state == OPEN and client in (None, truth.client):
                truth.ends += 1
                truth.excuses += 1
                truth.story.append("its client's session ended")

    def close(self, truth: Truth, state: str) -> None:
        if truth.state == OPEN:
            self.open -= 1
            truth.state = state

    # --- What the user sees -----------------------------------------------------------------------

    def results(self, client: int, message: p.Results) -> None:
        rows = zip(message.ids, message.statuses, message.payloads, strict=True)
        for id, status, payload in rows:
            truth = self._resolve(client, id)
            fn, init, _ = truth.group
            expected = outcome(
                blob_payload(client, fn) if fn else b"",
                blob_payload(client, init) if init else b"",
                truth.payload,
                does_raise=truth.does_raise,
            )
            if (status, join(payload)) != expected:
                raise Violation(
                    f"{truth} gave {status} {join(payload)[:200]!r}, not {expected[0]} {expected[1][:200]!r}"
                )
            if truth.is_poison:
                raise Violation(f"{truth} kills its runner, and has a result")

    def failed(self, client: int, message: p.Failed) -> None:
        truth = self._resolve(client, message.id)
        truth.has_failed = True
        if message.kind == p.CRASHED:
            is_just = truth.crashes >= CRASHES_MAX
        else:
            is_just = message.kind == p.LOST and truth.losses >= LOSSES_MAX
        if not is_just:
            raise Violation(
                f"{truth} was given up as {message.kind}: {message.story}, {truth.story}"
            )
        if not CRASHES_MAX <= len(message.story) <= CRASHES_MAX + LOSSES_MAX - 1:
            raise Violation(f"{truth} failed with a story of {len(message.story)} lines")

    def _resolve(self, client: int, id: int) -> Truth:
        truth = self.tasks.get((client, id))
        if truth is None:
            raise Violation(f"an outcome of task {client}/{id}, which nobody submitted")
        if truth.state != OPEN:
            raise Violation(f"{truth} got an outcome when it had one, or was not to get one")
        self.close(truth, DONE)
        return truth

    def unresolved(self) -> list[str]:
        """The first few, in words."""
        unresolved = (truth for truth in self.tasks.values() if truth.state == OPEN)
        return [str(truth) for truth in islice(unresolved, 3)]


class WatchedScheduler(Scheduler):
    """A scheduler that tells the oracle which tasks a session's end touches."""

    oracle: Oracle
    is_sound: bool  # nobody should be given up

    def leave(self, peer: Hashable, now: float, reason: str, *, charge: bool = True) -> list[Send]:
        if charge and self.is_sound:
            raise Violation(f"session {peer} was ended, though its peer is well: {reason}")
        if worker := self._workers.get(peer):
            self.oracle.worker_lost(
                charge,
                [
                    self.oracle.of_payload(task.payload)
                    for lease in worker.leases.values()
                    for task in lease.tasks
                    if task is not None and task.payload is not None
                ],
            )
        if client := self._clients.get(peer):
            # Results that were on their way to it are lost too.
            self.oracle.client_lost(int(client.name.split("-")[1]))
        return super().leave(peer, now, reason, charge=charge)
