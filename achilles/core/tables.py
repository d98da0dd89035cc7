"""What the scheduler keeps: tasks in their queues, clients, workers, and leases.

Rules
    1. A task knows its queue while somebody waits for its result,
       and its lease while it is at a worker.
    2. A queue's tasks are in the order in which they came;
       one that is put back stands among the first again, by its age.
    3. A client's queues stand in the order of their oldest tasks,
       so that the oldest of all goes first.
    4. A task that submits tasks is a client as well, a nested one: of the *root*, the client that
       all is done for in the end. What they hold is counted there.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from math import inf
from typing import NamedTuple, TypeAlias

import msgspec

from achilles.core import protocol as p
from achilles.core.chunking import AHEAD_SECONDS, Estimate
from achilles.errors import ProtocolError

QUEUES_KEPT = 256  # without tasks, of a client: of a function that comes back the duration is known
UNWANTED_MAX = 64
STRAYS_MAX = 2  # answers that a worker may give for leases that it does not hold

PeerId: TypeAlias = Hashable
Rank: TypeAlias = "tuple[int, int]"
Tags: TypeAlias = "tuple[str, ...]"
# Workers by what they offer, who was served last at the end. The first is taken again and again,
# and what was taken put back: a plain dict passes over all that was taken before to find it.
Places: TypeAlias = "dict[frozenset[str], OrderedDict[PeerId, Worker]]"

READY, SUSPECT, DRAINING = "ready", "suspect", "draining"
QUARANTINED = "quarantined"  # everything fails there
RETURNING = "returning"  # it tells what it holds of an earlier broker's leases


class Send(NamedTuple):
    """A message on its way to a peer."""

    to: PeerId
    message: p.ToClient | p.ToWorker


class Blame:
    """What a task was charged with."""

    __slots__ = ("crashes", "earlier", "losses", "retries", "story")

    def __init__(self, options: p.Options) -> None:
        self.earlier = 0  # attempts under another broker
        self.crashes = options.crashes
        self.losses = options.losses
        self.retries = 0
        self.story = ["it was in a bundle, which ended so"] * (self.crashes + self.losses)

    @property
    def attempts(self) -> int:
        """How often the task was begun, so far as is known."""
        return self.earlier + self.crashes + self.losses + self.retries


class Task(msgspec.Struct, eq=False, gc=False):
    """One call. ``queue`` is None once nobody waits for its result;
    ``lease`` is None while it is queued.

    A struct, because there may be millions: it is made in a third of the time, and the garbage
    collector passes it over. What it refers to lets go of it when it is resolved.
    """

    id: int
    queue: TaskQueue | None
    payload: p.Payload | None
    lease: Lease | None = None
    blame: Blame | None = None


class TaskQueue:
    """A client's tasks of one group, oldest first. ``live`` counts those that are not cancelled.

    One that was put back stands in front again, and may be younger than another that had been:
    whoever takes the first away has the client `enqueue` it.
    """

    __slots__ = (
        "client",
        "does_lend",
        "entry",
        "estimate",
        "group",
        "leases",
        "live",
        "needs",
        "options",
        "tasks",
    )

    def __init__(self, client: Client, group: p.Group, guess: Estimate | None = None) -> None:
        self.client = client
        self.group = group
        self.needs = group.needs
        self.does_lend = False  # its tasks wait for tasks of their own
        self.options = group.options or p.PLAIN
        self.entry: Rank | None = None  # under which it stands in its client's order
        self.estimate = Estimate(guess)
        self.tasks: deque[Task] = deque()
        self.live = 0
        self.leases = 0

    @property
    def rank(self) -> Rank | None:
        """Where it stands among its client's queues: by priority, then by its oldest task."""
        tasks = self.tasks
        head = tasks[0] if tasks and tasks[0].queue is not None else self.head()
        return None if head is None else (-self.options.priority, head.id)

    @property
    def chunk_max(self) -> int:
        """At most so many tasks may travel together; 0: no limit."""
        is_alone = self.options.at_most_once or self.does_lend
        return 1 if is_alone else self.group.chunk_max

    def may_wait(self, slots: int) -> bool:
        """Whether a chunk may be sent ahead, behind one that runs,
        where ``slots`` slots share what is queued.

        What takes long may if something is left for each slot then:
        near the end it goes to whichever is free first.
        """
        if self.does_lend:
            return False
        estimate = self.estimate
        if estimate.seconds is None:
            # One task may, or a client that came later would never start where others keep every
            # slot busy.
            return not self.leases
        if estimate.is_short:
            return True
        has_more = self.live > slots and not self.options.at_most_once
        return has_more and estimate.seconds <= AHEAD_SECONDS

    def head(self) -> Task | None:
        """The oldest task that is not cancelled."""
        tasks = self.tasks
        while tasks and tasks[0].queue is None:
            tasks.popleft()
        return tasks[0] if tasks else None

    def forget_unwanted(self) -> None:
        """Drop what was cancelled, where that is most of what is kept:
        a head that cannot start keeps all behind it here.
        """
        if len(self.tasks) > 2 * self.live + UNWANTED_MAX:
            self.tasks = deque(task for task in self.tasks if task.queue is not None)

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


