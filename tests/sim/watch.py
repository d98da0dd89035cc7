"""The real cores, watched: what they decide is compared with what the oracle knows,
and each transition is marked.

The comparisons are made anew from all tasks, clients and workers,
without the indexes that make the cores fast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from achilles.core import protocol as p
from achilles.core import sessions
from achilles.core.agent import Agent
from achilles.core.charges import Charges
from achilles.core.crew import Crew
from achilles.core.crew import Send as AgentSend
from achilles.core.dispatch import Dispatcher, Send
from achilles.core.link import Packet
from achilles.core.recovery import IN_DOUBT
from achilles.core.runners import Runner
from achilles.core.scheduler import Scheduler
from achilles.core.sessions import Route, Session, Sessions
from achilles.core.sessions import Send as SessionSend
from achilles.core.tables import QUARANTINED, READY, Client, Lease, Task, TaskQueue, Worker
from tests.sim.oracle import EPSILON, Oracle, Violation

Marks = Counter[str]
FAREWELLS = ("drained", "done")  # what simulated peers say in a goodbye
ENDS = {"its connection closed": "closed", "it fell silent": "silent", "it began anew": "anew"}

LEASES_MAX = 500  # of one task: more is a circle


class WatchedDispatcher(Dispatcher):
    """A dispatcher whose choices are compared with the best of all."""

    def __init__(self, oracle: Oracle, marks: Marks, first_lease: int) -> None:
        super().__init__(first_lease)
        self._oracle = oracle
        self._marks = marks
        self._last_lease = 0
        self._attempts: dict[tuple[int, int], int] = {}  # the last one, by client and task

    def _lease(
        self, worker: Worker, queue: TaskQueue, in_slot: bool, now: float, sends: list[Send]
    ) -> None:
        self._check_choice(worker, queue, in_slot)
        super()._lease(worker, queue, in_slot, now, sends)
        run = sends[-1].message
        assert isinstance(run, p.Run)
        if run.lease <= self._last_lease:
            raise Violation("fresh lease", f"lease {run.lease} follows {self._last_lease}")
        self._last_lease = run.lease
        self._marks["lease: made for a slot" if in_slot else "lease: made in advance"] += 1
        self._marks["task: queued > leased"] += len(run.ids)
        if queue.options.at_most_once and len(run.ids) > 1:
            raise Violation("at most once", f"{run} has tasks of which one can be in doubt only")
        if 0 < queue.group.chunk_max < len(run.ids):
            raise Violation("chunk_max", f"{len(run.ids)} tasks of {queue.group} in one chunk")
        tasks = [task for task in worker.leases[run.lease].tasks if task is not None]
        if len(tasks) > 1 and any(task.blame for task in tasks):
            raise Violation("alone after a charge", f"{run} has a task with a history")
        for payload in run.payloads:
            truth = self._oracle.of_payload(payload)
            truth.leases += 1
            if truth.leases > LEASES_MAX:
                raise Violation("no circles", f"{truth} was leased {truth.leases} times")
            key = run.client, truth.id
            if run.attempt < self._attempts.get(key, 1):
                raise Violation("attempt", f"{truth}: attempt {run.attempt} follows a later one")
            self._attempts[key] = run.attempt

    def forget(self, client: Client) -> None:
        """With the client's next session all begins anew."""
        for key in [key for key in self._attempts if key[0] == client.number]:
            del self._attempts[key]

    def _check_choice(self, worker: Worker, queue: TaskQueue, in_slot: bool) -> None:
        client = queue.client
        if worker.state != READY or worker.is_gone:
            raise Violation("ready workers only", f"{worker.name} gets work, being {worker.state}")
        if not worker.tags.issuperset(queue.options.tags):
            raise Violation("tags", f"{worker.name} {worker.tags} gets {queue.options}")
        best = min(_fitting(client, worker), default=None)
        mine = _rank(queue)
        if best is not None and best < mine:
            check = "priority" if best[0] < mine[0] else "oldest first"
            raise Violation(check, f"{client.name}: {mine} goes before {best}")
        for other in self.waiting.values() if in_slot else ():
            is_behind = other.running < client.running and not other.has_all_its_slots
            if is_behind and any(True for _ in _fitting(other, worker)):
                raise Violation(
                    "fair share",
                    f"{client.name} with {client.running} leases goes before {other.name} with {other.running}",
                )

    def close(self, lease: Lease) -> None:
        behind = [other for other in lease.worker.leases.values() if not other.in_slot]
        super().close(lease)
        self._marks["lease: closed"] += 1
        self._marks["lease: moved into a slot"] += any(other.in_slot for other in behind)


