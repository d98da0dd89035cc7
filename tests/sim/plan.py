"""What a seed stands for: the cluster, its work, and which kinds of fault befall it (each with p = 0.6)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from achilles.core.liveness import Timings
from tests.sim.oracle import Truth, task_payload

KINDS = (
    "cut",  # a connection breaks
    "drop",  # the network loses single messages, as ZeroMQ does at its high-water marks
    "mute",  # a connection carries nothing for a while, in one direction or in both
    "slow",  # all delays grow for a while
    "worker-crash",
    "worker-pause",
    "worker-drain",
    "runner-crash",
    "poison",  # tasks that kill their runner each time
    "cancel",
    "client-leave",
    "client-pause",
    "broker-crash",
    "broker-pause",
)

CHANCE = 0.6
# Where the network and the workers do what they should, more can be asked of the system.
SOUND = frozenset({"runner-crash", "poison", "cancel", "broker-pause"})  # nobody is to be given up
CALM = frozenset({"cancel", "client-leave"})  # and nothing is to be late
WORK_SECONDS_MAX = 12.0  # a slot, so that a run does not take for ever


@dataclass
class Plan:
    """Drawn from the seed alone; ``kinds`` can be given, to look at a failure with fewer of them."""

    seed: int
    kinds: frozenset[str]
    timings: Timings
    scale: float  # the timings are DESIGN's, divided by this
    horizon: float  # when the faults end
    delay: float
    spawn_seconds: float
    credit: int
    tasks_max: int
    blobs_kept: int
    clients: list[int]  # slots_max of each
    workers: list[int]  # slots of each
    batches: list[tuple[float, list[Truth]]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether no session should end but by its peer's wish."""
        return self.kinds <= SOUND

    @property
    def is_calm(self) -> bool:
        """Whether nothing should be late."""
        return self.kinds <= CALM

    @property
    def round_trip(self) -> float:
        """An upper bound, from one end to the other and back, while the network is as it should be."""
        return 4 * 4 * self.delay + 0.02

    def stream(self, name: str) -> random.Random:
        """A stream of chance of its own, so that one kind's numbers do not shift another's."""
        return random.Random(f"{self.seed}/{name}")

    def __str__(self) -> str:
        tasks = sum(len(batch) for _, batch in self.batches)
        return (
            f"seed {self.seed}: {len(self.clients)} clients, workers {self.workers}, {tasks} tasks, "
            f"delay {self.delay:.4f} s, scale {self.scale:g}, credit {self.credit}, "
            f"faults until {self.horizon:.1f} s: {' '.join(k for k in KINDS if k in self.kinds) or 'none'}"
        )


def make_plan(seed: int, kinds: frozenset[str] | None = None) -> Plan:
    """The plan of a seed: a quarter with no or few kinds of fault, each twentieth with all of them."""
    swarm = random.Random(f"{seed}/swarm")
    drawn = frozenset(kind for kind in KINDS if swarm.random() < CHANCE)
    if seed % 8 == 0:
        drawn &= CALM
    elif seed % 8 == 4:
        drawn &= SOUND
    elif seed % 20 == 1:
        drawn = frozenset(KINDS)
    chance = random.Random(f"{seed}/topology")
    scale = chance.choice((1.0, 3.0, 5.0))
    plan = Plan(
        seed=seed,
        kinds=drawn if kinds is None else kinds,
        timings=Timings(*(seconds / scale for seconds in Timings())),
        scale=scale,
        horizon=chance.uniform(4.0, 30.0) / scale,
        delay=chance.choice((0.0001, 0.0005, 0.002, 0.01, 0.05)),
        spawn_seconds=chance.choice((0.02, 0.1, 0.3)),
        credit=chance.choice((0, 0, chance.randint(1, 50))),
        tasks_max=chance.choice((0, 0, 0, chance.randint(1, 12))),
        blobs_kept=chance.choice((0, 1, 256)),
        clients=[
            chance.choice((0, 0, 0, chance.randint(1, 4))) for _ in range(chance.randint(1, 3))
        ],
        workers=[chance.randint(1, 4) for _ in range(chance.randint(1, 6))],
    )
    _add_work(plan)
    return plan


def _add_work(plan: Plan) -> None:
    chance = plan.stream("work")
    total = int(20 * 15 ** (chance.random() ** 1.5))  # from 20 to 300, rather few
    profiles: dict[tuple[int, int], str] = {}
    next_ids = [1] * len(plan.clients)
    groups = [_groups(chance) for _ in plan.clients]
    while total > 0:
        client = chance.randrange(len(plan.clients))
        group = chance.choice(groups[client])
        profile = profiles.setdefault((client, group[0]), chance.choice(_PROFILES))
        batch = []
        for _ in range(min(total, chance.choice((1, 3, 10, 40, 100)))):
            id = next_ids[client]
            next_ids[client] += 1
            batch.append(_task(chance, client, id, group, profile, "poison" in plan.kinds))
        total -= len(batch)
        at = 0.0 if chance.random() < 0.5 else chance.uniform(0.0, plan.horizon)
        plan.batches.append((at, batch))
    tasks = [truth for _, batch in plan.batches for truth in batch]
    share = sum(truth.seconds for truth in tasks) / sum(plan.workers)
    if share * plan.scale > WORK_SECONDS_MAX:
        for truth in tasks:
            truth.seconds *= WORK_SECONDS_MAX / (share * plan.scale)
    if chance.random() < 0.02:
        chance.choice(tasks).payload += b"." * 70_000  # travels in a part of its own
    # A client's ids ascend in the order in which it submits.
    plan.batches.sort(key=lambda entry: entry[0])
    seen = [1] * len(plan.clients)
    for truth in (truth for _, batch in plan.batches for truth in batch):
        padding = truth.payload.split(b"/", 2)[2]
        truth.id = seen[truth.client]
        truth.payload = task_payload(truth.client, truth.id, len(padding))
        seen[truth.client] += 1


_PROFILES = ("instant", "tiny", "short", "long", "mixed", "mixed")


def _groups(chance: random.Random) -> list[tuple[int, int, int]]:
    """Functions with their initializer and chunk_max; number 0 travels with each call."""
    return [
        (fn, chance.choice((0, 0, 100)), chance.choice((0, 0, 1, 3, 10)))
        for fn in range(chance.choice((0, 1)), chance.randint(2, 5))
    ]


def _seconds(chance: random.Random, profile: str) -> float:
    if profile == "mixed":
        profile = "long" if chance.random() < 0.05 else "tiny"
    match profile:
        case "instant":
            return 0.0
        case "tiny":
            return chance.uniform(0.0001, 0.001)
        case "short":
            return chance.uniform(0.001, 0.03)
        case _:
            return chance.uniform(0.05, 3.0)


def _task(
    chance: random.Random,
    client: int,
    id: int,
    group: tuple[int, int, int],
    profile: str,
    has_poison: bool,
) -> Truth:
    return Truth(
        client=client,
        id=id,
        group=group,
        seconds=_seconds(chance, profile),
        is_poison=chance.random() < 0.02 and has_poison,
        does_raise=chance.random() < 0.1,
        payload=task_payload(client, id, chance.choice((0, 20))),
    )
