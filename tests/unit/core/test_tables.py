"""The scheduler's tables: tasks in the order in which they go out,
and the numbers that are told of them.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.tables import QUEUES_KEPT, Blame, Client, Lease, Task, TaskQueue, Worker
from tests.unit.core.bench import CLIENT, WORKER, SchedulerBench, crossed, runs

NO_TAGS: frozenset[str] = frozenset()


class TablesBench:
    """A client with queues; its invariants hold after every step."""

    def __init__(self, slots_max: int = 0) -> None:
        hello = p.ClientHello(bytes(16), "client", "0", "3", "me", slots_max)
        self.client = Client("peer", 1, crossed(hello))
        worker = p.WorkerHello(bytes(16), "0", "3", "node", slots=4, pid=42, tags=["gpu"])
        self.worker = Worker("worker", 2, crossed(worker), 100.0)

    def queue(self, fn: int = 1, **options: Any) -> TaskQueue:
        """The queue of that function and those options."""
        group = p.Group(fn, 0, options=p.Options(**options) if options else None)
        if group not in self.client.queues:
            self.client.queues[group] = TaskQueue(self.client, group)
        return self.client.queues[group]

    def add(self, queue: TaskQueue, *ids: int) -> None:
        """New tasks at the end."""
        for id in ids:
            task = self.client.tasks[id] = Task(id, queue, b"%d" % id)
            queue.tasks.append(task)
        queue.live += len(ids)
        self.client.live += len(ids)
        self.client.enqueue(queue)
        self.check()

    def cancel(self, *ids: int) -> None:
        """Tasks in their queues are cancelled."""
        for id in ids:
            task = self.client.tasks.pop(id)
            assert task.queue is not None
            task.queue.live -= 1
            self.client.live -= 1
            task.queue = None
        self.check()

    def take(self, queue: TaskQueue, count: int) -> list[int]:
        """The ids of what the queue gives out."""
        taken = queue.take(count)
        self.client.live -= len(taken)
        for task in taken:
            del self.client.tasks[task.id]
        self.check()
        return [task.id for task in taken]

    def put_back(self, queue: TaskQueue, *ids: int) -> None:
        """Tasks that were given out stand in front again."""
        for id in reversed(ids):
            task = self.client.tasks[id] = Task(id, queue, b"%d" % id)
            queue.tasks.appendleft(task)
        queue.live += len(ids)
        self.client.live += len(ids)
        self.client.enqueue(queue)
        self.check()

    def order(self, tags: frozenset[str] = NO_TAGS) -> list[int]:
        """All tasks that such a worker may run, as it would get them one by one."""
        ids = []
        while (queue := self.client.next_queue(tags)) is not None:
            ids += self.take(queue, 1)
        return ids

    def check(self) -> None:
        """The client's invariants; that its queues count is asserted through them."""
        self.client.check_invariants({}, [])
        for queue in self.client.queues.values():
            assert queue.live == sum(task.queue is not None for task in queue.tasks)


# --- A queue --------------------------------------------------------------------------------------


def test_a_queue_gives_out_the_oldest_tasks() -> None:
    """As many as are wanted, or as there are."""
    bench = TablesBench()
    queue = bench.queue()
    bench.add(queue, 1, 2, 3, 4, 5)
    assert bench.take(queue, 2) == [1, 2]
    assert bench.take(queue, 0) == []
    assert bench.take(queue, 9) == [3, 4, 5]
    assert bench.take(queue, 1) == []
    assert queue.head() is None
    assert queue.rank is None


def test_cancelled_tasks_are_passed_over() -> None:
    """Wherever they stand, and they do not count."""
    bench = TablesBench()
    queue = bench.queue()
    bench.add(queue, 1, 2, 3, 4, 5)
    bench.cancel(1, 3)
    head = queue.head()
    assert head is not None
    assert head.id == 2
    assert queue.rank == (0, 2)
    assert bench.take(queue, 2) == [2, 4]
    bench.cancel(5)
    assert bench.take(queue, 2) == []


def test_a_task_with_a_history_comes_alone() -> None:
    """So that the next crash is its own: it ends the chunk before it, and is one itself."""
    bench = TablesBench()
    queue = bench.queue()
    bench.add(queue, 1, 2, 3, 4, 5)
    for id in (3, 4):
        bench.client.tasks[id].blame = Blame(p.PLAIN)
    assert [bench.take(queue, 9) for _ in range(4)] == [[1, 2], [3], [4], [5]]