def _rank(queue: TaskQueue) -> tuple[int, int]:
    return -queue.options.priority, next(task.id for task in queue.tasks if task.queue is not None)


def _fitting(client: Client, worker: Worker) -> Iterable[tuple[int, int]]:
    """The ranks of the client's queues with tasks for this worker."""
    for queue in client.queues.values():
        if queue.live and worker.tags.issuperset(queue.options.tags):
            yield _rank(queue)


class WatchedCharges(Charges):
    """Charges that are marked, with their ``cause``."""

    def __init__(self, dispatcher: Dispatcher, marks: Marks) -> None:
        super().__init__(dispatcher)
        self._marks = marks
        self.cause = ""

    def requeue(self, queue: TaskQueue, tasks: list[Task], *, is_reassigned: bool = False) -> None:
        wanted = sum(task.queue is not None for task in tasks)
        self._marks[f"task: leased > queued, {self.cause}"] += wanted
        self._marks["task: cancelled > returned"] += len(tasks) - wanted
        super().requeue(queue, tasks, is_reassigned=is_reassigned)

    def give_up(self, task: Task, queue: TaskQueue, kind: str, text: str) -> list[Send]:
        once = ", at most once" * (queue.options.at_most_once and kind != p.TIMEOUT)
        state = "queued" if text == IN_DOUBT else "leased"
        self._marks[f"task: {state} > failed as {kind}{once}"] += 1
        return super().give_up(task, queue, kind, text)


class WatchedScheduler(Scheduler):
    """A scheduler that tells the oracle which tasks a session's end touches."""

    def __init__(
        self,
        *,
        oracle: Oracle,
        marks: Marks,
        is_sound: bool,
        on_recovered: Callable[[], None],
        on_left: Callable[[Worker], None],
        **options: Any,
    ) -> None:
        """``is_sound``: nobody should be given up; ``on_recovered``: what is held back no more may
        be given out; ``on_left``: a worker's session has ended.
        """
        self._oracle = oracle
        self._marks = marks
        self._is_sound = is_sound
        self._on_recovered = on_recovered
        self._on_left = on_left
        super().__init__(**options)

    def _make_dispatcher(self, first_lease: int) -> Dispatcher:
        return WatchedDispatcher(self._oracle, self._marks, first_lease)

    def _make_charges(self) -> Charges:
        return WatchedCharges(self._dispatcher, self._marks)

    def _set_cause(self, cause: str) -> None:
        assert isinstance(self._charges, WatchedCharges)
        self._charges.cause = cause

    def tick(self, now: float) -> list[Send]:
        resting: list[Worker] = []
        if self._standing.next_deadline() is not None:
            resting = [one for one in self._workers.values() if one.state == QUARANTINED]
        recovery = self._recovery
        if recovery._expires_at is not None and now >= recovery._expires_at:
            for client in recovery._absent.values():
                self._marks["recovery: a client is not back in time"] += 1
                self._oracle.client_lost(self._oracle.numbers[client.number])
        sends = super().tick(now)
        if resting:
            back = sum(one.state == READY for one in resting)
            self._marks["session: quarantined > ready"] += back
        return sends

    def leave(self, peer: Hashable, now: float, reason: str, *, charge: bool = True) -> list[Send]:
        if charge and reason in FAREWELLS:
            raise Violation("charge on a drain", f"session {peer} ended peacefully: {reason}")
        if charge and self._is_sound:
            raise Violation(
                "nobody is given up", f"session {peer} was ended, its peer being well: {reason}"
            )
        if worker := self._workers.get(peer):
            self._set_cause("its worker was lost" if charge else "its worker left")
            self._oracle.worker_lost(
                charge,
                [
                    self._oracle.of_payload(task.payload)
                    for lease in worker.leases.values()
                    for task in lease.tasks
                    if task is not None and task.payload
                ],
            )
            self._on_left(worker)
        if client := self._clients.get(peer):
            for task in client.tasks.values():
                state = "queued" if task.lease is None else "leased"
                self._marks[f"task: {state} > dropped, its client left"] += 1
            # Results that were on their way to it are lost too.
            self._oracle.client_lost(int(client.name.split("-")[1]))
            assert isinstance(self._dispatcher, WatchedDispatcher)
            self._dispatcher.forget(client)
        return super().leave(peer, now, reason, charge=charge)

    def suspect(self, peer: Hashable) -> None:
        super().suspect(peer)
        self._marks["session: suspect"] += 1

    def resume(self, peer: Hashable, now: float) -> list[Send]:
        worker = self._workers.get(peer)
        self._marks["session: suspect > ready"] += bool(worker and worker.state != READY)
        return super().resume(peer, now)

    def _submit(self, client: Client, message: p.Submit, now: float) -> list[Send]:
        before = len(client.tasks)
        found = client.found
        tasks, results = (len(found.tasks), len(found.results)) if found else (0, 0)
        self._set_cause("it raised")
        sends = super()._submit(client, message, now)
        self._marks["task: > queued"] += len(client.tasks) - before
        if found:
            self._marks["recovery: a held task is asked for"] += tasks - len(found.tasks)
            self._marks["recovery: a held result is asked for"] += results - len(found.results)
        return sends

    def _from_worker(
        self, worker: Worker, message: p.FromClient | p.FromWorker, now: float
    ) -> list[Send]:
        queued = sum(client.live for client in self._clients.values())
        sends = super()._from_worker(worker, message, now)
        if isinstance(message, p.Held):
            queued -= sum(client.live for client in self._clients.values())
            self._marks["recovery: a lease is adopted"] += 1
            self._marks["recovery: a queued task is held"] += queued
            self._marks["recovery: an unwanted task is held"] += bool(sends)
        return sends

    def _recover(self, now: float) -> list[Send]:
        was_open = self._recovery.is_open
        sends = super()._recover(now)
        if was_open and not self._recovery.is_open:
            how = "time is over" if self._recovery._awaited else "all are back"
            self._marks[f"recovery: {how}"] += 1
            self._on_recovered()
        return sends

    def _cancel(self, client: Client, ids: Iterable[int], kill: bool) -> list[Send]:
        ids = list(ids)
        for task in [client.tasks[id] for id in ids if id in client.tasks]:
            state = "queued" if task.lease is None else "leased"
            self._marks[f"task: {state} > cancelled{', to be killed' * kill}"] += 1
        return super()._cancel(client, ids, kill)

    def _results(self, worker: Worker, message: p.Done, now: float) -> list[Send]:
        lease = worker.leases.get(message.lease)
        if lease is not None:
            tasks = [lease.tasks[index] for index in message.indexes]
            unwanted = sum(task is not None and task.queue is None for task in tasks)
            self._marks["task: cancelled > done"] += unwanted
            self._marks["task: leased > done"] += len(tasks) - unwanted
        self._set_cause("it raised")
        return super()._results(worker, message, now)

    def _returned(self, worker: Worker, number: int, indexes: list[int], now: float) -> list[Send]:
        self._set_cause("it was returned")
        return super()._returned(worker, number, indexes, now)

    def _crashed(self, worker: Worker, message: p.Crashed, now: float) -> list[Send]:
        self._set_cause("it timed out" if message.kind == p.TIMEOUT else "its runner died")
        before, faults = worker.quarantines, list(worker.faults)
        lease = worker.leases.get(message.lease)
        task = lease.tasks[message.index] if lease else None
        sends = super()._crashed(worker, message, now)
        if worker.quarantines > before and lease and task:
            self._marks["session: ready > quarantined"] += 1
            for one in (*faults, task):
                if one.queue is not None:  # else nobody wants it any more
                    self._oracle.pardoned(one.queue.client.number, one.id)
        return sends


