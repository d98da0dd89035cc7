"""Whatever peers with valid keys say, in whatever order, the broker's decisions stay whole:
by seed, without a network.

Clients and workers that come, lie and leave; each message is one that the codec lets through, with
small numbers, so that leases, tasks and clients of others are hit often. A `ProtocolError` is a
peer's fault. Anything else is ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.dispatch import Send
from achilles.core.recovery import stable_number
from achilles.core.scheduler import Scheduler
from achilles.errors import ProtocolError
from tests.security.attacks import attack
from tests.unit.core.bench import crossed

STEPS = 300
OPTIONS = (
    None,
    None,
    p.Options(retries=1),
    p.Options(at_most_once=True),
    p.Options(timeout=1.0, priority=1),
    p.Options(tags=("gpu",)),
)


class Liars:
    """A scheduler, and peers that say anything."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.now = 0.0
        self.scheduler = Scheduler(
            credit=chance.choice([0, 20]),
            epoch=chance.choice([0, 3]),
            recovery=chance.choice([0.0, 1.0]),
            patience=chance.choice([0.0, 5.0]),
            awaited=chance.choice([None, frozenset()]),
        )
        self.incarnations = [bytes([number]) * 16 for number in range(1, 9)]
        self.peers: dict[str, str] = {}  # their roles
        self.leases = [1, 2, 3]
        self.clients = [1, 2, 3, *map(stable_number, self.incarnations)]
        self.count = 0

    def step(self) -> None:
        """Something happens, and the rules hold."""
        chance, scheduler = self.chance, self.scheduler
        if chance.random() < 0.3:
            self.now += chance.choice([0.001, 0.01, 0.3, 1.0])
        what = chance.random()
        if what < 0.08 or len(self.peers) < 3:
            self.join()
        elif what < 0.12:
            self.leave(chance.choice([*self.peers]))
        elif what < 0.2:
            self.take(scheduler.tick(self.now))
        else:
            self.say(chance.choice([*self.peers]))
        scheduler.check_invariants()

    def join(self) -> None:
        chance = self.chance
        self.count += 1
        incarnation, is_back = chance.choice(self.incarnations), chance.random() < 0.5
        hello: p.ClientHello | p.WorkerHello
        if chance.random() < 0.5:
            role = "client"
            slots_max = chance.choice([0, 0, 2])
            hello = p.ClientHello(incarnation, role, "0", "3", "liar", slots_max, is_back)
        else:
            role = "worker"
            tags = chance.choice([[], ["gpu"]])
            slots = chance.randint(1, 3)
            hello = p.WorkerHello(incarnation, "0", "3", "liar", slots, 1, tags, is_back)
        name = f"{role}-{self.count}"
        self.peers[name] = role
        self.take(self.scheduler.join(name, hello, self.now))

    def leave(self, name: str) -> None:
        del self.peers[name]
        charge = self.chance.random() < 0.5
        self.take(self.scheduler.leave(name, self.now, "it left", charge=charge))

    def say(self, name: str) -> None:
        makers = self.of_client if self.peers[name] == "client" else self.of_worker
        try:
            message: Any = crossed(self.chance.choice(makers)(self))
            self.take(self.scheduler.receive(name, message, self.now))
        except ProtocolError:
            if self.chance.random() < 0.3:
                self.leave(name)
            return
        if isinstance(message, p.Goodbye):
            del self.peers[name]

    def take(self, sends: Iterable[Send]) -> None:
        """What others are told, everybody knows."""
        for _, message in sends:
            message = crossed(message)
            if isinstance(message, p.Run):
                self.leases += [message.lease] * 3
                self.clients.append(message.client)

    # --- Things to say ----------------------------------------------------------------------------

    def numbers(self, most: int = 6, count: int = 4) -> list[int]:
        return [self.chance.randint(0, most) for _ in range(self.chance.randint(0, count))]

    def lease(self) -> int:
        return self.chance.choice(self.leases[-30:]) + self.chance.choice([0, 0, 0, 1])

    def submit(self) -> p.Submit:
        chance, ids = self.chance, self.numbers(9, 5)
        return p.Submit(
            chance.choice([0, 0, 1, 2]),
            chance.choice([0, 0, 3]),
            ids,
            [b"call"] * len(ids),
            chance.choice([0, 0, 1]),
            chance.choice(OPTIONS),
            chance.choice([(), (), (4,)]),
            chance.choice([False, False, True]),
        )

    def done(self) -> p.Done:
        is_any = self.chance.random() < 0.3
        indexes = self.numbers(4) if is_any else list(range(self.chance.randint(0, 3)))
        statuses = bytes(self.chance.choice([0, 0, 1, 2]) for _ in indexes)
        seconds = self.chance.choice([0.0, 0.001, 5.0])
        return p.Done(self.lease(), indexes, statuses, [b"value"] * len(indexes), seconds)

    def held(self) -> p.Held:
        chance, ids = self.chance, self.numbers(9, 5)
        indexes = sorted(chance.sample(range(len(ids)), chance.randint(0, len(ids))))
        lease = chance.choice([self.lease(), chance.randint(1, 1 << 62)])
        client = chance.choice([*self.clients, chance.randint(0, 1 << 62)])
        return p.Held(lease, client, ids, indexes, self.numbers(), chance.randint(0, 3))

    def relay(self) -> p.Relay:
        things: list[p.FromTask] = [
            self.submit(),
            self.submit(),
            p.Blob(0, self.chance.randint(1, 4), b"blob"),
            p.Forget(0, self.numbers()),
            p.Cancel(self.numbers(9), self.chance.random() < 0.5),
            p.StatusRequest(),
            p.Goodbye(),
        ]
        runner, client = self.chance.randint(0, 2), self.chance.choice(self.clients)
        return p.Relay(runner, client, self.lease(), self.chance.choice(things))

    def letter(self) -> p.Letter:
        kind = self.chance.choice([p.IMPORT, p.OUTPUT])
        worker, client = self.chance.randint(0, 9), self.chance.choice(self.clients)
        return p.Letter(worker, 1, client, kind, b"letter")

    def crashed(self) -> p.Crashed:
        kind = self.chance.choice([p.CRASHED, p.TIMEOUT])
        return p.Crashed(self.lease(), self.chance.randint(0, 3), "it died", kind)

    of_client: tuple[Callable[[Liars], p.Wire], ...] = (
        *(submit,) * 3,
        lambda self: p.Blob(0, self.chance.randint(1, 4), b"blob"),
        lambda self: p.Blob(0, self.chance.randint(1, 4), b"blob"),
        lambda self: p.Forget(0, self.numbers()),
        lambda self: p.Cancel(self.numbers(9), self.chance.random() < 0.5),
        lambda self: p.StatusRequest(),
        lambda self: p.Resumed(),
        lambda self: p.Goodbye("it left"),
        letter,
    )
    of_worker: tuple[Callable[[Liars], p.Wire], ...] = (
        *(done,) * 3,
        *(held,) * 3,
        *(relay,) * 2,
        lambda self: p.Returned(self.lease(), self.numbers(4)),
        lambda self: p.Drain(),
        lambda self: p.Resumed(),
        crashed,
        letter,
    )


@attack("T12", "T24")
@pytest.mark.parametrize("seed", range(30))
def test_liars_break_no_rule(seed: int) -> None:
    liars = Liars(seed)
    for _ in range(STEPS):
        liars.step()


@attack("T12")
def test_a_task_that_a_worker_claims_to_hold_is_claimed_once() -> None:
    """By a client that is back, whether or not it says that it submits it again."""
    scheduler = Scheduler(recovery=1.0, patience=5.0, epoch=1)
    incarnation = b"c" * 16
    hello = p.WorkerHello(b"w" * 16, "0", "3", "liar", 1, 1, [], True)
    scheduler.join("worker", hello, 0.0)
    held = p.Held(7, stable_number(incarnation), [5], [0], [])
    scheduler.receive("worker", held, 0.0)
    scheduler.join("client", p.ClientHello(incarnation, "client", "0", "3", "c", 0, True), 0.0)
    scheduler.receive("client", p.Submit(0, 0, [5], [b"call"]), 0.0)
    scheduler.check_invariants()
    assert scheduler.status(0.0).running == 1