class Found:
    """What workers hold of a client's that it has not asked for, after a change of brokers.

    ``tasks`` run, or wait to; of ``results`` each is a status, a payload, and how many attempts
    there had been before; ``ended`` are those that took more time or memory than they may: a kind,
    a text, and the same number; ``letters`` are for a client that is not back.
    """

    __slots__ = ("ended", "letters", "results", "tasks")

    def __init__(self) -> None:
        self.tasks: dict[int, Task] = {}
        self.results: dict[int, tuple[int, p.Payload, int]] = {}
        self.ended: dict[int, tuple[str, str, int]] = {}
        self.letters: list[p.Letter] = []


class Client:
    """A client's session: its tasks, its queues,
    and the places that it and its nested clients hold.
    """

    def __init__(self, peer: PeerId, number: int, hello: p.ClientHello) -> None:
        self.peer = peer
        self.number = number
        self.name = hello.name
        self.role = hello.role
        self.slots_max = hello.slots_max
        self.root: Client = self
        self.parent: Lease | None = None
        self.nested = 0  # clients of which it is the root
        self.tasks: dict[int, Task] = {}
        self.blobs: dict[int, p.Payload] = {}
        self.unwanted: set[int] = set()  # blobs that it has forgotten, but nested clients need
        self.bytes = 0  # of its tasks and of the blobs that it wants
        self.grant = 0  # how many they may be (see `budget`); 0: no limit
        self.owed = 0  # bytes of results that it has not taken
        self.is_held = False  # too many: no more of its tasks are run until it takes them
        self.queues: dict[p.Group, TaskQueue] = {}
        self._queues_max = 2 * QUEUES_KEPT
        # Of the latest queue of each function, and of bundles of its calls.
        self._estimates: dict[tuple[int, bool], Estimate] = {}
        # A heap of queues by rank for each set of wanted tags; stale entries are skipped.
        self.orders: dict[Tags, list[tuple[Rank, int, TaskQueue]]] = {}
        self._entries = 0
        self.found: Found | None = None  # until it has asked for all that it wants of it
        self.is_held_back = False  # a worker might come back that holds what is queued
        self.initialized: dict[int, set[int]] = {}  # by initializer, the workers that have run it
        self.doubtful: set[int] = set()  # queued, and may run at most once, which they perhaps did
        self.live = 0
        self.running = 0  # leases in slots
        self.prefetched = 0  # leases waiting behind those
        self.lent = 0  # leases that wait for tasks of their own
        self.done = 0

    def come_back(self, peer: PeerId, hello: p.ClientHello) -> None:
        """The client whose tasks were found is there itself."""
        self.peer = peer
        self.name, self.role, self.slots_max = hello.name, hello.role, hello.slots_max

    @property
    def urgency(self) -> tuple[int, int]:
        """Of one root's clients the highest goes first: the deepest,
        so that few tasks wait for others, then the newest.
        """
        return (0, 0) if self.parent is None else (self.parent.depth + 1, self.parent.number)

    def open_queue(self, group: p.Group) -> TaskQueue:
        """A queue for tasks of a new group; some of those that are empty give way."""
        if len(self.queues) >= self._queues_max:
            empty = [q for q in self.queues.values() if q.head() is None and not q.leases]
            for queue in empty[:-QUEUES_KEPT]:
                del self.queues[queue.group]
            kept = {id(queue.estimate) for queue in self.queues.values()}
            self._estimates = {key: one for key, one in self._estimates.items() if id(one) in kept}
            self._queues_max = max(2 * QUEUES_KEPT, 2 * len(self.queues))
        if not group.fn:
            queue = self.queues[group] = TaskQueue(self, group)
            return queue
        # With other arguments that are sent once, or other options, the function takes as long,
        # for all that is known.
        key = (group.fn, (group.options or p.PLAIN).is_bundle)
        queue = self.queues[group] = TaskQueue(self, group, self._estimates.get(key))
        self._estimates[key] = queue.estimate
        return queue

    def tell(self, message: p.ToTask) -> Send:
        """The message on its way to the client."""
        return Send(self.peer, message)

    def owner(self, blob: int, group: p.Group) -> Client:
        """Whose blob a group means by that number: an initializer is the root's,
        for it runs once a runner.
        """
        return self.root if blob == group.init else self

    @property
    def places(self) -> int:
        """How many leases the client holds."""
        return self.running + self.prefetched

    @property
    def has_all_its_slots(self) -> bool:
        """Whether one more lease could make more of its tasks run at once than it wants,
        or than it takes results of.

        One in advance counts: it runs as soon as the worker has a free runner, which may be now.
        """
        return self.is_held or 0 < self.slots_max <= self.places

    def next_queue(self, tags: frozenset[str]) -> TaskQueue | None:
        """The queue of the highest rank whose tasks may run on a worker with these tags."""
        best: tuple[Rank, TaskQueue] | None = None
        for wanted in tuple(self.orders):
            if wanted and not tags.issuperset(wanted):
                continue
            first = _first(self.orders[wanted])
            if first is None:
                del self.orders[wanted]
            elif best is None or first[0] < best[0]:
                best = first
        return best[1] if best else None

    def enqueue(self, queue: TaskQueue) -> None:
        """Note that a queue has tasks, or an older head than before."""
        rank = queue.rank
        if rank is not None and (queue.entry is None or rank < queue.entry):
            queue.entry = rank
            self._entries += 1
            order = self.orders.setdefault(queue.options.tags, [])
            heapq.heappush(order, (rank, self._entries, queue))

    def unwant(self, blobs: Iterable[int]) -> None:
        """The client has forgotten these blobs; until they are dropped here,
        they are not its burden.
        """
        for blob in self.blobs.keys() & set(blobs) - self.unwanted:
            self.bytes -= p.size_of(self.blobs[blob])
            self.unwanted.add(blob)

    def status(self) -> p.ClientStatus:
        """This client in numbers."""
        return p.ClientStatus(self.name, self.live, len(self.tasks) - self.live, self.done)

    def check_invariants(self, held: dict[int, int], leases: list[Lease]) -> None:
        """Assert that nothing is miscounted.

        ``held``: by task, how often workers hold it; ``leases``: its own and,
        if it is a root, those made on its behalf.
        """
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
        assert self.lent == sum(lease.is_lent for lease in leases), "lent miscounted"
        assert self.prefetched == len(leases) - self.running - self.lent, "prefetched miscounted"