class WatchedSessions(Sessions):
    """Sessions whose comings and goings are marked,
    and who are not ended as long as they are heard.
    """

    marks: Marks

    def watch(self, marks: Marks) -> None:
        """Begin to."""
        self.marks = marks
        self._heard_at: dict[bytes, float] = {}
        self._is_closed: dict[bytes, bool] = {}

    def receive(
        self, route: Route, roles: frozenset[str], packet: Packet, now: float, fresh_token: bytes
    ) -> list[SessionSend]:
        token = packet.header.token
        if token in self._by_token:
            self._heard_at[token] = now
            self._is_closed[token] = False
        return super().receive(route, roles, packet, now, fresh_token)

    def closed(self, route: Route, now: float) -> None:
        if session := self._by_route.get(route):
            self._is_closed[session.link.token] = True
        super().closed(route, now)

    def _check_given_up(self, session: Session, now: float, reason: str) -> None:
        token = session.link.token
        silence = now - self._heard_at.get(token, -math.inf)
        limit = self._lost[session.role].limit - EPSILON
        if reason == "it fell silent" and silence < limit:
            raise Violation("nobody is given up", f"{session.hello.name} is silent for {silence} s")
        if reason == "its connection closed" and not self._is_closed.get(token, True):
            raise Violation("nobody is given up", f"{session.hello.name} is back, and yet ended")

    def _hello(
        self,
        route: Route,
        roles: frozenset[str],
        hello: p.ClientHello | p.WorkerHello,
        now: float,
        fresh_token: bytes,
    ) -> list[SessionSend]:
        session = self._by_incarnation.get(hello.incarnation)
        if session is None:
            self.marks["session: > begun"] += 1
        elif session.link.received:
            self.marks["session: begun > begun anew"] += 1
        else:
            self.marks["session: begun > hello repeated"] += 1
        return super()._hello(route, roles, hello, now, fresh_token)

    def _rebind(self, session: Session, route: Route) -> None:
        self.marks["session: moved to another route"] += session.route != route
        is_back = session.link.token in self._closed[session.role]
        self.marks["session: closed > back within its grace"] += is_back
        super()._rebind(session, route)

    def _end(
        self, session: Session, now: float, reason: str, *, charge: bool = True
    ) -> list[SessionSend]:
        self._check_given_up(session, now, reason)
        how = "refused" if reason.startswith("it broke the protocol") else "by itself"
        self.marks[f"session: {session.role} > ended, {ENDS.get(reason, how)}"] += 1
        return super()._end(session, now, reason, charge=charge)

    def _notice_stall(self, now: float) -> None:
        before = self._seen_at
        super()._notice_stall(now)
        self.marks["session: amnesty"] += now - before > vars(sessions)["STALL_SECONDS"]


