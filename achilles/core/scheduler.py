"""The broker's decisions: which tasks go where, and what becomes of them.

Rules
    1. A task is in exactly one place: in its queue, under exactly one lease, or resolved and forgotten.
    2. Each task of a client is resolved once: by one `Results` entry, one `Failed`, or the client's `Cancel`.
    3. A lease ends when each of its tasks was done, returned, or crashed; until then it takes up a place.
    4. Only a started task is charged: for its runner's crash, or for its worker's loss. What was given
       back, or waited behind another task, is not.
    5. A peer's messages can be wrong in any way that their types allow: that raises `ProtocolError`
       before anything has changed, or is counted as late.

Picture
    client ─Submit─▶ TaskQueue (one for each function) ─chunk─▶ Lease ─Run─▶ worker
                        ▲                                        │ │
                        └──────── Returned, Crashed, lost ───────┘ └─ Done ─▶ Results ─▶ client

Theory
    Slots are given to the client that holds fewest, so that a long queue is no advantage; within a client the
    oldest task goes first. A worker takes one chunk for each slot, and one more for each slot in advance if its
    tasks are short (`chunking`). A task that was charged before travels alone, so that the next crash is its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from achilles.core import protocol as p
from achilles.core.chunking import chunk_size
from achilles.core.tables import (
    DRAINING,
    READY,
    SUSPECT,
    Blame,
    Client,
    Lease,
    PeerId,
    Task,
    TaskQueue,
    Worker,
)
from achilles.errors import ProtocolError

CRASHES_MAX = 3
LOSSES_MAX = 5
ANNOUNCE_SECONDS = 0.005  # most tasks are done before anybody could ask whether they run
PREFETCH_PAUSE = 0.5  # after tasks came back from behind a long one, seconds


class Send(NamedTuple):
    """A message on its way to a peer."""

    to: PeerId
    message: p.ToClient | p.ToWorker


class Scheduler:
    """Gives clients' tasks to workers. Sessions come by `join`, end by `leave`, speak by `receive`."""

    def __init__(self, *, credit: int = 0, now: float = 0.0) -> None:
        """``credit``: tasks that a client may have unresolved; 0: no limit."""
        self._credit = credit
        self._started_at = now
        self._clients: dict[PeerId, Client] = {}
        self._workers: dict[PeerId, Worker] = {}
        self._idle: dict[PeerId, Worker] = {}  # ready, with a free slot
        self._room: dict[
            PeerId, Worker
        ] = {}  # ready, slots taken, with room for one more in advance
        self._waiting: dict[PeerId, Client] = {}  # with queued tasks
        self._unannounced: deque[tuple[float, Lease]] = deque()
        self._next_lease = 1
        self._next_client = 1
        self._slots = 0
        self._done = self._failed = self._reassigned = self._late = 0

    # --- Sessions ---------------------------------------------------------------------------------

    def join(self, peer: PeerId, hello: p.ClientHello | p.WorkerHello, now: float) -> list[Send]:
        """A new session begins."""
        match hello:
            case p.WorkerHello():
                worker = Worker(peer, hello, now)
                self._workers[peer] = worker
                self._slots += worker.slots
                self._place(worker)
                return [*self._cluster_changed(), *self._dispatch(now)]
            case p.ClientHello():
                client = Client(peer, self._next_client, hello)
                self._next_client += 1
                self._clients[peer] = client
                return [Send(peer, self._cluster())]

    def leave(self, peer: PeerId, now: float, reason: str, *, charge: bool = True) -> list[Send]:
        """A session has ended; ``charge`` tells whether started tasks are charged for a lost worker."""
        if worker := self._workers.pop(peer, None):
            return self._worker_left(worker, now, reason, charge)
        if client := self._clients.pop(peer, None):
            return self._client_left(client, now)
        return []

    def heard(self, peer: PeerId, now: float) -> None:
        """A worker has shown life."""
        worker = self._workers.get(peer)
        if worker is not None:
            worker.heard_at = now

    def suspect(self, peer: PeerId) -> None:
        """A worker has been silent for long: it gets no new work until `receive` or `resume`."""
        worker = self._workers.get(peer)
        if worker and worker.state == READY:
            worker.state = SUSPECT
            self._place(worker)

    def resume(self, peer: PeerId, now: float) -> list[Send]:
        """A suspect worker was heard again."""
        worker = self._workers.get(peer)
        if worker is None or worker.state != SUSPECT:
            return []
        worker.state = READY
        self._place(worker)
        return self._dispatch(now)

    # --- The core's contract ----------------------------------------------------------------------

    def receive(self, peer: PeerId, message: p.FromClient | p.FromWorker, now: float) -> list[Send]:
        """Take in a message of a session.

        Raises:
            ProtocolError: the message does not fit the session; nothing has changed.
        """
        worker = self._workers.get(peer)
        if worker is not None:
            return self._from_worker(worker, message, now)
        client = self._clients.get(peer)
        if client is None:
            return []
        return self._from_client(client, message, now)

    def tick(self, now: float) -> list[Send]:
        """Tell clients which of their tasks were dispatched a moment ago and are not done yet."""
        sends: list[Send] = []
        unannounced = self._unannounced
        while unannounced and unannounced[0][0] <= now:
            _, lease = unannounced.popleft()
            ids = [task.id for task in lease.tasks if task is not None and task.queue is not None]
            if lease.left and ids:
                sends.append(Send(lease.client.peer, p.Running(ids)))
        return sends

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        return self._unannounced[0][0] if self._unannounced else None

    def status(self, now: float) -> p.Status:
        """The state in numbers."""
        return p.Status(
            workers=[worker.status(now) for worker in self._workers.values()],
            clients=[c.status() for c in self._clients.values() if c.role == "client"],
            queued=sum(client.live for client in self._clients.values()),
            running=sum(len(client.tasks) - client.live for client in self._clients.values()),
            done=self._done,
            failed=self._failed,
            reassigned=self._reassigned,
            late=self._late,
            uptime=now - self._started_at,
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
                self._submit(client, message)
                return self._dispatch(now)
            case p.Blob(blob=blob, payload=payload):
                if blob < 1:
                    raise ProtocolError("a blob's number is at least 1")
                client.blobs.setdefault(blob, payload)
                return []
            case p.Forget(blobs=blobs):
                return self._forget(client, blobs)
            case p.Cancel(ids=ids):
                return self._cancel(client, ids)
            case p.StatusRequest():
                return [Send(client.peer, self.status(now))]
            case p.Goodbye(reason=reason):
                return self.leave(client.peer, now, reason)
            case p.Done() | p.Returned() | p.Crashed() | p.Drain():
                raise ProtocolError(f"a client does not send {type(message).__name__}")

    def _submit(self, client: Client, message: p.Submit) -> None:
        if self._credit and len(client.tasks) + len(message.ids) > self._credit:
            raise ProtocolError(f"more than {self._credit} unresolved tasks")
        for blob in (message.fn, message.init):
            if blob and blob not in client.blobs:
                raise ProtocolError(f"a task names blob {blob}, which was not sent")
        key = (message.fn, message.init, message.chunk_max)
        queue = client.queues.get(key)
        if queue is None:
            queue = client.queues[key] = TaskQueue(client, *key)
        was_empty = queue.live == 0
        tasks = client.tasks
        append = queue.tasks.append
        before = len(tasks)
        for id, payload in zip(message.ids, message.payloads, strict=True):
            if id not in tasks:  # a client that is not sure may submit again
                tasks[id] = task = Task(id, queue, payload)
                append(task)
        added = len(tasks) - before
        queue.live += added
        client.live += added
        if added:
            self._waiting[client.peer] = client
            if was_empty:
                client.enqueue(queue)

    def _forget(self, client: Client, blobs: list[int]) -> list[Send]:
        for key, queue in client.queues.items():
            if (key[0] in blobs or key[1] in blobs) and self._is_wanted(queue):
                raise ProtocolError(
                    f"blobs {key[:2]} cannot be forgotten: unresolved tasks name them"
                )
        for blob in blobs:
            client.blobs.pop(blob, None)
            for key in [key for key in client.queues if blob in key[:2]]:
                if not client.queues[key].tasks and not client.queues[key].leases:
                    del client.queues[key]
        sends = []
        for worker in self._workers.values():
            held = [blob for blob in blobs if (client.number, blob) in worker.blobs]
            if held:
                worker.blobs.difference_update((client.number, blob) for blob in held)
                sends.append(Send(worker.peer, p.Forget(client.number, held)))
        return sends

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

    def _cancel(self, client: Client, ids: Iterable[int]) -> list[Send]:
        sends = []
        for id in ids:
            task = client.tasks.pop(id, None)
            if task is None:
                continue
            lease = task.lease
            if lease is None:
                self._unqueue(task)
            else:
                index = lease.tasks.index(task)
                sends.append(Send(lease.worker.peer, p.Revoke(lease.number, [index])))
            task.queue = None
            task.payload = None
        if client.live == 0:
            self._waiting.pop(client.peer, None)
        return sends

    def _unqueue(self, task: Task) -> None:
        queue = task.queue
        if queue is not None:
            queue.live -= 1
            queue.client.live -= 1

    def _client_left(self, client: Client, now: float) -> list[Send]:
        self._waiting.pop(client.peer, None)
        sends = []
        for task in client.tasks.values():
            task.queue = None
            task.payload = None
        client.tasks.clear()
        client.live = 0
        for queue in client.queues.values():  # its leases still refer to them
            queue.tasks.clear()
            queue.live = 0
        for worker in self._workers.values():
            for lease in worker.leases.values():
                if lease.client is client:
                    sends.append(
                        Send(worker.peer, p.Revoke(lease.number, list(range(len(lease.tasks)))))
                    )
            if any(number == client.number for number, _ in worker.blobs):
                worker.blobs = {key for key in worker.blobs if key[0] != client.number}
                sends.append(Send(worker.peer, p.Forget(client.number, [])))
        return sends

    # --- From workers -----------------------------------------------------------------------------

    def _from_worker(
        self, worker: Worker, message: p.FromClient | p.FromWorker, now: float
    ) -> list[Send]:
        match message:
            case p.Done():
                return self._results(worker, message, now)
            case p.Returned(lease=number, indexes=indexes):
                return self._returned(worker, number, indexes, now)
            case p.Crashed(lease=number, index=index, reason=reason):
                return self._crashed(worker, number, index, reason, now)
            case p.Drain():
                worker.state = DRAINING
                self._place(worker)
                return self._cluster_changed()
            case p.Goodbye(reason=reason):
                return self.leave(worker.peer, now, reason, charge=False)
            case p.Submit() | p.Blob() | p.Forget() | p.Cancel() | p.StatusRequest():
                raise ProtocolError(f"a worker does not send {type(message).__name__}")

    def _results(self, worker: Worker, message: p.Done, now: float) -> list[Send]:
        lease = worker.leases.get(message.lease)
        if lease is None:
            self._late += len(message.indexes)
            return []
        held = self._held(lease, message.indexes)
        ids: list[int] = []
        statuses = message.statuses
        payloads = message.payloads
        tasks = lease.client.tasks
        for index, task in zip(message.indexes, held, strict=True):
            lease.tasks[index] = None
            if task.queue is not None:
                ids.append(task.id)
                del tasks[task.id]
        lease.left -= len(held)
        worker.done += len(held)
        if len(ids) != len(held):  # some were cancelled meanwhile
            kept = [at for at, task in enumerate(held) if task.queue is not None]
            statuses = bytes(statuses[at] for at in kept)
            payloads = [payloads[at] for at in kept]
        if held:
            lease.queue.estimate.observe(len(held), message.seconds)
        self._done += len(ids)
        lease.client.done += len(ids)
        sends: list[Send] = []
        if ids:
            sends.append(Send(lease.client.peer, p.Results(ids, statuses, payloads)))
        self._close_if_done(lease)
        sends += self._dispatch(now)
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
            return []
        held = self._held(lease, indexes)
        for index in indexes:
            lease.tasks[index] = None
        lease.left -= len(held)
        lease.queue.pause_until = now + PREFETCH_PAUSE
        self._requeue(lease.queue, held)
        self._close_if_done(lease)
        return self._dispatch(now)

    def _crashed(
        self, worker: Worker, number: int, index: int, reason: str, now: float
    ) -> list[Send]:
        lease = worker.leases.get(number)
        if lease is None:
            return []
        (task,) = self._held(lease, [index])
        lease.tasks[index] = None
        lease.left -= 1
        sends = self._charge(task, f"its runner {reason} on worker {worker.name}", is_crash=True)
        self._close_if_done(lease)
        return [*sends, *self._dispatch(now)]

    def _charge(self, task: Task, text: str, *, is_crash: bool) -> list[Send]:
        """Put a crash or a loss on a task's account, and requeue it or give it up."""
        queue = task.queue
        if queue is None:
            return []
        blame = task.blame = task.blame or Blame()
        blame.story.append(text[: p.TEXT_MAX])
        if is_crash:
            blame.crashes += 1
        else:
            blame.losses += 1
        if blame.crashes < CRASHES_MAX and blame.losses < LOSSES_MAX:
            self._requeue(queue, [task], is_reassigned=True)
            return []
        del queue.client.tasks[task.id]
        self._failed += 1
        kind = p.CRASHED if blame.crashes >= CRASHES_MAX else p.LOST
        return [Send(queue.client.peer, p.Failed(task.id, kind, blame.story))]

    def _requeue(self, queue: TaskQueue, tasks: list[Task], *, is_reassigned: bool = False) -> None:
        """Put leased tasks back to the front of their queue, without those that nobody waits for.

        ``is_reassigned``: a runner or worker failed them, which the status counts.
        """
        client = queue.client
        for task in reversed(tasks):
            task.lease = None
            if task.queue is not None:
                queue.tasks.appendleft(task)
                queue.live += 1
                client.live += 1
                self._reassigned += is_reassigned
        if queue.live:
            self._waiting[client.peer] = client
            client.enqueue(queue)

    def _worker_left(self, worker: Worker, now: float, reason: str, charge: bool) -> list[Send]:
        self._idle.pop(worker.peer, None)
        self._room.pop(worker.peer, None)
        self._slots -= worker.slots
        sends: list[Send] = []
        # The youngest first: what was sent ahead is not promoted to a slot meanwhile, and the oldest end up in front.
        for lease in reversed(list(worker.leases.values())):
            open_tasks = [task for task in lease.tasks if task is not None]
            lease.left = 0
            self._close(lease)
            started = open_tasks[:1] if charge and lease.in_slot else []
            self._requeue(lease.queue, open_tasks[len(started) :], is_reassigned=True)
            for task in started:
                task.lease = None
                sends += self._charge(
                    task, f"worker {worker.name} was lost: {reason}", is_crash=False
                )
        return [*sends, *self._cluster_changed(), *self._dispatch(now)]

    # --- Places -----------------------------------------------------------------------------------

    def _place(self, worker: Worker) -> None:
        """Note whether the worker has a free slot, room for a chunk in advance, or neither."""
        self._idle.pop(worker.peer, None)
        self._room.pop(worker.peer, None)
        if worker.state == READY and worker.peer in self._workers:
            if len(worker.leases) < worker.slots:
                self._idle[worker.peer] = worker
            elif len(worker.leases) < 2 * worker.slots:
                self._room[worker.peer] = worker

    def _close_if_done(self, lease: Lease) -> None:
        if lease.left == 0:
            self._close(lease)

    def _close(self, lease: Lease) -> None:
        """End a lease; the oldest one that waited behind it moves into its slot."""
        worker = lease.worker
        del worker.leases[lease.number]
        unannounced = self._unannounced
        while unannounced and not unannounced[0][1].left:
            unannounced.popleft()
        lease.queue.leases -= 1
        if not lease.in_slot:
            lease.client.prefetched -= 1
        else:
            lease.client.running -= 1
            for other in worker.leases.values():
                if not other.in_slot:
                    other.in_slot = True
                    other.client.prefetched -= 1
                    other.client.running += 1
                    break
        self._place(worker)

    def _dispatch(self, now: float) -> list[Send]:
        """Give out work while there is both work and a place for it."""
        sends: list[Send] = []
        while self._waiting and self._idle:
            queue = self._next_queue_for_slot()
            if queue is None:
                break
            worker = next(iter(self._idle.values()))
            self._lease(worker, queue, True, now, sends)
        while self._waiting and self._room and not self._idle:
            queue = self._next_queue_for_prefetch(now)
            if queue is None:
                break
            worker = next(iter(self._room.values()))
            self._lease(worker, queue, False, now, sends)
        return sends

    def _next_queue_for_slot(self) -> TaskQueue | None:
        best: Client | None = None
        for client in self._waiting.values():
            if client.has_all_its_slots:
                continue
            if best is None or client.running < best.running:
                best = client
        return best.next_queue() if best else None

    def _next_queue_for_prefetch(self, now: float) -> TaskQueue | None:
        best: TaskQueue | None = None
        for client in self._waiting.values():
            queue = client.next_queue()
            if queue is None or queue.pause_until > now or client.has_all_its_slots:
                continue
            # An unknown function may send one task ahead, or a client that came later would never start
            # where others keep every slot busy.
            if not queue.estimate.is_short and (queue.estimate.seconds is not None or queue.leases):
                continue
            if best is None or (
                client.running + client.prefetched < best.client.running + best.client.prefetched
            ):
                best = queue
        return best

    def _lease(
        self, worker: Worker, queue: TaskQueue, in_slot: bool, now: float, sends: list[Send]
    ) -> None:
        client = queue.client
        size = chunk_size(queue.estimate, queue.live, self._slots, queue.chunk_max)
        tasks = queue.take(size)
        client.live -= len(tasks)
        if client.live == 0:
            self._waiting.pop(client.peer, None)
        else:  # clients with equal claims take turns
            self._waiting[client.peer] = self._waiting.pop(client.peer)
        number = self._next_lease
        self._next_lease += 1
        lease = worker.leases[number] = Lease(number, worker, queue, tasks, in_slot, now)
        for task in tasks:
            task.lease = lease
        queue.leases += 1
        if in_slot:
            client.running += 1
        else:
            client.prefetched += 1
        self._place(worker)
        for blob in (queue.fn, queue.init):
            if blob and (client.number, blob) not in worker.blobs:
                worker.blobs.add((client.number, blob))
                sends.append(Send(worker.peer, p.Blob(client.number, blob, client.blobs[blob])))
        ids = [task.id for task in tasks]
        payloads = [task.payload for task in tasks if task.payload is not None]
        sends.append(
            Send(worker.peer, p.Run(number, client.number, queue.fn, queue.init, ids, payloads))
        )
        self._unannounced.append((now + ANNOUNCE_SECONDS, lease))

    # --- Telling ----------------------------------------------------------------------------------

    def _cluster(self) -> p.Cluster:
        ready = [worker for worker in self._workers.values() if worker.state != DRAINING]
        return p.Cluster(len(ready), sum(worker.slots for worker in ready))

    def _cluster_changed(self) -> list[Send]:
        message = self._cluster()
        return [Send(peer, message) for peer in self._clients]

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        held: dict[int, int] = {}
        for worker in self._workers.values():
            assert len(worker.leases) <= 2 * worker.slots, f"{worker.name} holds too many leases"
            in_slots = sum(lease.in_slot for lease in worker.leases.values())
            assert in_slots == min(len(worker.leases), worker.slots), "a slot leaks"
            is_idle = worker.state == READY and len(worker.leases) < worker.slots
            assert is_idle == (worker.peer in self._idle), "the idle workers are not the idle ones"
            for lease in worker.leases.values():
                open_tasks = [task for task in lease.tasks if task is not None]
                assert lease.left == len(open_tasks) > 0, "a lease miscounts its tasks"
                assert all(task.lease is lease for task in open_tasks), "a task has two leases"
                for task in open_tasks:
                    held[id(task)] = held.get(id(task), 0) + 1
        for client in self._clients.values():
            leases = [
                lease
                for worker in self._workers.values()
                for lease in worker.leases.values()
                if lease.client is client
            ]
            client.check_invariants(held, leases)
            assert (client.live > 0) == (client.peer in self._waiting), "a client waits in vain"
            if client.live and self._idle and not client.slots_max:
                raise AssertionError("a slot idles while a task waits")
        assert self._slots == sum(worker.slots for worker in self._workers.values())
