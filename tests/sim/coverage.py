"""What a run of some thousand seeds must have reached, or it proves too little.

Each transition of a task, a lease, a runner and a session, as the simulated nodes and
`tests.sim.watch` mark them where they happen, and each place where something is made to go wrong.
Not listed is what no peer that keeps to the protocol can bring about.
"""

from __future__ import annotations

from collections.abc import Mapping

TRANSITIONS = {
    "task": (
        "> queued",
        "queued > leased",
        "queued > cancelled",
        "queued > cancelled, to be killed",
        "queued > dropped, its client left",
        "leased > done",
        "leased > cancelled",
        "leased > cancelled, to be killed",
        "leased > dropped, its client left",
        "leased > queued, it raised",
        "leased > queued, it timed out",
        "leased > queued, it was returned",
        "leased > queued, its runner died",
        "leased > queued, its worker left",
        "leased > queued, its worker was lost",
        "leased > failed as crashed",
        "leased > failed as crashed, at most once",
        "leased > failed as lost",
        "leased > failed as lost, at most once",
        "leased > failed as timeout",
        "cancelled > done",
        "cancelled > returned",
        "queued > failed as lost, at most once",
    ),
    "lease": ("made for a slot", "made in advance", "moved into a slot", "closed"),
    "revoke": (
        "of an ended lease",
        "of a chunk without a runner",
        "of the first chunk",
        "of the first chunk, to be killed",
        "of a chunk behind",
        "of a chunk behind, to be killed",
    ),
    "agent": (
        "reset with work",
        "> draining",
        "draining > given a chunk",
        "draining while a task is condemned",
    ),
    "runner": (
        "none for a chunk",
        "idle > busy",
        "idle > died",
        "busy > a chunk behind",
        "busy > recalled",
        "busy > died",
        "died > a chunk crossed with it",
        "condemned > waits for its neighbours",
        "condemned > pardoned",
        "condemned > killed, timeout",
        "condemned > killed, unwanted",
        "killed > died",
        "killed by a reset > died",
        "> retiring",
        "retiring > exited",
    ),
    "session": (
        "> begun",
        "> refused",
        "begun > hello repeated",
        "moved to another route",
        "suspect",
        "suspect > ready",
        "ready > quarantined",
        "quarantined > ready",
        "closed > back within its grace",
        "amnesty",
        "client > ended, by itself",
        "client > ended, closed",
        "client > ended, silent",
        "client > ended, refused",
        "worker > ended, by itself",
        "worker > ended, closed",
        "worker > ended, silent",
    ),
    "recovery": (
        "a begun task is held",
        "a lease is adopted",
        "a held task is asked for",
        "a held result is asked for",
        "a queued task is held",
        "an unwanted task is held",
        "a client is not back in time",
        "all are back",
        "time is over",
    ),
    "peer": ("calling > joined", "joined > calling", "told that its session is gone"),
    "link": (
        "gets a message twice",
        "misses a message",
        "misses the last message",
        "sends again",
    ),
}

# Too rare to be asked for: a hello that comes late, when its peer's session has long got further.
RARE = frozenset(
    {
        "session: begun > begun anew",
        "session: client > ended, anew",
        "session: worker > ended, anew",
    }
)

FAULT_SITES = (
    "a connection is cut",
    "a partition of many",
    "a cut lets a part through",
    "a cut that the broker does not see",
    "a connection that the peer does not see",
    "a message comes after its connection",
    "messages are dropped for a while",
    "a message is dropped",
    "a connection is mute both ways",
    "a connection is mute upwards",
    "a connection is mute downwards",
    "the network is slow for a while",
    "a worker crashes",
    "a worker drains",
    "a worker is stopped",
    "a worker becomes a black hole",
    "a runner dies in a task",
    "a runner dies between tasks",
    "a runner dies with work",
    "a runner dies idle",
    "a task kills its runner",
    "tasks are cancelled",
    "a task that runs is to be killed",
    "some tasks that run are to be killed",
    "some tasks are to be killed, running or not",
    "all tasks are to be killed",
    "tasks are to be killed while their worker drains",
    "a client leaves",
    "a client dies",
    "a client is stopped",
    "a hostile peer sends no message",
    "a hostile peer acknowledges what was never sent",
    "a hostile peer says what its role may",
    "a hostile peer says what its role may not",
    "the broker crashes",
    "the broker would crash again",
    "the broker is stopped",
)

NAMES = frozenset(
    [f"{thing}: {what}" for thing, changes in TRANSITIONS.items() for what in changes]
    + [f"fault: {site}" for site in FAULT_SITES]
)


def missing(marks: Mapping[str, int]) -> list[str]:
    """What was not reached."""
    return sorted(name for name in NAMES if not marks.get(name))


def unknown(marks: Mapping[str, int]) -> list[str]:
    """Marks that no list has: a misspelt name would be looked for in vain."""
    return sorted(name for name in marks if ": " in name and name not in NAMES | RARE)