class WatchedCrew(Crew):
    """A crew whose dealings with runners are marked."""

    marks: Marks

    def choose(self, run: p.Run, sends: list[AgentSend], now: float) -> Runner | None:
        runner = super().choose(run, sends, now)
        if runner is None:
            self.marks["runner: none for a chunk"] += 1
        elif runner.chunks:
            self.marks["runner: busy > a chunk behind"] += 1
        else:
            self.marks["runner: idle > busy"] += 1
        return runner

    def _retire(self, runner: Runner, sends: list[AgentSend]) -> None:
        self.marks["runner: > retiring"] += 1
        super()._retire(runner, sends)


class WatchedAgent(Agent):
    """An agent whose dealings with runners are marked."""

    def _make_crew(self, slots: int, tasks_max: int) -> Crew:
        self._watched = WatchedCrew(slots, tasks_max)
        return self._watched

    @property
    def marks(self) -> Marks:
        """Where what happens is counted."""
        return self._watched.marks

    @marks.setter
    def marks(self, marks: Marks) -> None:
        self._watched.marks = marks

    def _revoke(self, revoke: p.Revoke) -> list[AgentSend]:
        chunk = self._chunks.get(revoke.lease)
        if chunk is None:
            self.marks["revoke: of an ended lease"] += 1
        elif chunk in self._queue:
            self.marks["revoke: of a chunk without a runner"] += 1
        else:
            runners = self._runners.values()
            is_first = any(runner.chunks and runner.chunks[0] is chunk for runner in runners)
            where = "of the first chunk" if is_first else "of a chunk behind"
            self.marks[f"revoke: {where}{', to be killed' * revoke.kill}"] += 1
        return super()._revoke(revoke)

    def tick(self, now: float) -> list[AgentSend]:
        sends = super().tick(now)
        self.marks["runner: busy > recalled"] += len(sends)
        return sends

    def _execute_sentence(self, runner: Runner) -> list[AgentSend]:
        before = len(runner.condemned)
        sends = super()._execute_sentence(runner)
        self.marks["runner: condemned > pardoned"] += before - len(runner.condemned)
        if sends:
            for why in runner.condemned.values():
                self.marks[f"runner: condemned > killed, {why}"] += 1
        elif runner.condemned:
            self.marks["runner: condemned > waits for its neighbours"] += 1
        return sends

    def _died(self, message: p.RunnerDied, now: float) -> list[AgentSend]:
        runner = self._runners.get(message.runner)
        if runner is None:
            self.marks["runner: killed by a reset > died"] += 1
        elif runner.is_killed:
            self.marks["runner: killed > died"] += 1
        elif not message.reason:
            self.marks["runner: retiring > exited"] += 1
        elif not runner.chunks:
            self.marks["runner: idle > died"] += 1
        else:
            self.marks["runner: busy > died"] += 1
        if runner and any(0 < (c.seq - message.last_seq) % 255 < 128 for c in runner.chunks):
            self.marks["runner: died > a chunk crossed with it"] += 1
        return super()._died(message, now)

    def reset(self) -> list[AgentSend]:
        self.marks["agent: reset with work"] += bool(self._chunks)
        return super().reset()

    def drain(self) -> list[AgentSend]:
        if not self.is_draining:
            self.marks["agent: > draining"] += 1
            condemned = any(runner.condemned for runner in self._runners.values())
            self.marks["agent: draining while a task is condemned"] += condemned
        return super().drain()

    def _run(self, run: p.Run, now: float) -> list[AgentSend]:
        self.marks["agent: draining > given a chunk"] += self.is_draining
        return super()._run(run, now)
