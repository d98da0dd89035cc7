"""A backend that answers nothing by itself: tests of the user's side say what the outcomes are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from achilles.core import protocol as p
from achilles.errors import BrokerLostError
from achilles.mailbox import Batch, Mailbox
from achilles.runtime.arguments import ArgumentTable
from achilles.runtime.serialize import dumps


class Backend:
    """Answers nothing by itself: tests say what the outcomes are."""

    def __init__(self, slots: int, *, tasks_max: int = 0) -> None:
        self.mailbox = Mailbox(lambda: None)
        self.arguments = ArgumentTable()
        self.thread: threading.Thread | None = None
        self.batches: list[Batch] = []
        self.tasks_max = tasks_max
        self.starts = 0
        self.discards = 0

    def discard(self) -> None:
        self.discards += 1

    def start(self) -> None:
        self.starts += 1

    def status(self) -> p.Status:
        raise NotImplementedError

    def cancel_pending(self) -> None:
        self.drain()
        self.mailbox.cancel_pending()

    def kill(self, make_error: Callable[[], BaseException]) -> None:
        self.drain()
        self.mailbox.fail_all(make_error)

    def drain(self) -> tuple[list[int], list[int]]:
        """The ids that were submitted since, and those that were cancelled."""
        batches, cancels = self.mailbox.drain()
        self.batches += batches
        self.mailbox.drop(cancels)
        return [id for batch in batches for id in batch.ids], cancels

    def answer(self, *ids: int) -> None:
        statuses = bytes([p.VALUE] * len(ids))
        self.mailbox.receive(p.Results(list(ids), statuses, [dumps(id * 10) for id in ids]))

    def __repr__(self) -> str:
        return "silent"


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Backend]]:
    made: list[Backend] = []

    def make(slots: int, *, tasks_max: int = 0) -> Backend:
        made.append(Backend(slots, tasks_max=tasks_max))
        return made[-1]

    monkeypatch.setattr("achilles.local.LocalCluster", make)
    yield made
    for backend in made:
        backend.kill(lambda: BrokerLostError("the test is over"))
