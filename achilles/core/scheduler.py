"""The broker's decisions: which tasks go where, and what becomes of them.

Rules
    1. A task is in exactly one place: in its queue, under exactly one lease,
       or resolved and forgotten.
    2. Each task of a client is resolved once: by one `Results` entry, one `Failed`,
       or the client's `Cancel`.
    3. A lease ends when each of its tasks was done, returned, or crashed;
       until then it takes up a place.
    4. Only a started task is charged: for its runner's crash, or for its worker's loss. What was
       given back, or waited behind another task, is not.
    5. A peer's messages can be wrong in any way that their types allow: that raises `ProtocolError`
       before anything has changed, or is counted as late.
    6. Tasks may submit tasks: see `nesting`. Workers may have tasks of an earlier broker's:
       see `recovery`.

Picture
    client ─Submit─▶ TaskQueue (one for each function) ─chunk─▶ Lease ─Run─▶ worker
                        ▲                                        │ │
                        └──────── Returned, Crashed, lost ───────┘ └─ Done ─▶ Results ─▶ client

Theory
    What becomes of tasks is decided here; where they run, in `dispatch`;
    what failures cost them, in `charges`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from achilles.core import protocol as p
from achilles.core.budget import UNLIMITED, Budget, Limits, bytes_of, heaviest
from achilles.core.charges import Charges
from achilles.core.dispatch import LEASE_BITS, Dispatcher, Send
from achilles.core.nesting import Nesting
from achilles.core.recovery import Recovery, stable_number
from achilles.core.standing import Standing
from achilles.core.tables import (
    DRAINING,
    QUEUES_KEPT,
    READY,
    RETURNING,
    Client,
    Lease,
    PeerId,
    Task,
    TaskQueue,
    Worker,
)
from achilles.core.waiting import answer
from achilles.errors import ProtocolError

_INIT_FAILED = bytes([p.INIT_FAILED])
EPOCHS = 1 << 29  # above which their numbers would meet the stable ones of peers


class Change(NamedTuple):
    """Numbers of workers that are new, and of those that are gone."""

    new: set[int]
    gone: set[int]


class Scheduler:
    """Gives clients' tasks to workers. Sessions come by `join`, end by `leave`,
    speak by `receive`.
    """

    def __init__(
        self,
        *,
        credit: int = 0,
        limits: Limits = UNLIMITED,
        now: float = 0.0,
        epoch: int = 0,
        recovery: float = 0.0,
        patience: float = 0.0,
        awaited: frozenset[int] | None = None,
    ) -> None:
        """``credit``: tasks that a client may have unresolved; 0: no limit. The others:
        see `Budget` and `Recovery`.

        ``epoch`` is another one for each broker that peers may meet.
        """
        self._credit = credit
        self._budget = Budget(limits)
        self._started_at = now
        self._clients: dict[PeerId, Client] = {}
        self._workers: dict[PeerId, Worker] = {}
        # The same by number, of clients those that are nobody's nested ones.
        self._client_by_number: dict[int, Client] = {}
        self._worker_by_number: dict[int, Worker] = {}
        self._draining = self._draining_slots = 0  # workers, and slots of theirs
        first = (epoch << LEASE_BITS) + 1
        self._dispatcher = self._make_dispatcher(first)
        self._charges = self._make_charges()
        self._numbers = itertools.count(first)  # of clients and workers that have no stable one
        self._nesting = Nesting(
            self._clients,
            self._dispatcher,
            self._numbers,
            receive=self._from_client,
            end=self._client_left,
        )
        self._standing = Standing(self._workers, self._dispatcher)
        self._recovery = Recovery(
            self._client_by_number,
            self._dispatcher,
            self._charges,
            now=now,
            seconds=recovery,
            patience=patience,
            awaited=awaited,
            end=self._root_left,
        )
        # The workers' numbers, and of those that may come back; None while that is not known.
        self.workers = None if awaited is None and recovery else set(awaited or ())
        self.changes: list[Change] = []  # of these, for a shell to tell of and take out
        self._done = self._late = 0
        self._finishing: set[Client] = set()  # who waits for what runs of theirs

    def _make_dispatcher(self, first_lease: int) -> Dispatcher:
        return Dispatcher(first_lease)

    def _make_charges(self) -> Charges:
        return Charges(self._dispatcher)

    # --- Sessions ---------------------------------------------------------------------------------

    def join(self, peer: PeerId, hello: p.ClientHello | p.WorkerHello, now: float) -> list[Send]:
        """A new session begins."""
        match hello:
            case p.WorkerHello():
                number = self._number(hello, self._worker_by_number)
                worker = Worker(peer, number, hello, now)
                self._workers[peer] = self._worker_by_number[number] = worker
                self._note_workers({number}, set())
                self._dispatcher.add(worker)
                return [*self._cluster_changed(), *self._dispatcher.dispatch(now)]
            case p.ClientHello():
                number = self._number(hello, self._client_by_number)
                client, sends = self._recovery.client(peer, number, hello)
                self._clients[peer] = self._client_by_number[number] = client
                self._budget.open(client)
                return [Send(peer, self._cluster()), *sends]

    def _number(
        self, hello: p.ClientHello | p.WorkerHello, present: Mapping[int, Client | Worker]
    ) -> int:
        """A peer's number: the one that it has at each broker, unless somebody has that already."""
        number = stable_number(hello.incarnation) if any(hello.incarnation) else 0
        return number if number and number not in present else next(self._numbers)

    def leave(self, peer: PeerId, now: float, reason: str, *, charge: bool = True) -> list[Send]:
        """A session has ended; ``charge`` tells whether started tasks are charged for a lost
        worker.
        """
        if worker := self._workers.pop(peer, None):
            del self._worker_by_number[worker.number]
            self._note_workers(set(), {worker.number})
            if worker.state == DRAINING:
                self._draining -= 1
                self._draining_slots -= worker.slots
            return [*self._worker_left(worker, now, reason, charge), *self._finished()]
        client = self._clients.pop(peer, None)
        if client is None:
            return []
        del self._client_by_number[client.number]
        self._finishing.discard(client)
        self._budget.close(client)
        return self._root_left(client)

    def amnesty(self, now: float) -> None:
        """The broker has slept: who is late may have been kept waiting."""
        self._recovery.extend(now)

    def heard(self, peer: PeerId, now: float) -> None:
        """A worker has shown life."""
        worker = self._workers.get(peer)
        if worker is not None:
            worker.heard_at = now

    def suspect(self, peer: PeerId) -> None:
        """A worker has been silent for long: it gets no new work until `receive` or `resume`."""
        if worker := self._workers.get(peer):
            self._standing.suspect(worker)

    def resume(self, peer: PeerId, now: float) -> list[Send]:
        """A suspect worker was heard again."""
        if worker := self._workers.get(peer):
            self._standing.resume(worker)
        return self._dispatcher.dispatch(now)

    def grant_of(self, peer: PeerId) -> int:
        """How many bytes of tasks a client may have here; 0: no limit."""
        client = self._clients.get(peer)
        return 0 if client is None else client.grant

    def owe(self, peer: PeerId, size: int, now: float) -> list[Send]:
        """A client was sent so many bytes of results, or (below 0) has taken them: see `budget`."""
        client = self._clients.get(peer)
        has_room_again = client is not None and self._budget.owes(client, size)
        return self._dispatcher.dispatch(now) if has_room_again else []

    def hold(self, peer: PeerId) -> None:
        """Dispatch nothing of a client's until `release`."""
        self._clients[peer].is_held = True

    def release(self, peer: PeerId, now: float) -> list[Send]:
        """Dispatch what waits again."""
        self._clients[peer].is_held = False
        return self._dispatcher.dispatch(now)

    def largest(self) -> PeerId | None:
        """The client that holds most memory here, where that is more than any may begin with."""
        roots = [client for client in self._clients.values() if client.grant]
        return heaviest(roots)

    # --- The core's contract ----------------------------------------------------------------------

    def receive(self, peer: PeerId, message: p.FromClient | p.FromWorker, now: float) -> list[Send]:
        """Take in a message of a session.

        Raises:
            ProtocolError: the message does not fit the session; nothing has changed.
        """
        worker = self._workers.get(peer)
        if worker is not None:
            sends = self._from_worker(worker, message, now)
            return [*sends, *self._finished()] if self._finishing else sends
        client = self._clients.get(peer)
        if client is None:
            return []
        return self._from_client(client, message, now)

    def tick(self, now: float) -> list[Send]:
        """Tell clients what is worth telling by now;
        give out what was held back for long enough, or waits beside a free slot.
        """
        sends = self._dispatcher.tick(now)
        if self._standing.next_deadline() is not None:
            self._standing.tick(now)
            sends += self._dispatcher.dispatch(now)
        due = self._recovery.due
        return sends if due is None or now < due else [*sends, *self._recover(now)]

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        due, at = self._dispatcher.next_deadline(), self._recovery.due
        if at is not None and (due is None or at < due):
            due = at
        if self._standing.resting:
            at = self._standing.next_deadline()
            if at is not None and (due is None or at < due):
                due = at
        return due

    def status(self, now: float, *, is_brief: bool = False) -> p.Status:
        """The state in numbers."""
        workers = () if is_brief else self._workers.values()
        return p.Status(
            workers=[worker.status(now) for worker in workers],
            clients=[] if is_brief else self._nesting.client_statuses(),
            queued=sum(client.live for client in self._clients.values()),
            running=sum(len(client.tasks) - client.live for client in self._clients.values()),
            done=self._done,
            failed=self._charges.failed,
            reassigned=self._charges.reassigned,
            late=self._late,
            uptime=now - self._started_at,
            is_brief=is_brief,
        )

    def __repr__(self) -> str:
        queued = sum(client.live for client in self._clients.values())
        running = sum(len(client.tasks) for client in self._clients.values()) - queued
        return f"<Scheduler {len(self._workers)} workers | {queued} queued, {running} running>"

    # --- From clients -----------------------------------------------------------------------------

    def _from_client(
        self, client: Client, message: p.FromClient | p.FromWorker, now: float
    ) -> list[Send]:
        match message:
            case p.Submit():
                sends = self._submit(client, message, now)
                if self._budget.grow(client):
                    sends.append(Send(client.peer, p.Credit(client.grant)))
                if client.parent:
                    sends += self._dispatcher.lend(client)
                return sends + self._dispatcher.dispatch(now)
            case p.Blob(blob=blob, payload=payload):
                if blob < 1:
                    raise ProtocolError("a blob's number is at least 1")
                self._budget.take_blob(client, blob, payload)
                return []
            case p.Forget(blobs=blobs):
                return self._forget(client, blobs)
            case p.Cancel(ids=ids, kill=kill):
                return self._cancel(client, ids, kill)
            case p.Finish():
                self._finishing.add(client)
                return self._finished()
            case p.Letter():
                return self._to_runner(client, message)
            case p.StatusRequest(is_brief=is_brief):
                status = self.status(now, is_brief=is_brief)
                everybody, workers = self._clients.values(), self._workers.values()
                status.waiting = answer(message, client, everybody, workers, now)
                return [client.tell(status)]
            case p.Resumed():
                return self._recovery.resumed(client)
            case p.Goodbye(reason=reason):
                return self.leave(client.peer, now, reason)
            case p.Done() | p.Returned() | p.Crashed() | p.Drain() | p.Relay() | p.Held():
                raise ProtocolError(f"a client does not send {type(message).__name__}")

    def _submit(self, client: Client, message: p.Submit, now: float) -> list[Send]:
        size = bytes_of(message.payloads)
        if self._credit and len(client.tasks) + len(message.ids) > self._credit:
            raise ProtocolError(f"more than {self._credit} unresolved tasks")
        group = message.group
        queue = client.queues.get(group)
        for blob in queue.needs if queue is not None else group.needs:
            if blob not in client.owner(blob, group).blobs:
                raise ProtocolError(f"a task names blob {blob}, which was not sent")
        self._budget.take(client, size, is_alone=not client.tasks and len(message.ids) == 1)
        if queue is None:
            queue = client.open_queue(group)
        elif len(client.queues) > QUEUES_KEPT:  # those that were used last stay longest
            client.queues[group] = client.queues.pop(group)
        sends: list[Send] = []
        if client.found is not None:
            results, sends = self._recovery.claim(client, client.found, queue, message, now)
            self._done += len(results.ids)
            client.done += len(results.ids)
            if results.ids:
                sends.append(client.tell(results))
        was_empty = queue.live == 0
        tasks = client.tasks
        append = queue.tasks.append
        before = len(tasks)
        for id, payload in zip(message.ids, message.payloads, strict=True):
            if id not in tasks:  # a client that is not sure may submit again
                tasks[id] = task = Task(id, queue, payload)
                append(task)
            else:
                client.bytes -= p.size_of(payload)
        added = len(tasks) - before
        queue.live += added
        client.live += added
        if added:
            self._dispatcher.wait(client)
            if was_empty:
                client.enqueue(queue)
        if message.is_again and queue.options.at_most_once:
            client.doubtful.update(message.ids)
            if not client.is_held_back:
                sends += self._recovery.give_up_doubtful(client)
        return sends

    def _finished(self) -> list[Send]:
        """Tell those who wait for that of whom nothing runs any more."""
        over = [one for one in self._finishing if not one.places and not one.lent]
        self._finishing.difference_update(over)
        return [Send(client.peer, p.Finished()) for client in over]

    def _forget(self, client: Client, blobs: list[int]) -> list[Send]:
        using = [
            queue for queue in client.queues.values() if not set(blobs).isdisjoint(queue.needs)
        ]
        for queue in using:
            if self._is_wanted(queue):
                raise ProtocolError(
                    f"blobs {queue.needs} cannot be forgotten: unresolved tasks name them"
                )
        for queue in using:
            if not queue.tasks and not queue.leases:
                del client.queues[queue.group]
        client.unwant(blobs)
        blobs = self._nesting.without_shared(client, blobs)
        for blob in blobs:
            client.blobs.pop(blob, None)
            client.unwanted.discard(blob)
        return self._dispatcher.unload(client.number, blobs)

    def _is_wanted(self, queue: TaskQueue) -> bool:
        """Whether somebody waits for a task of the queue, here or at a worker."""
        if queue.live or not queue.leases:
            return queue.live > 0
        return any(
            task is not None and task.queue is not None
            for worker in self._workers.values()
            for lease in worker.leases.values()
            if lease.queue is queue
            for task in lease.tasks
        )

    def _cancel(self, client: Client, ids: Iterable[int], kill: bool) -> list[Send]:
        sends = []
        for id in ids:
            task = client.tasks.pop(id, None)
            if task is None:
                continue
            lease = task.lease
            if lease is None:
                self._charges.unqueue(task)
            else:
                index = lease.tasks.index(task)
                sends.append(Send(lease.worker.peer, p.Revoke(lease.number, [index], kill)))
            if task.payload is not None:
                client.bytes -= p.size_of(task.payload)
            task.queue = None
            task.payload = None
        if client.live == 0:
            self._dispatcher.waiting.pop(client.peer, None)
        return [*sends, *self._dispatcher.lend(client)]

    def _root_left(self, client: Client) -> list[Send]:
        return [*self._nesting.root_left(client), *self._client_left(client)]

    def _client_left(self, client: Client) -> list[Send]:
        self._dispatcher.waiting.pop(client.peer, None)
        client.found, client.is_held_back = None, False
        sends = []
        for task in client.tasks.values():
            task.queue = None
            task.payload = None
        client.tasks.clear()
        client.blobs.clear()
        client.unwanted.clear()
        client.bytes = 0
        client.live = 0
        for queue in client.queues.values():  # its leases still refer to them
            queue.tasks.clear()
            queue.live = 0
        for worker in self._workers.values():
            for lease in worker.leases.values():
                if lease.client is client:
                    everything = list(range(len(lease.tasks)))
                    sends.append(Send(worker.peer, p.Revoke(lease.number, everything, kill=True)))
        sends += self._dispatcher.unload_all(client.number)
        return [*sends, *self._dispatcher.lend(client)]

    # --- From workers -----------------------------------------------------------------------------

    def _from_worker(
        self, worker: Worker, message: p.FromClient | p.FromWorker, now: float
    ) -> list[Send]:
        match message:
            case p.Done():
                return self._results(worker, message, now)
            case p.Returned(lease=number, indexes=indexes):
                return self._returned(worker, number, indexes, now)
            case p.Crashed():
                return self._crashed(worker, message, now)
            case p.Letter():
                return self._to_client(worker, message)
            case p.Drain():
                if worker.state != DRAINING:
                    worker.state = DRAINING
                    self._draining += 1
                    self._draining_slots += worker.slots
                self._dispatcher.place(worker)
                return self._cluster_changed()
            case p.Relay():
                return self._nesting.receive(worker, message, self._cluster(), now)
            case p.Held():
                return self._recovery.held(worker, message, now)
            case p.Resumed():
                return self._worker_resumed(worker, now)
            case p.Goodbye(reason=reason):
                return self.leave(worker.peer, now, reason, charge=False)
            case p.Submit() | p.Blob() | p.Forget() | p.Cancel() | p.Finish() | p.StatusRequest():
                raise ProtocolError(f"a worker does not send {type(message).__name__}")

    def _results(self, worker: Worker, message: p.Done, now: float) -> list[Send]:
        lease = worker.leases.get(message.lease)
        if lease is None:
            self._late += len(message.indexes)
            worker.note_stray()
            return []
        held = self._held(lease, message.indexes)
        init = lease.queue.group.init
        if message.statuses[:1] != _INIT_FAILED:
            self._standing.succeeded(worker, lease.client, init, now)
        elif self._standing.init_failed(worker, lease.client, init, now):
            return self._returned(worker, message.lease, message.indexes, now)
        if lease.client.found is not None:
            self._recovery.keep(lease.client, held, message.statuses, message.payloads)
        statuses = message.statuses
        payloads = message.payloads
        tasks = lease.client.tasks
        for index in message.indexes:
            lease.tasks[index] = None
        lease.left -= len(held)
        worker.done += len(held)
        again = (
            self._charges.retry(lease.queue, held, statuses)
            if lease.queue.options.retries
            else set()
        )
        over = [task for task in held if task.queue is not None and task not in again]
        ids = [task.id for task in over]
        for id in ids:
            del tasks[id]
        lease.client.bytes -= bytes_of([task.payload for task in over if task.payload is not None])
        if len(ids) != len(held):  # some were cancelled meanwhile, or run again
            wanted = [task.queue is not None and task not in again for task in held]
            statuses = bytes(itertools.compress(statuses, wanted))
            payloads = list(itertools.compress(payloads, wanted))
        if held:
            lease.queue.estimate.observe(len(held), message.seconds)
        self._done += len(ids)
        lease.client.done += len(ids)
        sends: list[Send] = []
        if ids:
            sends.append(lease.client.tell(p.Results(ids, statuses, payloads, message.seconds)))
            if lease.client.parent:
                sends += self._dispatcher.lend(lease.client)
        self._dispatcher.confirm(lease)
        if lease.left:
            self._dispatcher.note_moved(lease, now)
        else:
            self._dispatcher.close(lease)
        sends += self._dispatcher.dispatch(now)
        return sends

    def _held(self, lease: Lease, indexes: list[int]) -> list[Task]:
        """The lease's tasks of these indexes, each of which must be open and named once.

        Raises:
            ProtocolError: one is not.
        """
        tasks = lease.tasks
        size = len(tasks)
        held = [task for index in indexes if index < size and (task := tasks[index]) is not None]
        if len(held) != len(indexes) or len(set(indexes)) != len(indexes):
            raise ProtocolError(f"lease {lease.number} does not hold those tasks")
        return held

    def _returned(self, worker: Worker, number: int, indexes: list[int], now: float) -> list[Send]:
        lease = worker.leases.get(number)
        if lease is None:
            worker.note_stray()
            return []
        held = self._held(lease, indexes)
        for index in indexes:
            lease.tasks[index] = None
        lease.left -= len(held)
        self._dispatcher.note_stuck(worker, now)
        self._recovery.gone(lease.client, held)
        self._charges.requeue(lease.queue, held)
        self._close_if_done(lease)
        return self._dispatcher.dispatch(now)

    def _crashed(self, worker: Worker, message: p.Crashed, now: float) -> list[Send]:
        lease = worker.leases.get(message.lease)
        if lease is None:
            worker.note_stray()
            return []
        (task,) = self._held(lease, [message.index])
        lease.tasks[message.index] = None
        lease.left -= 1
        if message.kind != p.CRASHED:
            text = f"{message.reason} on worker {worker.name}"
            self._recovery.keep_end(lease.client, task, message.kind, text)
            sends = self._charges.exceeded(task, message.kind, text)
        else:
            text = f"its runner {message.reason} on worker {worker.name}"
            self._recovery.gone(lease.client, [task])
            if self._standing.crashed(worker, task, now) and task.queue is not None:
                sends = self._charges.pardon(task, text)
            else:
                sends = self._charges.charge(task, text, is_crash=True)
        self._close_if_done(lease)
        return [*sends, *self._dispatcher.dispatch(now)]

    def _may_have_started(self, lease: Lease) -> bool:
        """Whether the lease's first open task had perhaps begun when its worker was lost.

        What was sent ahead had perhaps, too, which matters only to tasks that may run at most once
        (and come alone).
        """
        return lease.in_slot or lease.queue.options.at_most_once

    def _close_if_done(self, lease: Lease) -> None:
        if lease.left == 0:
            self._dispatcher.close(lease)

    def _worker_left(self, worker: Worker, now: float, reason: str, charge: bool) -> list[Send]:
        self._dispatcher.remove(worker)
        sends = self._nesting.worker_left(worker)
        # The youngest first: what was sent ahead is not promoted to a slot meanwhile,
        # and the oldest end up in front.
        for lease in reversed(list(worker.leases.values())):
            open_tasks = [task for task in lease.tasks if task is not None]
            lease.left = 0
            self._dispatcher.close(lease)
            self._recovery.gone(lease.client, open_tasks)
            started = open_tasks[:1] if charge and self._may_have_started(lease) else []
            self._charges.requeue(lease.queue, open_tasks[len(started) :], is_reassigned=True)
            for task in started:
                task.lease = None
                sends += self._charges.charge(
                    task, f"worker {worker.name} was lost: {reason}", is_crash=False
                )
        return [*sends, *self._cluster_changed(), *self._dispatcher.dispatch(now)]

    # --- Work of an earlier broker's --------------------------------------------------------------

    def _worker_resumed(self, worker: Worker, now: float) -> list[Send]:
        if not worker.is_returning:
            raise ProtocolError("only a worker that is back says that it has resumed")
        self._recovery.back(worker)
        if worker.state == RETURNING:
            worker.state = READY
            self._dispatcher.place(worker)
        return self._recover(now)

    def _recover(self, now: float) -> list[Send]:
        """Give out what is held back, if that is to end; and what is doubtful then fails."""
        was_open = self._recovery.is_open
        sends = self._recovery.tick(now)
        if was_open and not self._recovery.is_open:
            known, self.workers = self.workers or set(), set()
            present = set(self._worker_by_number)
            self._note_workers(present, known - present)
        return [*sends, *self._dispatcher.dispatch(now)]

    def _note_workers(self, new: set[int], gone: set[int]) -> None:
        """Workers have come or gone, or are not awaited any more."""
        if self.workers is not None:
            self.workers -= gone
            self.workers |= new
            self.changes.append(Change(new, gone))

    # --- Letters ----------------------------------------------------------------------------------

    def _to_client(self, worker: Worker, letter: p.Letter) -> list[Send]:
        """A runner's letter, to the client whose task it runs."""
        client = _served(worker, letter.client)
        if client is None:
            return []
        letter.worker = worker.number
        if client.peer not in self._clients:
            self._recovery.keep_letter(client, letter)
            return []
        return [Send(client.peer, letter)]

    def _to_runner(self, client: Client, letter: p.Letter) -> list[Send]:
        """A client's letter, to a runner of a worker that works for it."""
        worker = self._worker_by_number.get(letter.worker)
        if worker is None or _served(worker, letter.client) is not client:
            return []
        letter.worker = 0
        return [Send(worker.peer, letter)]

    # --- Telling ----------------------------------------------------------------------------------

    def _cluster(self) -> p.Cluster:
        return p.Cluster(
            len(self._workers) - self._draining, self._dispatcher.slots - self._draining_slots
        )

    def _cluster_changed(self) -> list[Send]:
        message = self._cluster()
        return [client.tell(message) for client in self._clients.values()]

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        workers = list(self._workers.values())
        assert self._worker_by_number == {one.number: one for one in workers}, "a wrong number"
        roots = [client for client in self._clients.values() if client.root is client]
        assert self._client_by_number == {one.number: one for one in roots}, "a wrong number"
        staying = [worker for worker in workers if worker.state != DRAINING]
        slots = sum(worker.slots for worker in staying)
        assert self._cluster() == p.Cluster(len(staying), slots), "the cluster is miscounted"
        leases = [lease for worker in workers for lease in worker.leases.values()]
        held: dict[int, int] = {}
        for lease in leases:
            open_tasks = [task for task in lease.tasks if task is not None]
            assert lease.left == len(open_tasks) > 0, "a lease miscounts its tasks"
            assert all(task.lease is lease for task in open_tasks), "a task has two leases"
            for task in open_tasks:
                held[id(task)] = held.get(id(task), 0) + 1
        for client in self._clients.values():
            places = [lease for lease in leases if lease.client.root is client]
            client.check_invariants(held, places)
            is_waiting = client.peer in self._dispatcher.waiting
            may_wait = client.live > 0 and not client.is_held_back
            assert may_wait == is_waiting, "a client waits in vain"
        assert self._dispatcher.waiting.keys() <= self._clients.keys(), "a client that left waits"
        self._dispatcher.check_invariants(workers)
        self._budget.check_invariants(self._clients.values())
        self._nesting.check_invariants(workers, leases)
        self._recovery.check_invariants()
        self._standing.check_invariants()


def _served(worker: Worker, number: int) -> Client | None:
    """The client of that number, if the worker holds a lease that is its own,
    or made on its behalf.
    """
    for lease in worker.leases.values():
        if lease.client.root.number == number:
            return lease.client.root
    return None