def test_tasks_that_are_put_back_stand_in_front() -> None:
    """In the order in which they were."""
    bench = TablesBench()
    queue = bench.queue()
    bench.add(queue, 1, 2, 3, 4)
    bench.take(queue, 3)
    bench.put_back(queue, 2, 3)
    assert bench.order() == [2, 3, 4]


def test_a_queue_knows_what_its_tasks_need() -> None:
    """The blobs of its group, and how many tasks may travel together."""
    bench = TablesBench()
    group = p.Group(fn=1, init=0, chunk_max=7, blobs=(4,))
    assert TaskQueue(bench.client, group).needs == (1, 4)
    assert TaskQueue(bench.client, group).chunk_max == 7
    assert TaskQueue(bench.client, group).options == p.PLAIN
    once = group._replace(options=p.Options(at_most_once=True))
    assert TaskQueue(bench.client, once).chunk_max == 1


# --- A client's queues ----------------------------------------------------------------------------


def test_the_queue_of_the_oldest_task_is_next() -> None:
    """Across functions the order of submission holds."""
    bench = TablesBench()
    one, other = bench.queue(1), bench.queue(2)
    assert bench.client.next_queue(NO_TAGS) is None
    bench.add(other, 1, 4)
    bench.add(one, 2, 3)
    bench.add(other, 5)
    assert bench.order() == [1, 2, 3, 4, 5]
    bench.add(one, 7)
    bench.add(other, 6)
    assert bench.order() == [6, 7]


def test_cancelled_heads_do_not_hold_a_place() -> None:
    """Nor does a queue in which nothing is left, nor one that was refilled."""
    bench = TablesBench()
    one, other = bench.queue(1), bench.queue(2)
    bench.add(one, 1, 4)
    bench.add(other, 2, 3)
    bench.cancel(1)
    assert bench.client.next_queue(NO_TAGS) is other
    bench.cancel(2, 3)
    assert bench.client.next_queue(NO_TAGS) is one
    bench.add(other, 5)
    bench.cancel(4)
    bench.add(one, 6)
    assert bench.order() == [5, 6]


def test_what_is_put_back_is_next_again() -> None:
    """It is older than what went to the front meanwhile."""
    bench = TablesBench()
    one, other = bench.queue(1), bench.queue(2)
    bench.add(one, 1, 4)
    bench.add(other, 2, 3)
    assert bench.take(one, 1) == [1]
    assert bench.client.next_queue(NO_TAGS) is other
    bench.put_back(one, 1)
    assert bench.client.next_queue(NO_TAGS) is one
    assert bench.order() == [1, 2, 3, 4]


def test_a_higher_priority_goes_first() -> None:
    """Age counts among equals only; a negative priority is one, too."""
    bench = TablesBench()
    bench.add(bench.queue(1, priority=-1), 1)
    bench.add(bench.queue(1), 2, 4)
    bench.add(bench.queue(2, priority=5), 3, 5)
    assert bench.order() == [3, 5, 2, 4, 1]


def test_tasks_go_only_where_their_tags_are() -> None:
    """All of them; a worker may have others besides. What it may not run holds up nothing."""
    bench = TablesBench()
    bench.add(bench.queue(1, tags=("gpu", "big")), 1)
    bench.add(bench.queue(1, tags=("gpu",)), 2)
    bench.add(bench.queue(1), 3)
    assert bench.order() == [3]
    assert bench.order(frozenset({"big"})) == []
    assert bench.order(frozenset({"gpu", "fast"})) == [2]
    assert bench.order(frozenset({"gpu", "big", "fast"})) == [1]
    bench.add(bench.queue(1, tags=("gpu",)), 4)
    assert bench.order(bench.worker.tags) == [4]