def _first(order: list[tuple[Rank, int, TaskQueue]]) -> tuple[Rank, TaskQueue] | None:
    """The queue of the highest rank, and its rank;
    entries that are out of date are put right on the way.
    """
    while order:
        entry, number, queue = order[0]
        if entry != queue.entry:
            heapq.heappop(order)
            continue
        rank = queue.rank
        queue.entry = rank
        if rank is None:
            heapq.heappop(order)
            continue
        if rank != entry:
            heapq.heapreplace(order, (rank, number, queue))
        if order[0][0] == rank:
            return rank, queue
    return None


class Worker:
    """A worker's session and the leases that it holds, oldest first."""

    def __init__(self, peer: PeerId, number: int, hello: p.WorkerHello, now: float) -> None:
        self.peer = peer
        self.number = number
        self.name = hello.name
        self.slots = hello.slots
        self.pid = hello.pid
        self.tags = frozenset(hello.tags)
        self.state = RETURNING if hello.is_back else READY
        self.is_returning = hello.is_back
        self.is_gone = False
        self.is_silent = False
        self.faults: list[Task] = []  # that ended their runners, one after the other
        self.faulty_since = now
        self.succeeded_at = -inf
        self.quarantines = 0
        self.rests_until = now
        self.avoids: Task | None = None  # which is to go elsewhere first
        self.leases: dict[int, Lease] = {}
        self.place: Places | None = None  # among the idle ones, or those with room for one more
        self.taken = 0  # slots with a lease
        self.stuck = 0  # leases that are
        self.lent = 0  # leases that wait for tasks of their own
        self.has_lent = False
        self.blobs: set[tuple[int, int]] = set()
        self.heard_at = now
        self.done = 0
        self.strays = 0  # answers for leases that it does not hold

    def note_stray(self) -> None:
        """It has answered for a lease that it does not hold. None of ours does;
        a forger would try often.

        Raises:
            ProtocolError: it has done so too often.
        """
        self.strays += 1
        if self.strays > STRAYS_MAX:
            raise ProtocolError(f"{self.strays} answers for leases that it does not hold")

    @property
    def ahead(self) -> int:
        """How many leases wait behind those in slots."""
        return len(self.leases) - self.taken - self.lent

    def status(self, now: float) -> p.WorkerStatus:
        """This worker in numbers."""
        running = sum(lease.left for lease in self.leases.values())
        silent_for = max(0.0, now - self.heard_at)
        return p.WorkerStatus(
            self.name, self.state, self.slots, running, self.done, silent_for, self.pid
        )


class Lease:
    """A chunk at a worker; a task's entry becomes None when it is accounted for,
    ``left`` counts the others.

    It ``is_stuck`` when something came back that had waited at its worker, perhaps behind it, and
    it has shown nothing for long.
    """

    __slots__ = (
        *("client", "depth", "in_slot", "is_lent", "is_stuck", "left", "moved_at", "number"),
        *("queue", "since", "tasks", "worker"),
    )

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
        self.is_lent = False
        self.is_stuck = False
        self.moved_at = now  # its last result
        self.depth = queue.client.urgency[0]
        self.since = now
