"""What the scheduler keeps: tasks in their queues, clients, workers, and leases.

Rules
    1. A task knows its queue while somebody waits for its result, and its lease while it is at a worker.
    2. A queue's tasks are in the order in which they came; one that is put back stands in front again.
    3. A client's queues stand in the order of their oldest tasks, so that the oldest of all goes first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import TypeAlias

from achilles.core import protocol as p
from achilles.core.chunking import Estimate

PeerId: TypeAlias = Hashable

READY, SUSPECT, DRAINING = "ready", "suspect", "draining"


class Blame:
    """What a task was charged with."""

    __slots__ = ("crashes", "losses", "story")

    def __init__(self) -> None:
        self.crashes = 0
        self.losses = 0
        self.story: list[str] = []


class Task:
    """One call. ``queue`` is None once nobody waits for its result; ``lease`` is None while it is queued."""

    __slots__ = ("blame", "id", "lease", "payload", "queue")

    def __init__(self, id: int, queue: TaskQueue, payload: p.Payload) -> None:
        self.id = id
        self.queue: TaskQueue | None = queue
        self.payload: p.Payload | None = payload
        self.lease: Lease | None = None
        self.blame: Blame | None = None


class TaskQueue:
    """A client's tasks of one function, oldest first. ``live`` counts those that are not cancelled."""

    __slots__ = (
        "chunk_max",
        "client",
        "entry",
        "estimate",
        "fn",
        "init",
        "leases",
        "live",
        "pause_until",
        "tasks",
    )

    def __init__(self, client: Client, fn: int, init: int, chunk_max: int) -> None:
        self.client = client
        self.fn = fn
        self.init = init
        self.chunk_max = chunk_max
        self.entry: int | None = None  # the id under which it stands in its client's order
        self.estimate = Estimate()
        self.tasks: deque[Task] = deque()
        self.live = 0
        self.leases = 0
        self.pause_until = 0.0

    def head(self) -> Task | None:
        """The oldest task that is not cancelled."""
        tasks = self.tasks
        while tasks and tasks[0].queue is None:
            tasks.popleft()
        return tasks[0] if tasks else None

    def take(self, count: int) -> list[Task]:
        """Remove up to ``count`` tasks from the front; one with a history comes alone."""
        chunk: list[Task] = []
        tasks = self.tasks
        while tasks and len(chunk) < count:
            if tasks[0].blame is not None and chunk:
                break
            task = tasks.popleft()
            if task.queue is None:
                continue
            chunk.append(task)
            if task.blame is not None:
                break
        self.live -= len(chunk)
        return chunk


class Client:
    """A client's session: its tasks, its queues, and the places that it holds."""

    def __init__(self, peer: PeerId, number: int, hello: p.ClientHello) -> None:
        self.peer = peer
        self.number = number
        self.name = hello.name
        self.role = hello.role
        self.slots_max = hello.slots_max
        self.tasks: dict[int, Task] = {}
        self.blobs: dict[int, p.Payload] = {}
        self.queues: dict[tuple[int, int, int], TaskQueue] = {}
        self.order: list[
            tuple[int, int, TaskQueue]
        ] = []  # a heap by the head's id; stale entries are skipped
        self._entries = 0
        self.live = 0
        self.running = 0  # leases in slots
        self.prefetched = 0  # leases waiting behind those
        self.done = 0

    @property
    def has_all_its_slots(self) -> bool:
        """Whether one more lease could make more of its tasks run at once than it wants.

        One in advance counts: it runs as soon as the worker has a free runner, which may be now.
        """
        return 0 < self.slots_max <= self.running + self.prefetched

    def next_queue(self) -> TaskQueue | None:
        """The queue with the oldest task."""
        order = self.order
        while order:
            entry, number, queue = order[0]
            if entry != queue.entry:
                heapq.heappop(order)
                continue
            head = queue.head()
            if head is None:
                queue.entry = None
                heapq.heappop(order)
            elif head.id != entry:
                queue.entry = head.id
                heapq.heapreplace(order, (head.id, number, queue))
            else:
                return queue
        return None

    def enqueue(self, queue: TaskQueue) -> None:
        """Note that a queue has tasks, or an older head than before."""
        head = queue.head()
        if head is not None and (queue.entry is None or head.id < queue.entry):
            queue.entry = head.id
            self._entries += 1
            heapq.heappush(self.order, (head.id, self._entries, queue))

    def status(self) -> p.ClientStatus:
        """This client in numbers."""
        return p.ClientStatus(self.name, self.live, len(self.tasks) - self.live, self.done)

    def check_invariants(self, held: dict[int, int], leases: list[Lease]) -> None:
        """Assert that nothing is miscounted; ``held``: by task, how often workers hold it."""
        queued = [
            task for queue in self.queues.values() for task in queue.tasks if task.queue is not None
        ]
        assert len(queued) == self.live, "a client miscounts its queue"
        assert len({task.id for task in queued}) == len(queued), "a task is queued twice"
        assert all(task.lease is None for task in queued), "a queued task has a lease"
        leased = [task for task in self.tasks.values() if task.lease is not None]
        assert all(held.get(id(task)) == 1 for task in leased), "a leased task is not held"
        assert len(queued) + len(leased) == len(self.tasks), "a task is nowhere"
        assert self.running == sum(lease.in_slot for lease in leases), "running miscounted"
        assert self.prefetched == len(leases) - self.running, "prefetched miscounted"


class Worker:
    """A worker's session and the leases that it holds, oldest first."""

    def __init__(self, peer: PeerId, hello: p.WorkerHello, now: float) -> None:
        self.peer = peer
        self.name = hello.name
        self.slots = hello.slots
        self.pid = hello.pid
        self.state = READY
        self.leases: dict[int, Lease] = {}
        self.blobs: set[tuple[int, int]] = set()
        self.heard_at = now
        self.done = 0

    def status(self, now: float) -> p.WorkerStatus:
        """This worker in numbers."""
        running = sum(lease.left for lease in self.leases.values())
        silent_for = max(0.0, now - self.heard_at)
        return p.WorkerStatus(
            self.name, self.state, self.slots, running, self.done, silent_for, self.pid
        )


class Lease:
    """A chunk at a worker; a task's entry becomes None when it is accounted for, ``left`` counts the others."""

    __slots__ = ("client", "in_slot", "left", "number", "queue", "since", "tasks", "worker")

    def __init__(
        self,
        number: int,
        worker: Worker,
        queue: TaskQueue,
        tasks: list[Task],
        in_slot: bool,
        now: float,
    ) -> None:
        self.number = number
        self.worker = worker
        self.client = queue.client
        self.queue = queue
        self.tasks: list[Task | None] = list(tasks)
        self.left = len(tasks)
        self.in_slot = in_slot
        self.since = now
