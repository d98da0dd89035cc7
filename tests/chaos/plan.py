"""The schedules: which faults befall whom and when, by seed;
and what a run must have seen to have proved something.

    N1 SIGKILL runners              N7 reset connections           N13 full disks
    N2 SIGKILL workers              N8 black holes, half-open      N14 memory hogs, and the kernel's
    killer N3 SIGKILL the broker           N9 flapping                    N15 no processor time
    N4 SIGKILL clients              N10 slow, narrow links         N16 jumps of the wall clock
    N5 SIGSTOP anybody              N11 bits turned on the wire    N17 hostile peers
    N6 SIGTERM: rolling drain       N12 no descriptors left        N18 everything

Pure: a plan is a function of its seed, so it can be printed, replayed and tested.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple


class Fault(NamedTuple):
    """``kind`` befalls the target ``at`` seconds into the run;
    what lasts is healed ``seconds`` later.
    """

    at: float
    kind: str
    target: int = 0  # which worker, runner or client, modulo how many there are
    seconds: float = 0.0
    amount: float = 0.0  # the kind's own: a delay, a rate, a jump, which way


class Range(NamedTuple):
    """How long a kind of fault lasts, and how strong it is."""

    seconds: tuple[float, float] = (0.0, 0.0)
    amount: tuple[float, float] = (0.0, 0.0)


# Durations are for a cluster whose every timeout is a fifth of the shipped one:
# lost after 3 s, grace 0.4 s.
KINDS: dict[str, Range] = {
    "kill runner": Range(),
    "kill worker": Range((0.1, 1.0)),  # until there is another one
    "kill broker": Range((0.1, 1.0)),  # likewise, where nobody supervises it
    "kill client": Range(),
    "stop runner": Range((0.3, 2.0)),
    "stop worker": Range((0.5, 6.0)),
    "stop broker": Range((0.3, 5.0)),
    "stop client": Range((0.5, 4.0)),
    "drain worker": Range(),
    "reset": Range(),
    "black hole": Range((0.5, 6.0)),
    "black hole up": Range((0.5, 6.0)),
    "black hole down": Range((0.5, 6.0)),
    "half-open": Range((0.5, 5.0)),
    "half-closed": Range(),
    "flap": Range((0.3, 0.7)),
    "slow": Range((1.0, 4.0), (0.1, 0.4)),
    "narrow": Range((1.0, 3.0), (64e3, 512e3)),
    "flip": Range((0.0, 0.0), (1, 3)),
    "no descriptors": Range((1.0, 3.0)),
    "full disk": Range((1.0, 4.0)),
    "memory killer": Range(),
    "starve": Range((1.0, 2.5)),
    "clock": Range((0.0, 0.0), (-31e6, 31e6)),
    "garbage": Range(),
    "idle connections": Range((0.5, 2.0)),
    "bad frames": Range(),
    "endless message": Range(),
    "unread": Range((1.0, 2.5)),  # the load L7: the first client's line is shut
}


class Nemesis(NamedTuple):
    """A named set of faults. ``every``: seconds between two on average;
    ``needs``: effects of a run of 20 s at least.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    every: float
    needs: Mapping[str, int]


_PARTITIONS = ("black hole", "black hole up", "black hole down", "half-open", "half-closed")
_HOSTILE = ("garbage", "idle connections", "bad frames", "endless message")
_STOPS = ("stop runner", "stop worker", "stop broker", "stop client")
_ALL = tuple(kind for kind in KINDS if kind not in ("full disk", "clock", "unread"))

NEMESES = {
    one.name: one
    for one in (
        Nemesis("N1", "runners killed", ("kill runner",), 0.25, {"kill runner": 20, "requeued": 3}),
        Nemesis("N2", "workers killed", ("kill worker",), 0.8, {"kill worker": 8, "requeued": 3}),
        Nemesis("N3", "broker killed", ("kill broker",), 4.0, {"kill broker": 3}),
        Nemesis("N4", "clients killed", ("kill client",), 1.2, {"kill client": 4}),
        Nemesis("N5", "anybody stopped", _STOPS, 1.5, {"stopped": 6}),
        Nemesis("N6", "rolling drain", ("drain worker",), 2.5, {"drain worker": 3}),
        Nemesis("N7", "resets", ("reset",), 0.6, {"reset": 15}),
        Nemesis("N8", "partitions", _PARTITIONS, 1.5, {"partition": 6}),
        Nemesis("N9", "flapping", ("flap",), 0.9, {"flap": 10}),
        Nemesis("N10", "slow links", ("slow", "narrow"), 1.5, {"slowed": 5, "delayed": 10_000}),
        Nemesis("N11", "bits turned", ("flip",), 1.0, {"flipped": 8}),
        Nemesis("N12", "no descriptors", ("no descriptors",), 4.0, {"no descriptors": 2}),
        Nemesis("N13", "full disks", ("full disk",), 3.0, {"full disk": 3}),
        Nemesis("N14", "memory", ("memory killer",), 0.5, {"memory killer": 12}),
        Nemesis("N15", "starvation", ("starve",), 4.0, {"starve": 2}),
        Nemesis("N16", "clock jumps", ("clock",), 0.5, {"clock": 20}),
        Nemesis("N17", "hostile peers", _HOSTILE, 1.0, {"hostile": 10}),
        Nemesis("N18", "everything", _ALL, 0.7, {"faults": 15, "requeued": 3}),
    )
}

