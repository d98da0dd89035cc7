"""A bench for the agent, and what it is expected to send."""

from __future__ import annotations

from typing import Any

from achilles.core import protocol as p
from achilles.core.agent import Agent
from achilles.core.runners import LONG_SECONDS
from tests.unit.core.bench import BROKER, Bench, crossed

HOST = "host"
STEADY = LONG_SECONDS  # that a task takes: another may wait behind it


class AgentBench(Bench):
    """A worker's agent that knows blob 1 of client 1."""

    core: Agent

    def __init__(self, slots: int = 1, *, tasks_max: int = 0) -> None:
        super().__init__(Agent(slots, tasks_max=tasks_max))
        self.hear(p.Blob(client=1, blob=1, payload=b"b1"))

    def hear(self, message: Any) -> None:
        """A message of the broker, or an event of the runners' host."""
        self.step(self.core.receive(crossed(message), self.now))

    def run(self, lease: int, *ids: int, **fields: Any) -> None:
        """A lease arrives; of blob 1 of client 1, unless ``fields`` say otherwise."""
        payloads: list[p.Payload] = [b"%d" % id for id in ids]
        fields = {"client": 1, "fn": 1, "init": 0, **fields}
        self.hear(p.Run(lease=lease, ids=list(ids), payloads=payloads, **fields))

    def finish(self, runner: int, *rows: tuple[int, int], seconds: float = STEADY) -> None:
        """A runner's values, each ``(seq, index)``."""
        made = [(seq, at, p.VALUE, seconds, b"v%d.%d" % (seq, at)) for seq, at in rows]
        self.hear(p.RunnerDone(runner=runner, results=made))

    def recalled(self, runner: int, *unstarted: tuple[int, int]) -> None:
        """A runner's tasks are taken back, ``(seq, count)`` each."""
        self.hear(p.RunnerRecalled(runner=runner, unstarted=list(unstarted)))

    def die(
        self, runner: int, *unstarted: tuple[int, int], last_seq: int, reason: str = "was killed"
    ) -> None:
        """A runner ends with these tasks unstarted, ``(seq, count)`` each."""
        self.hear(
            p.RunnerDied(runner=runner, reason=reason, unstarted=list(unstarted), last_seq=last_seq)
        )


def busy(*ids: int, tasks_max: int = 0, **fields: Any) -> AgentBench:
    """A bench whose only runner has lease 1 with these tasks."""
    bench = AgentBench(tasks_max=tasks_max)
    bench.run(1, *ids, **fields)
    bench.sent()
    return bench


LOAD = (HOST, p.Load(runner=1, client=1, blob=1, payload=b"b1"))


def execute(runner: int, seq: int, *ids: int, **fields: Any) -> tuple[str, Any]:
    """The command that gives a runner the bench's tasks."""
    payloads: list[p.Payload] = [b"%d" % id for id in ids]
    fields = {"client": 1, "fn": 1, "init": 0, **fields}
    return HOST, p.Execute(runner=runner, seq=seq, payloads=payloads, ids=list(ids), **fields)


def started(runner: int, *ids: int) -> list[tuple[str, Any]]:
    """All that a chunk for a new runner takes."""
    load = (HOST, p.Load(runner=runner, client=1, blob=1, payload=b"b1"))
    return [(HOST, p.Spawn(runner=runner)), load, execute(runner, 1, *ids)]


def done(lease: int, *rows: tuple[int, int], seconds: float = STEADY) -> tuple[str, Any]:
    """The report of values, each ``(seq, index)``; ``seconds`` a task."""
    return BROKER, p.Done(
        lease=lease,
        indexes=[index for _, index in rows],
        statuses=bytes(len(rows)),
        payloads=[b"v%d.%d" % row for row in rows],
        seconds=seconds * len(rows),
    )


def returned(lease: int, *indexes: int) -> tuple[str, Any]:
    """The report of tasks that did not start."""
    return BROKER, p.Returned(lease=lease, indexes=list(indexes))


def crashed(lease: int, index: int, reason: str = "was killed") -> tuple[str, Any]:
    """The report of a crash."""
    return BROKER, p.Crashed(lease=lease, index=index, reason=reason)


def recall(runner: int, *, keeps_first: bool = False) -> tuple[str, Any]:
    """The command that takes back what has not started."""
    return HOST, p.Recall(runner=runner, keeps_first=keeps_first)


def retire(runner: int) -> tuple[str, Any]:
    """The command that lets a runner end."""
    return HOST, p.Retire(runner=runner)