@pytest.mark.parametrize("seed", range(30))
def test_the_order_is_that_of_a_sorted_list(seed: int) -> None:
    """Whatever was submitted, taken, put back and cancelled, and in whichever order."""
    chance = random.Random(seed)
    bench = TablesBench()
    queues = [bench.queue(fn, priority=fn % 2, tags=("gpu",) * (fn % 3 == 0)) for fn in range(1, 7)]
    next_id = 1
    for _ in range(200):
        queue = chance.choice(queues)
        act = chance.random()
        waiting = sorted(bench.client.tasks)
        if act < 0.4:
            count = chance.randint(1, 3)
            bench.add(queue, *range(next_id, next_id + count))
            next_id += count
        elif act < 0.6 and waiting:
            bench.cancel(*chance.sample(waiting, min(len(waiting), 3)))
        elif act < 0.8:
            taken = bench.take(queue, chance.randint(1, 4))
            bench.put_back(queue, *[id for id in taken if chance.random() < 0.5])
        else:
            tags = chance.choice([NO_TAGS, bench.worker.tags])
            allowed = [
                queue.rank
                for queue in queues
                if queue.rank is not None and tags.issuperset(queue.options.tags)
            ]
            found = bench.client.next_queue(tags)
            assert (found.rank if found else None) == min(allowed, default=None), f"seed {seed}"


# --- Places and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots_max", "running", "prefetched", "has_all"),
    [(0, 9, 9, False), (2, 0, 0, False), (2, 1, 0, False), (2, 1, 1, True), (2, 2, 0, True)],
)
def test_a_client_has_all_its_slots(
    slots_max: int, running: int, prefetched: int, has_all: bool
) -> None:
    """What was sent ahead counts: it may run now. Without a limit there is always one more."""
    client = TablesBench(slots_max).client
    client.running, client.prefetched = running, prefetched
    assert client.places == running + prefetched
    assert client.has_all_its_slots is has_all


def test_a_client_in_numbers() -> None:
    """Queued and running are told apart."""
    bench = TablesBench()
    queue = bench.queue()
    bench.add(queue, 1, 2, 3)
    lease = leased(bench, queue, 2)
    bench.client.done = 7
    status = bench.client.status()
    assert crossed(p.Status([], [status], 0, 0, 0, 0, 0, 0, 0.0)).clients == [
        p.ClientStatus(name="me", queued=1, running=2, done=7)
    ]
    assert lease.left == 2


def leased(bench: TablesBench, queue: TaskQueue, count: int) -> Lease:
    """Tasks of the queue at the worker."""
    tasks = queue.take(count)
    bench.client.live -= len(tasks)
    lease = Lease(1, bench.worker, queue, tasks, in_slot=True, now=100.0)
    for task in tasks:
        task.lease = lease
    bench.worker.leases[lease.number] = lease
    bench.client.running += 1
    bench.client.check_invariants({id(task): 1 for task in tasks}, [lease])
    return lease


def test_a_worker_in_numbers() -> None:
    """It runs what is open of its leases; its silence is never negative,
    whatever the clock says.
    """
    bench = TablesBench()
    bench.add(bench.queue(), 1, 2, 3)
    lease = leased(bench, bench.queue(), 3)
    lease.left = 2
    bench.worker.done = 5
    status = bench.worker.status(103.5)
    assert status == p.WorkerStatus("node", "ready", 4, 2, 5, silent_for=3.5, pid=42)
    assert bench.worker.status(99.0).silent_for == 0.0


def test_who_has_just_come_has_done_nothing() -> None:
    """It is what its hello says."""
    bench = TablesBench(slots_max=3)
    client, worker = bench.client, bench.worker
    assert (client.peer, client.number, client.role, client.slots_max) == ("peer", 1, "client", 3)
    assert (client.places, client.done) == (0, 0)
    assert (worker.peer, worker.number, worker.tags) == ("worker", 2, frozenset({"gpu"}))
    assert worker.status(100.0) == p.WorkerStatus("node", "ready", 4, 0, 0, 0.0, 42)
    assert not worker.is_gone
    queue = bench.queue()
    assert (queue.leases, queue.estimate.seconds) == (0, None)


def test_blame_counts_attempts() -> None:
    """Of every kind."""
    blame = Blame(p.PLAIN)
    assert blame.attempts == 0
    blame.crashes, blame.losses, blame.retries = 1, 2, 4
    assert blame.attempts == 7


# --- The invariants themselves --------------------------------------------------------------------


def lose_count(bench: TablesBench) -> None:
    bench.client.live += 1


def queue_twice(bench: TablesBench) -> None:
    queue = bench.queue()
    queue.tasks.append(queue.tasks[0])
    bench.client.live += 1


def lease_queued(bench: TablesBench) -> None:
    queue = bench.queue()
    queue.tasks[0].lease = Lease(1, bench.worker, queue, [], in_slot=True, now=0.0)


def lose_task(bench: TablesBench) -> None:
    bench.queue().tasks.popleft()
    bench.client.live -= 1


