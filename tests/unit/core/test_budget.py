"""The budget's rules: grants within the memory, counted to the byte, and enough for one task."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest

from achilles.core import budget as budget_module
from achilles.core import protocol as p
from achilles.core import submission as submission_module
from achilles.core.budget import FIRST, FLOOR, MIB, Budget, Limits, bounded, bytes_of
from achilles.core.scheduler import Scheduler
from achilles.core.submission import Submission
from achilles.core.tables import Client
from achilles.errors import ProtocolError
from tests.security.attacks import attack
from tests.unit.core.bench import crossed

UNIT = 1000  # bytes, where payloads are made
LIMITS = Limits(client_bytes=64 * MIB, memory=256 * MIB, argument=32 * MIB)


def client(number: int = 1) -> Client:
    hello = p.ClientHello(b"i" * 16, "client", "0", "3.11", f"client-{number}")
    return Client(number, number, hello)


def opened(budget: Budget, number: int = 1) -> Client:
    made = client(number)
    budget.open(made)
    return made


# --- Grants ---------------------------------------------------------------------------------------


def test_a_grant_grows_with_what_is_used_of_it() -> None:
    budget = Budget(LIMITS)
    one = opened(budget)
    assert one.grant == FIRST
    budget.take(one, FIRST // 2, is_alone=False)
    assert not budget.grow(one), "half of it is free"
    budget.take(one, 1, is_alone=False)
    assert budget.grow(one)
    assert one.grant == 2 * FIRST
    budget.take(one, FIRST + FIRST // 2 - 1, is_alone=False)
    assert budget.grow(one)
    assert one.grant == LIMITS.client_bytes
    budget.take(one, 2 * FIRST, is_alone=False)
    assert not budget.grow(one), "that is all that one may have"


def test_all_grants_together_leave_half_of_the_memory_free() -> None:
    """Whoever comes late gets a little all the same, and more when others have gone."""
    budget = Budget(LIMITS)
    many = [opened(budget, number) for number in range(20)]
    for one in many:
        while True:
            one.bytes = one.grant
            if not budget.grow(one):
                break
    assert sum(one.grant for one in many) <= LIMITS.memory // 2 + len(many) * FLOOR
    late = many[-1]
    assert late.grant >= FLOOR
    for one in many[:-1]:
        budget.close(one)
    assert budget.grow(late)
    assert late.grant > FLOOR


@attack("T29")
def test_more_than_was_granted_is_refused_and_changes_nothing() -> None:
    budget = Budget(LIMITS)
    one = opened(budget)
    budget.take(one, 10, is_alone=True)
    with pytest.raises(ProtocolError, match=f"{FIRST + 1} bytes of unresolved tasks"):
        budget.take(one, FIRST - 9, is_alone=False)
    assert one.bytes == 10
    budget.take(one, FIRST - 9, is_alone=True)
    with pytest.raises(ProtocolError, match=f"{LIMITS.argument} were granted"):
        budget.take(one, LIMITS.argument - FIRST, is_alone=True)


def test_an_argument_is_never_larger_than_what_can_be_granted() -> None:
    assert LIMITS.argument_max == LIMITS.argument
    assert LIMITS._replace(argument=1 << 40).argument_max == LIMITS.memory // 2
    assert Limits(memory=0, argument=7).argument_max == 7


def test_without_limits_there_are_none() -> None:
    budget = Budget()
    one = opened(budget)
    assert one.grant == 0
    budget.take(one, 1 << 60, is_alone=False)
    assert not budget.grow(one)
    budget.owes(one, 1 << 60)
    assert not one.is_held


# --- Results --------------------------------------------------------------------------------------


@attack("T29")
def test_whoever_does_not_take_results_is_held_until_half_of_them_are_taken() -> None:
    budget = Budget(LIMITS)
    one = opened(budget)
    budget.owes(one, LIMITS.client_bytes)
    assert not one.is_held
    budget.owes(one, 1)
    assert one.is_held
    budget.owes(one, -LIMITS.client_bytes // 2)
    assert one.is_held
    budget.owes(one, -1)
    assert not one.is_held


@attack("T29")
def test_many_who_do_not_take_results_share_a_quarter_of_the_memory() -> None:
    budget = Budget(LIMITS)
    many = [opened(budget, number) for number in range(8)]
    for one in many:
        budget.owes(one, 1)
    for one in many:
        while not one.is_held:
            budget.owes(one, MIB)
    assert sum(one.owed for one in many) <= LIMITS.memory // 4 + len(many) * (MIB + 1)


def test_outcomes_that_are_too_large_are_replaced_by_their_size() -> None:
    payloads: list[p.Payload] = [b"x" * 10, p.Parts((b"y" * 6, b"y" * 5)), b""]
    statuses = bytes([p.VALUE, p.ERROR, p.VALUE])
    assert bounded(statuses, payloads, 10) == (
        bytes([p.VALUE, p.TOO_LARGE, p.VALUE]),
        [b"x" * 10, b"11 10", b""],
    )
    assert bytes_of(payloads) == 21


# --- A client, a broker and a worker --------------------------------------------------------------


class Scene:
    """A submission at a scheduler with small limits;
    a worker that does one task after the other, in any order.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        limit = self.chance.choice((1, 2, 5, 40)) * UNIT
        self.limits = Limits(
            client_bytes=limit,
            memory=4 * limit,
            argument=self.chance.choice((limit // 2, 2 * limit)),
        )
        self.scheduler = Scheduler(credit=self.chance.choice((0, 5)), limits=self.limits)
        self.submission = Submission()
        self.to_broker: deque[Any] = deque()
        self.to_client: deque[Any] = deque()
        self.runs: list[p.Run] = []
        self.outcomes: dict[int, str] = {}
        self.peak = 0
        hello = p.ClientHello(b"i" * 16, "client", "0", "3.11", "c")
        self.take(self.scheduler.join("client", hello, 0.0))
        worker = p.WorkerHello(b"w" * 16, "0", "3.11", "w", slots=2, pid=1)
        self.take(self.scheduler.join("worker", worker, 0.0))
        self.send(
            self.submission.connect(
                self.scheduler._credit,
                credit_bytes=self.scheduler.grant_of("client"),
                argument_max=self.limits.argument_max,
            )
        )

    def send(self, sends: list[Any]) -> None:
        for to, message in sends:
            if to == "broker":
                self.to_broker.append(crossed(message))
            elif isinstance(message, p.Failed):
                assert message.kind == p.OVERSIZED
                assert message.id not in self.outcomes
                self.outcomes[message.id] = "too large"
            elif isinstance(message, p.Results):
                for id in message.ids:
                    assert id not in self.outcomes
                    self.outcomes[id] = "done"
        self.submission.check_invariants()

    def take(self, sends: list[Any]) -> None:
        for to, message in sends:
            if to == "client":
                self.to_client.append(crossed(message))
            elif isinstance(message, p.Run):
                self.runs.append(message)
            elif isinstance(message, p.Revoke):
                self.revoke(message)
        self.scheduler.check_invariants()
        (one,) = self.scheduler._clients.values()
        self.peak = max(self.peak, one.bytes)

    def revoke(self, revoke: p.Revoke) -> None:
        """The chunk comes back as a whole."""
        for run in self.runs:
            if run.lease == revoke.lease:
                self.runs.remove(run)
                back = p.Returned(run.lease, list(range(len(run.ids))))
                self.take(self.scheduler.receive("worker", back, 0.0))
                return

    def step(self) -> bool:
        """Somebody does something; False if there is nothing to do."""
        choices = [queue for queue in (self.to_broker, self.to_client, self.runs) if queue]
        if not choices:
            return False
        queue = self.chance.choice(choices)
        if queue is self.to_broker:
            self.take(self.scheduler.receive("client", self.to_broker.popleft(), 0.0))
        elif queue is self.to_client:
            self.send(self.submission.receive(self.to_client.popleft(), 0.0))
        else:
            run = self.runs.pop(self.chance.randrange(len(self.runs)))
            count = len(run.ids)
            done = p.Done(run.lease, list(range(count)), bytes(count), [b""] * count, 0.001)
            self.take(self.scheduler.receive("worker", done, 0.0))
        return True


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_submitted_is_done_within_the_grant(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times what the broker takes, of all sizes,
    with functions and arguments that are shared; and some cancelled.
    """
    monkeypatch.setattr(budget_module, "FLOOR", UNIT)
    monkeypatch.setattr(budget_module, "FIRST", 2 * UNIT)
    monkeypatch.setattr(submission_module, "LARGE", UNIT)
    monkeypatch.setattr(submission_module, "BYTES_KEPT", 3 * UNIT)
    scene = Scene(seed)
    chance, limits = scene.chance, scene.limits
    submission = scene.submission
    sizes = (0, 100, limits.client_bytes // 10, limits.client_bytes // 2, limits.client_bytes)
    total, id, blob = 0, 0, 0
    blobs: list[int] = []
    cancelled: set[int] = set()
    while total < 10 * limits.memory:
        if len(blobs) < 3 or chance.random() < 0.2:
            blob += 1
            blobs.append(blob)
            shared = bytes(chance.choice((10, UNIT, limits.client_bytes // 3)))
            submission.add_blob(blob, shared, is_kept=chance.random() < 0.5)
        recent = blobs[-3:]
        named = chance.sample(recent, min(len(recent), chance.randint(1, 2)))
        if not all(submission.knows_blob(one) for one in named):
            blobs = [one for one in blobs if submission.knows_blob(one)]
            continue
        group = p.Group(named[0], 0, blobs=tuple(named[1:]))
        count = chance.randint(1, 6)
        payloads: list[p.Payload] = [bytes(chance.choice(sizes)) for _ in range(count)]
        ids = list(range(id + 1, id + 1 + count))
        id += count
        total += bytes_of(payloads)
        scene.send(submission.submit(group, ids, payloads))
        if chance.random() < 0.1:
            gone = [one for one in ids if one not in scene.outcomes and chance.random() < 0.5]
            cancelled.update(gone)
            scene.send(submission.cancel(gone))
        for _ in range(chance.randint(0, 10)):
            scene.step()
    while scene.step():
        pass
    assert scene.outcomes.keys() | cancelled == set(range(1, id + 1))
    assert scene.outcomes.keys().isdisjoint(cancelled)
    assert len(submission) == 0
    assert scene.peak <= max(limits.client_bytes, limits.argument_max)
