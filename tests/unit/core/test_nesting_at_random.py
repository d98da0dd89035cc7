"""Trees of tasks through the real cores, in any order that messages may come in:
nothing waits for ever.

A scheduler, agents, and runners that are models: a task submits its children, in one or several
goes, waits for them, and is done. Runners die now and then, workers leave, and what a chunk holds
is taken back as the host would.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.agent import Agent
from achilles.core.scheduler import Scheduler
from achilles.core.submission import Submission
from tests.unit.core.bench import crossed

CLIENTS = ("one", "two")
STEPS_MAX = 60_000


class Runner:
    """A child process: what it has to start, what it runs,
    and what it has written that nobody has read.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: deque[tuple[p.Execute, int]] = deque()
        self.current: tuple[p.Execute, int] | None = None
        self.goes: list[int] = []  # how many children to submit at each go
        self.open: set[int] = set()  # ids of children
        self.clients: dict[int, Submission] = {}
        self.last_id = 0
        self.last_seq = 0
        self.wrote: deque[Any] = deque()  # letters and results, in order
        self.is_retiring = False


class Worker:
    """An agent, its runners, and its two ways to the broker."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.agent = Agent(slots)
        self.runners: dict[int, Runner] = {}
        self.up: deque[Any] = deque()
        self.down: deque[Any] = deque()


class World:
    """Everything, one random step after the other."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self.core = Scheduler(credit=chance.choice((0, 3, 50)))
        credit = self.core._credit
        self.workers: dict[str, Worker] = {}
        self.clients = {name: Submission() for name in CLIENTS}
        self.deaths = chance.choice((0, 0, 3))
        self.departures = chance.choice((0, 1))
        self.depth_max = chance.randint(1, 4)
        self.credit = credit
        for name, client in self.clients.items():
            limit = chance.choice((0, 0, 1))
            self.broker(
                self.core.join(name, p.ClientHello(bytes(16), "client", "", "", name, limit), 0.0)
            )
            client.connect(credit)
        for number in range(chance.randint(1, 3)):
            self.join(f"worker-{number}")
        self.wanted = 0
        for number, (name, client) in enumerate(self.clients.items()):
            count = chance.randint(1, 5)
            self.wanted += count
            paths = [b"%d.%d" % (number, at) for at in range(count)]
            ids = list(range(1, count + 1))
            self.user(name, client.submit(p.Group(0, 0), ids, list(paths)))

    def join(self, name: str) -> None:
        worker = self.workers[name] = Worker(name, self.chance.randint(1, 2))
        hello = p.WorkerHello(bytes(16), "", "", name, worker.agent._crew.slots, 1)
        self.broker(self.core.join(name, hello, self.now))

    # --- Who hears what ---------------------------------------------------------------------------

    def broker(self, sends: list[Any]) -> None:
        """What the broker sends goes out."""
        self.core.check_invariants()
        for to, message in sends:
            if to in self.workers:
                self.workers[to].down.append(crossed(message))
            elif to in self.clients:
                self.user(to, self.clients[to].receive(crossed(message), self.now))

    def user(self, name: str, sends: list[Any]) -> None:
        for to, message in sends:
            if to == "broker":
                self.broker(self.core.receive(name, crossed(message), self.now))
            elif isinstance(message, p.Results):
                self.wanted -= len(message.ids)
            elif isinstance(message, p.Failed):
                assert message.kind in (p.CRASHED, p.LOST), message
                self.wanted -= 1

    def agent(self, worker: Worker, sends: list[Any]) -> None:
        """What the agent says goes up, what it commands is done."""
        pending = deque(sends)
        while pending:
            to, message = pending.popleft()
            if to == "broker":
                worker.up.append(crossed(message))
            else:
                for event in self.command(worker, message):
                    pending.extend(worker.agent.receive(event, self.now))
        worker.agent.check_invariants()

    def command(self, worker: Worker, command: p.RunnerCommand) -> list[Any]:
        if isinstance(command, p.Spawn):
            worker.runners[command.runner] = Runner(command.runner)
            return []
        if command.runner not in worker.runners:
            return []
        runner = worker.runners[command.runner]
        match command:
            case p.Load() | p.Unload():
                pass
            case p.Execute():
                runner.last_seq = command.seq
                runner.queue.extend((command, index) for index in range(len(command.payloads)))
            case p.Recall():
                return [p.RunnerRecalled(runner.number, self.take(runner))]
            case p.Kill():
                return self.die(worker, runner, "was killed")
            case p.Retire():
                runner.is_retiring = True
            case p.ToRunner(client=client, body=body):
                message: Any = envelope.unpack(body)[1]
                for to, outcome in runner.clients[client].receive(message, self.now):
                    if to == "user":
                        ids = getattr(outcome, "ids", None) or [getattr(outcome, "id", 0)]
                        if not isinstance(outcome, p.Running):
                            runner.open.difference_update(ids)
                    else:
                        self.write(runner, client, outcome)
        return []

    def take(self, runner: Runner) -> list[tuple[int, int]]:
        counts: dict[int, int] = {}
        for execute, _ in runner.queue:
            counts[execute.seq] = counts.get(execute.seq, 0) + 1
        runner.queue.clear()
        return list(counts.items())

    def die(self, worker: Worker, runner: Runner, reason: str) -> list[Any]:
        del worker.runners[runner.number]
        events = list(runner.wrote)
        return [*events, p.RunnerDied(runner.number, reason, self.take(runner), runner.last_seq)]

    # --- What may happen next ---------------------------------------------------------------------

    def step(self) -> bool:
        """Something that can happen happens; False if nothing can but the passing of time."""
        options: list[Any] = []
        for worker in self.workers.values():
            if worker.down:
                options.append((self.deliver_down, worker))
            if worker.up:
                options.append((self.deliver_up, worker))
            for runner in worker.runners.values():
                if runner.wrote:
                    options.append((self.read, worker, runner))
                is_over = runner.is_retiring and not runner.queue
                if self.can_go_on(runner) or (
                    is_over and runner.current is None and not runner.wrote
                ):
                    options.append((self.go_on, worker, runner))
        if not options:
            return False
        action, *arguments = self.chance.choice(options)
        action(*arguments)
        return True

    def deliver_down(self, worker: Worker) -> None:
        self.agent(worker, worker.agent.receive(worker.down.popleft(), self.now))

    def deliver_up(self, worker: Worker) -> None:
        self.broker(self.core.receive(worker.name, worker.up.popleft(), self.now))

    def read(self, worker: Worker, runner: Runner) -> None:
        """The host reads what the runner wrote: in order, but a letter may overtake results."""
        at = 0
        if self.chance.random() < 0.3:
            places = [n for n, event in enumerate(runner.wrote) if isinstance(event, p.FromRunner)]
            at = places[0] if places else 0
        event = runner.wrote[at]
        del runner.wrote[at]
        self.agent(worker, worker.agent.receive(event, self.now))

    def can_go_on(self, runner: Runner) -> bool:
        if runner.current is None:
            return bool(runner.queue)
        return bool(runner.goes) or not runner.open

    def go_on(self, worker: Worker, runner: Runner) -> None:
        """The runner exits, starts a task, submits some children, or ends the task."""
        if runner.current is None and not runner.queue:
            for event in self.die(worker, runner, ""):
                self.agent(worker, worker.agent.receive(event, self.now))
        elif runner.current is None:
            execute, index = runner.current = runner.queue.popleft()
            path = path_of(execute, index)
            shape = random.Random(f"{self.seed}/{path!r}")
            is_parent = path.count(b"/") < self.depth_max and shape.random() < 0.7
            runner.goes = (
                [shape.randint(1, 3) for _ in range(shape.randint(1, 2))] if is_parent else []
            )
        elif self.deaths and self.chance.random() < 0.02:
            self.deaths -= 1
            for event in self.die(worker, runner, "was killed by SIGSEGV"):
                self.agent(worker, worker.agent.receive(event, self.now))
        elif runner.open:
            pass  # one go after the other
        elif runner.goes:
            self.submit(runner, runner.goes.pop())
        else:
            execute, index = runner.current
            runner.current = None
            seconds = self.chance.choice((1e-5, 0.001, 1.0))
            row = (execute.seq, index, p.VALUE, seconds, b"value")
            runner.wrote.append(p.RunnerDone(runner.number, [row]))

    def submit(self, runner: Runner, count: int) -> None:
        assert runner.current is not None
        execute, index = runner.current
        client = execute.root or execute.client
        if client not in runner.clients:
            runner.clients[client] = Submission()
            runner.clients[client].connect(self.credit)
        ids = list(range(runner.last_id + 1, runner.last_id + count + 1))
        runner.last_id += count
        runner.open.update(ids)
        path = path_of(execute, index)
        payloads: list[Any] = [path + b"/%d" % id for id in ids]
        for _, message in runner.clients[client].submit(p.Group(0, 0), ids, payloads):
            self.write(runner, client, message)

    def write(self, runner: Runner, client: int, message: Any) -> None:
        seq = runner.current[0].seq if runner.current else 0
        letter = p.FromRunner(runner.number, client, envelope.NESTED, envelope.pack(seq, message))
        runner.wrote.append(letter)

    # --- Time and the end -------------------------------------------------------------------------

    def pass_time(self, *, must: bool) -> None:
        """Until somebody wants to be woken, which somebody ``must`` if nothing else can happen."""
        deadlines = [worker.agent.next_deadline() for worker in self.workers.values()]
        known = [at for at in (*deadlines, self.core.next_deadline()) if at is not None]
        if not known and not must:
            return
        assert known, f"seed {self.seed}: {self.wanted} tasks wait for ever: {self.core!r}"
        self.now = max(self.now, min(known))
        for worker in self.workers.values():
            self.agent(worker, worker.agent.tick(self.now))
        self.broker(self.core.tick(self.now))

    def leave(self) -> None:
        """A worker is lost, and another one comes."""
        name = self.chance.choice(list(self.workers))
        del self.workers[name]
        self.broker(self.core.leave(name, self.now, "lost"))
        self.join(f"{name}'")

    def run(self) -> None:
        for count in range(STEPS_MAX):
            if not self.wanted:
                break
            if self.departures and count > 100 and self.chance.random() < 0.01:
                self.departures -= 1
                self.leave()
            can_go_on = self.step()
            if not can_go_on or self.chance.random() < 0.02:
                self.pass_time(must=not can_go_on)
        assert not self.wanted, f"seed {self.seed}: not done after {STEPS_MAX} steps"
        while self.step():
            pass
        status = self.core.status(self.now)
        assert (status.queued, status.running) == (0, 0)
        for worker in self.workers.values():
            assert not worker.agent._chunks
            assert not worker.agent._crew.lent
        assert all(worker.taken == worker.lent == 0 for worker in self.core._workers.values())


def path_of(execute: p.Execute, index: int) -> bytes:
    """Which task it is: the ids on the way to it."""
    path = execute.payloads[index]
    assert isinstance(path, bytes)
    return path


@pytest.mark.parametrize("block", range(5))
def test_trees_of_tasks_end(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        World(seed).run()