def lose_lease(bench: TablesBench) -> None:
    task = bench.queue().tasks.popleft()
    bench.client.live -= 1
    task.lease = Lease(1, bench.worker, bench.queue(), [task], in_slot=True, now=0.0)


def lose_slot(bench: TablesBench) -> None:
    bench.client.running += 1


def lose_prefetched(bench: TablesBench) -> None:
    bench.client.prefetched += 1


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lose_count, "miscounts its queue"),
        (queue_twice, "queued twice"),
        (lease_queued, "a queued task has a lease"),
        (lose_task, "a task is nowhere"),
        (lose_lease, "a leased task is not held"),
        (lose_slot, "running miscounted"),
        (lose_prefetched, "prefetched miscounted"),
    ],
)
def test_the_invariants_find_harm(harm: Any, complaint: str) -> None:
    """They are what all other tests of the broker rely on."""
    bench = TablesBench()
    bench.add(bench.queue(), 1, 2)
    harm(bench)
    with pytest.raises(AssertionError, match=complaint):
        bench.check()


def test_queues_without_tasks_give_way_to_new_ones() -> None:
    """A deadline for each call makes a group for each call; one that has tasks,
    or that is at a worker, stays.
    """
    bench = TablesBench()
    full, leased = (bench.client.open_queue(p.Group(fn, 0)) for fn in (1, 2))
    bench.add(full, 1)
    leased.leases = 1
    last = full
    for number in range(10 * QUEUES_KEPT):
        last = bench.client.open_queue(p.Group(3, 0, options=p.Options(timeout=1 + number)))
        assert len(bench.client.queues) < 3 * QUEUES_KEPT
    assert {full, leased, last} <= set(bench.client.queues.values())


def test_where_most_queues_have_tasks_they_are_not_looked_through_each_time() -> None:
    """The next time is when there are twice as many."""
    bench = TablesBench()
    for fn in range(4 * QUEUES_KEPT):
        bench.client.open_queue(p.Group(fn, 0)).leases = 1
    assert len(bench.client.queues) == 4 * QUEUES_KEPT
    for fn in range(5 * QUEUES_KEPT, 100 * QUEUES_KEPT):
        bench.client.open_queue(p.Group(fn, 0))
        assert len(bench.client.queues) <= 2 * (4 + 1) * QUEUES_KEPT


def test_the_queue_that_is_used_stays() -> None:
    """Not the one that was made last."""
    bench = SchedulerBench()
    (client,) = bench.core._clients.values()
    bench.done(WORKER, *runs(bench.submit(1)), seconds=0.25)
    used = client.queues[p.Group(1, 0)]
    id = 2
    for number in range(3 * QUEUES_KEPT):
        options = p.Options(timeout=1 + number)
        bench.done(WORKER, *runs(bench.say(CLIENT, p.Submit(1, 0, [id], [b"x"], options=options))))
        bench.done(WORKER, *runs(bench.submit(id + 1)))
        id += 2
    assert client.queues[p.Group(1, 0)] is used
    assert len(client.queues) < 3 * QUEUES_KEPT


def test_of_a_function_that_is_known_other_groups_are_expected_to_take_as_long() -> None:
    """A call with another large argument is in a group of its own;
    what is measured there replaces that.
    """
    client = TablesBench().client
    first = client.open_queue(p.Group(1, 0, blobs=(7,)))
    assert first.estimate.seconds is None
    first.estimate.observe(100, 0.5)
    bundle = p.Options(is_bundle=True)
    others = [(2, None), (1, bundle), (1, None)]
    found = [client.open_queue(p.Group(fn, 0, options=options)) for fn, options in others]
    assert [queue.estimate.seconds for queue in found] == [None, None, 0.005]
    found[-1].estimate.observe(1, 0.25)
    assert found[-1].estimate.seconds == 0.25
    assert first.estimate.seconds == 0.005
    unnumbered = [client.open_queue(p.Group(0, 0, options=options)) for options in (None, bundle)]
    unnumbered[0].estimate.observe(1, 1.0)
    again = client.open_queue(p.Group(0, 0, chunk_max=3))
    assert again.estimate.seconds is None


def test_what_is_known_of_functions_goes_with_their_queues() -> None:
    """There may be many."""
    client = TablesBench().client
    for fn in range(1, 20 * QUEUES_KEPT):
        client.open_queue(p.Group(fn, 0))
    assert len(client._estimates) <= len(client.queues) < 3 * QUEUES_KEPT