# Those that befall processes, not the network: also where all are on this host, and meet over ipc.
NEAR = ("N1", "N2", "N3", "N4", "N5", "N6", "N12", "N15")
NEAR_NEEDS = {"in pipes": 2}  # the workers, whose messages go through pipes

LOADS = ("L1", "L2", "L3", "L4", "L5", "L6", "L7")
NEAR_LOADS = LOADS[:-1]  # the last one is about a line that is shut

# Loads that show nothing of a nemesis, or hide it, and what stands in:
# tasks that are long enough to be hit.
_LOAD_OF = {"N1": "L2", "N2": "L2", "N13": "L3", "N14": "L4", "N18": "L2"}
UNREAD_EVERY = 4.0  # of the load L7

FULL_SECONDS = 20.0  # what `needs` are for


class Plan(NamedTuple):
    """One run; ``is_near``: all meet over ipc, and not over TCP, each through a proxy."""

    seed: int
    nemesis: Nemesis
    load: str
    seconds: float
    faults: tuple[Fault, ...]
    is_near: bool = False

    @property
    def needs(self) -> dict[str, int]:
        """Effects without which the run proved nothing."""
        share = min(1.0, self.seconds / FULL_SECONDS)
        needs = {name: max(1, int(least * share)) for name, least in self.nemesis.needs.items()}
        return needs | NEAR_NEEDS if self.is_near else needs

    @property
    def command(self) -> str:
        """What runs it again."""
        return (
            f"python -m tests.chaos --seed {self.seed} --nemesis {self.nemesis.name} --load {self.load} "
            f"--seconds {self.seconds:g}" + (" --near" if self.is_near else "")
        )


def plan(
    seed: int,
    seconds: float,
    nemesis: str | None = None,
    load: str | None = None,
    *,
    is_near: bool = False,
) -> Plan:
    """The run of that seed; a nemesis and a load that are not named are drawn."""
    stream = random.Random(seed)
    drawn_nemesis = stream.choice(NEAR if is_near else list(NEMESES))
    drawn_load = stream.choice(NEAR_LOADS if is_near else LOADS)
    chosen = NEMESES[nemesis or drawn_nemesis]
    named = load or _LOAD_OF.get(chosen.name, drawn_load)
    found = faults(stream, chosen, seconds)
    if named == "L7" and not is_near:
        unread = Nemesis("L7", "", ("unread",), UNREAD_EVERY, {})
        found = sorted(found + faults(stream, unread, seconds))
    return Plan(seed, chosen, named, seconds, tuple(found), is_near)


def faults(stream: random.Random, nemesis: Nemesis, seconds: float) -> list[Fault]:
    """The faults in the order of their time. Each kind comes up before one comes up again,
    so that a run has all it can.
    """
    found: list[Fault] = []
    at = 0.2 * nemesis.every
    bag: list[str] = []
    while at < seconds:
        if not bag:
            bag = list(nemesis.kinds)
            stream.shuffle(bag)
        kind = bag.pop()
        lasting, amount = KINDS[kind]
        found.append(
            Fault(
                round(at, 3),
                kind,
                stream.randrange(1 << 16),
                round(min(stream.uniform(*lasting), seconds - at), 3),
                round(stream.uniform(*amount), 3),
            )
        )
        at += nemesis.every * stream.uniform(0.5, 1.5)
    return found


def round_of(seed: int, seconds: float, *, is_near: bool = False) -> list[Plan]:
    """Every nemesis once, each with a load of its own; the next seeds turn the loads on."""
    names = NEAR if is_near else tuple(NEMESES)
    loads = NEAR_LOADS if is_near else LOADS
    found = []
    for at, name in enumerate(names, seed):
        load = _LOAD_OF.get(name, loads[at % len(loads)])
        found.append(plan(at, seconds, name, load, is_near=is_near))
    return found
