"""What a seed stands for: the cluster, its work, and which kinds of fault befall it
(each with p = 0.6).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from achilles.core.charges import LOSSES_MAX
from achilles.core.liveness import Timings
from achilles.core.protocol import PLAIN, Group, Options
from achilles.core.runners import START_SECONDS
from tests.sim.oracle import ALWAYS, Truth, task_payload

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
    "kill",  # tasks are cancelled that are not to go on where they run
    "client-leave",
    "client-pause",
    "hostile",  # a client says what it must not
    "broker-crash",
    "broker-pause",
    "black-hole",  # every task ends its runner at a worker
)

CHANCE = 0.6
# Where the network and the workers do what they should, more can be asked of the system.
SOUND = frozenset({"runner-crash", "poison", "cancel", "kill", "broker-pause"})  # no peer is lost
CALM = frozenset({"cancel", "kill", "client-leave"})  # and nothing is to be late
HEARD = frozenset({"runner-crash", "poison", "cancel", "kill"})  # nor what a client says
# Nothing but the broker's own end keeps a worker from being back in time.
PROMPT = frozenset(
    {"runner-crash", "poison", "cancel", "kill", "client-leave", "worker-crash", "broker-crash"}
)
WORK_SECONDS_MAX = 12.0  # a slot, so that a run does not take for ever
TAGS = ("big", "gpu")


class Trim(NamedTuple):
    """What of a plan to leave out, to look at a failure with less of everything."""

    kinds: frozenset[str] | None = None  # only these kinds of fault
    tasks: int | None = None  # only so many tasks
    workers: int | None = None  # only so many workers
    horizon: float | None = None  # the faults end after so much of their time

    def __str__(self) -> str:
        """The same as arguments of ``python -m tests.sim``."""
        words = [] if self.kinds is None else ["--kinds", *(k for k in KINDS if k in self.kinds)]
        for name in ("tasks", "workers", "horizon"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", f"{value:g}"]
        return " ".join(words)


WHOLE = Trim()


@dataclass
class Plan:
    """Drawn from the seed alone; ``kinds`` can be given,
    to look at a failure with fewer of them.
    """

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
    losses_max: int
    is_supervised: bool  # a broker knows which workers the last one had
    clients: list[int]  # slots_max of each
    workers: list[int]  # slots of each
    tags: list[tuple[str, ...]]  # of each; the first has all that any task wants
    batches: list[tuple[float, list[Truth]]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether no session should end but by its peer's wish."""
        return self.kinds <= SOUND

    @property
    def has_tags(self) -> bool:
        """Whether some workers cannot run all tasks."""
        return any(self.tags)

    @property
    def has_timeouts(self) -> bool:
        """Whether some tasks may run for so long only."""
        return any(truth.options.timeout for _, batch in self.batches for truth in batch)

    @property
    def is_calm(self) -> bool:
        """Whether nothing should be late."""
        return self.kinds <= CALM

    @property
    def is_heard(self) -> bool:
        """Whether what a client says comes soon to where its tasks run."""
        return self.kinds <= HEARD

    @property
    def round_trip(self) -> float:
        """An upper bound, from one end to the other and back,
        while the network is as it should be.
        """
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


def make_plan(seed: int, trim: Trim = WHOLE) -> Plan:
    """The plan of a seed: a quarter with no or few kinds of fault,
    each twentieth with all of them.
    """
    swarm = random.Random(f"{seed}/swarm")
    drawn = frozenset(kind for kind in KINDS if swarm.random() < CHANCE)
    if seed % 8 == 0:
        drawn &= CALM
    elif seed % 8 == 4:
        drawn &= SOUND
    elif seed % 20 == 1:
        drawn = frozenset(KINDS)
    elif seed % 20 == 3:
        drawn = drawn & PROMPT | {"broker-crash"}
    chance = random.Random(f"{seed}/topology")
    scale = chance.choice((1.0, 3.0, 5.0))
    plan = Plan(
        seed=seed,
        kinds=drawn if trim.kinds is None else trim.kinds,
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
        tags=[],
        is_supervised=random.Random(f"{seed}/supervisor").random() < 0.7,
        losses_max=random.Random(f"{seed}/limits").choice((LOSSES_MAX, LOSSES_MAX, 2)),
    )
    _add_tags(plan)
    _add_work(plan)
    _trim(plan, trim)
    return plan


def _trim(plan: Plan, trim: Trim) -> None:
    if trim.workers is not None:
        del plan.workers[trim.workers :], plan.tags[trim.workers :]
    if trim.horizon is not None:
        plan.horizon *= trim.horizon
    if trim.tasks is not None:
        left = trim.tasks
        for _, batch in plan.batches:
            del batch[left:]
            left -= len(batch)
        plan.batches = [(at, batch) for at, batch in plan.batches if batch]


def _add_tags(plan: Plan) -> None:
    chance = plan.stream("tags")
    plan.tags = [()] * len(plan.workers)
    if chance.random() < 0.4:
        sets = [(), TAGS[:1], TAGS[1:], TAGS]
        plan.tags = [TAGS, *(chance.choice(sets) for _ in plan.workers[1:])]


def _add_work(plan: Plan) -> None:
    chance = plan.stream("work")
    total = int(20 * 15 ** (chance.random() ** 1.5))  # from 20 to 300, rather few
    profiles: dict[tuple[int, int], str] = {}
    next_ids = [1] * len(plan.clients)
    groups = [_groups(chance, plan.has_tags) for _ in plan.clients]
    while total > 0:
        client = chance.randrange(len(plan.clients))
        group = chance.choice(groups[client])
        profile = profiles.setdefault((client, group.fn), chance.choice(_PROFILES))
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
    _set_times(chance, tasks)
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


def _set_times(chance: random.Random, tasks: list[Truth]) -> None:
    """Where there is a timeout, a task keeps to it clearly, or clearly does not."""
    overlong = 0
    for truth in tasks:
        timeout = truth.options.timeout
        if timeout:
            truth.seconds = min(truth.seconds, 0.8 * timeout)
            if chance.random() < 0.15 and overlong < OVERLONG_MAX:
                overlong += 1
                truth.seconds = timeout * chance.uniform(1.5, 4.0) + 2 * START_SECONDS


OVERLONG_MAX = 12  # tasks in a run that have to be ended
_PROFILES = ("instant", "tiny", "short", "long", "mixed", "mixed")


def _groups(chance: random.Random, has_tags: bool) -> list[Group]:
    """Functions with their initializer, chunk_max, options and other blobs;
    number 0 travels with each call.
    """
    return [
        Group(
            fn,
            chance.choice((0, 0, 100)),
            chance.choice((0, 0, 1, 3, 10)),
            _options(chance, has_tags),
            chance.choice(((), (), (), (201,), (201, 202))),
        )
        for fn in range(chance.choice((0, 1)), chance.randint(2, 5))
    ]


def _options(chance: random.Random, has_tags: bool) -> Options | None:
    at_most_once = chance.random() < 0.15
    options = Options(
        timeout=chance.choice((0.0, 0.0, 0.05, 0.2, 0.5)),
        retries=0 if at_most_once else chance.choice((0, 0, 0, 1, 3)),
        at_most_once=at_most_once,
        priority=chance.choice((0, 0, 0, -3, 2, 7)),
        tags=chance.choice(((), TAGS[:1], TAGS[1:], TAGS)) if has_tags else (),
    )
    return None if options == PLAIN or chance.random() < 0.3 else options


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
    group: Group,
    profile: str,
    has_poison: bool,
) -> Truth:
    return Truth(
        client=client,
        id=id,
        group=group,
        seconds=_seconds(chance, profile),
        is_poison=chance.random() < 0.02 and has_poison,
        raises_until=chance.choice((1, 2, ALWAYS)) if chance.random() < 0.12 else 0,
        payload=task_payload(client, id, chance.choice((0, 20))),
    )
