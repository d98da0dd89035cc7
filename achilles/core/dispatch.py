"""Who gets which slot: leases are made and ended here.

Rules
    1. A worker holds at most one lease for each slot, and one more in advance for each that is not
       stuck: what waited behind a long task came back from there, and would again.
    2. A slot goes to the client that holds fewest; of a client's tasks, to those of the highest
       priority, then to the oldest. A client and its nested ones are one here;
       among them the deepest goes first.
    3. No slot idles while a task waits that may run there (tags, and the client's own limit).
    4. A task that was charged before travels alone, so that the next crash is its own.
    5. A lease whose task has tasks of its own under way is *lent*: it takes up no slot, or they
       might never get one. When they are resolved it takes its slot again at once, even if that
       means one too many for a moment.

Theory
    Workers are kept by their tags, of which there are few sets, so that a dispatch looks at each
    set and not at each worker. Those with the fewest tags come first:
    what anybody can run does not keep the rare ones busy.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from math import inf
from typing import TypeAlias

from achilles.core import protocol as p
from achilles.core.chunking import (
    CHUNK_SECONDS_MAX,
    CONTEST_SECONDS,
    LATE_SECONDS,
    chunk_size,
)
from achilles.core.relief import Relief
from achilles.core.tables import READY, Client, Lease, PeerId, Places, TaskQueue, Worker
from achilles.core.tables import Send as Send

ANNOUNCE_SECONDS = 0.02  # most tasks are done by then
ANNOUNCE_CHUNK_SECONDS = 2 * CHUNK_SECONDS_MAX + 0.01  # and one that waited behind another
ANNOUNCE_TOGETHER = 0.005  # seconds before their time, with others, for a message less
LEASE_BITS = 32  # of a lease's number; above them is its broker's
SILENT_SECONDS = LATE_SECONDS - 0.002  # by its lease, when something comes back from a stuck slot
MANY = 1 << 62  # more leases than anybody holds

Unannounced: TypeAlias = "deque[tuple[float, Lease]]"


class Dispatcher:
    """The workers' places, the clients who wait for them,
    and the leases that bring the two together.
    """

    def __init__(self, first_lease: int = 1) -> None:
        self.waiting: OrderedDict[PeerId, Client] = OrderedDict()  # with queued tasks, in turn
        # None of those who wait holds fewer leases in slots, or at all:
        # who holds as few is looked for no further.
        self._least_running = self._least_places = 0
        self.slots = 0
        self._idle: Places = {}  # ready, with a free slot
        self._room: Places = {}  # ready, slots taken, with room for one more in advance
        self._relief = Relief(self._idle)
        self._last_root = 0  # the number of whom a lease was made for last
        self._contested_until = -inf
        # Single tasks, chunks, and what is certain to take long, and when they are due;
        # each in order.
        self._unannounced: tuple[Unannounced, ...] = (deque(), deque(), deque())
        self._next_lease = self._first_lease = first_lease
        # By client's number and blob: the workers that have it, which each know that, too.
        self._holders: dict[int, dict[int, dict[PeerId, Worker]]] = {}

    # --- Places -----------------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """A worker has come."""
        self.slots += worker.slots
        self._relief.workers += 1
        self.place(worker)

    def remove(self, worker: Worker) -> None:
        """A worker has gone; its leases are still to be closed."""
        self.slots -= worker.slots
        self._relief.workers -= 1
        worker.is_gone = True
        self.place(worker)
        for number, blob in worker.blobs:
            del self._holders[number][blob][worker.peer]

    def place(self, worker: Worker) -> None:
        """Note whether the worker has a free slot, room for a chunk in advance, or neither."""
        places: Places | None
        if worker.state != READY or worker.is_gone:
            places = None
        elif worker.taken < worker.slots:
            places = self._idle
        elif worker.ahead < worker.slots - worker.stuck:
            places = self._room
        else:
            places = None
        tags, before = worker.tags, worker.place
        if before is not None:
            group = before[tags]
            if before is places:
                group.move_to_end(worker.peer)
                return
            del group[worker.peer]
            if not group:
                del before[tags]
        worker.place = places
        if places is not None:
            if tags not in places:
                places[tags] = OrderedDict()
            places[tags][worker.peer] = worker

    # --- Leases -----------------------------------------------------------------------------------

    def dispatch(self, now: float) -> list[Send]:
        """Give out work while there is both work and a place for it."""
        sends: list[Send] = []
        if self.waiting and self._idle:
            self._fill(self._idle, True, now, sends)
        if self.waiting and self._room:
            self._fill(self._room, False, now, sends)
        self._relief.plan(now)
        return sends + self._announce(now) if self._unannounced[2] else sends

    def _fill(self, places: Places, in_slot: bool, now: float, sends: list[Send]) -> None:
        sets = sorted(places, key=len) if len(places) > 1 else list(places)
        for tags in sets:
            while self.waiting and (group := places.get(tags)):
                queue = self._for_slot(tags) if in_slot else self._in_advance(tags)
                if queue is None:
                    break
                self._lease(next(iter(group.values())), queue, in_slot, now, sends)

    def _for_slot(self, tags: frozenset[str]) -> TaskQueue | None:
        """Whose tasks get a free slot of a worker with these tags."""
        best: TaskQueue | None = None
        least = MANY
        for client in self.waiting.values():
            root = client.root
            running = root.running
            if running < least:
                least = running
            if root.has_all_its_slots:
                continue
            if best is not None:
                other = best.client
                if other.root is root:
                    if client.urgency <= other.urgency:
                        continue
                elif other.root.running <= root.running:
                    continue
            queue = client.next_queue(tags)
            if queue is not None:
                best = queue
                if running <= self._least_running and not root.nested:
                    return best
        self._least_running = least
        return best

    def _in_advance(self, tags: frozenset[str]) -> TaskQueue | None:
        """The same for a place in advance. A copy,
        because each dispatch goes through one of them for each client that waits.
        """
        best: TaskQueue | None = None
        least = MANY
        for client in self.waiting.values():
            root = client.root
            places = root.running + root.prefetched
            if places < least:
                least = places
            if root.has_all_its_slots:
                continue
            if best is not None:
                other = best.client
                if other.root is root:
                    if client.urgency <= other.urgency:
                        continue
                elif other.root.places <= places:
                    continue
            queue = client.next_queue(tags)
            if queue is not None and queue.may_wait(self.slots):
                best = queue
                if places <= self._least_places and not root.nested:
                    return best
        self._least_places = least
        return best

    def _lease(
        self, worker: Worker, queue: TaskQueue, in_slot: bool, now: float, sends: list[Send]
    ) -> None:
        client, group = queue.client, queue.group
        tasks = queue.take(self._chunk_size(queue, now))
        if queue.tasks:
            client.enqueue(queue)  # those taken may have stood before an older one: see `TaskQueue`
        client.live -= len(tasks)
        if client.live == 0:
            self.waiting.pop(client.peer, None)
        else:  # clients with equal claims take turns
            self.waiting.move_to_end(client.peer)
        number = self._next_lease
        self._next_lease += 1
        lease = worker.leases[number] = Lease(number, worker, queue, tasks, in_slot, now)
        for task in tasks:
            task.lease = lease
        queue.leases += 1
        if in_slot:
            client.root.running += 1
            worker.taken += 1
        else:
            client.root.prefetched += 1
        self.place(worker)
        for blob in queue.needs:
            owner = client.owner(blob, group)
            if (owner.number, blob) not in worker.blobs:
                self.note_blob(worker, owner.number, blob)
                sends.append(Send(worker.peer, p.Blob(owner.number, blob, owner.blobs[blob])))
        first, options = tasks[0].blame, queue.options
        attempts = options.crashes + options.losses if first is None else first.attempts
        run = p.Run(
            number,
            client.number,
            group.fn,
            group.init,
            [task.id for task in tasks],
            [task.payload for task in tasks if task.payload is not None],
            options.timeout,
            attempts + 1,
            group.blobs,
            0 if client.root is client else client.root.number,
        )
        sends.append(Send(worker.peer, run))
        self._relief.note(lease, now)
        self.announce_soon(lease, now)

    def _chunk_size(self, queue: TaskQueue, now: float) -> int:
        """How many of the queue's tasks are to travel together."""
        root = queue.client.root.number
        if root != self._last_root:
            if self._last_root:
                self._contested_until = now + CONTEST_SECONDS
            self._last_root = root
        is_contested = now < self._contested_until
        size, most = queue.live, queue.chunk_max
        return chunk_size(queue.estimate, size, self.slots, most, is_contested=is_contested)

    def is_own(self, number: int) -> bool:
        """Whether a lease of that number was, or may be, made here."""
        return number >> LEASE_BITS == self._first_lease >> LEASE_BITS

    def adopt(self, lease: Lease) -> None:
        """Take in a lease that another broker has made."""
        worker = lease.worker
        worker.leases[lease.number] = lease
        lease.queue.leases += 1
        lease.client.root.prefetched += 1
        if worker.taken < worker.slots:
            self.promote(lease)
        self._relief.note(lease, lease.moved_at)
        self.place(worker)

    def note_blob(self, worker: Worker, number: int, blob: int) -> None:
        """The worker has this blob of the client of that number."""
        worker.blobs.add((number, blob))
        self._holders.setdefault(number, {}).setdefault(blob, {})[worker.peer] = worker

    def unload(self, number: int, blobs: Iterable[int]) -> list[Send]:
        """Have workers forget these blobs of a client's that they have."""
        holders = self._holders.get(number, {})
        held: dict[PeerId, list[int]] = {}
        for blob in blobs:
            for peer, worker in holders.pop(blob, {}).items():
                worker.blobs.remove((number, blob))
                held.setdefault(peer, []).append(blob)
        return [Send(peer, p.Forget(number, found)) for peer, found in held.items()]

    def unload_all(self, number: int) -> list[Send]:
        """Have workers forget all blobs of a client that has left."""
        told: dict[PeerId, Send] = {}
        for blob, workers in self._holders.pop(number, {}).items():
            for peer, worker in workers.items():
                worker.blobs.remove((number, blob))
                told[peer] = Send(peer, p.Forget(number, []))
        return list(told.values())

    def announce_soon(self, lease: Lease, now: float) -> None:
        """Have it told which tasks of the lease were dispatched; at once where they take long, for
        whoever is told of them is mostly being told of a result now.
        """
        if len(lease.tasks) > 1:
            self._unannounced[1].append((now + ANNOUNCE_CHUNK_SECONDS, lease))
        elif not _is_long(lease):
            self._unannounced[0].append((now + ANNOUNCE_SECONDS, lease))
        elif lease.in_slot:  # or when it gets one
            self._unannounced[2].append((now, lease))

    def wait(self, client: Client) -> None:
        """The client has queued tasks."""
        if not client.is_held_back:
            self.waiting[client.peer] = client
            self._eased(client.root)

    def _eased(self, root: Client) -> None:
        """A client waits, or holds fewer leases than before."""
        if root.running < self._least_running:
            self._least_running = root.running
        if root.running + root.prefetched < self._least_places:
            self._least_places = root.running + root.prefetched

    def close(self, lease: Lease) -> None:
        """End a lease; the oldest one that waited behind it moves into its slot."""
        worker = lease.worker
        del worker.leases[lease.number]
        self._relief.forget(lease)
        for unannounced in self._unannounced:
            while unannounced and not unannounced[0][1].left:
                unannounced.popleft()
        lease.queue.leases -= 1
        if lease.is_stuck:
            lease.is_stuck = False
            worker.stuck -= 1
        if lease.is_lent:
            lease.is_lent = False
            worker.lent -= 1
            lease.client.root.lent -= 1
        elif not lease.in_slot:
            lease.client.root.prefetched -= 1
        else:
            lease.client.root.running -= 1
            worker.taken -= 1
            if worker.taken < worker.slots:
                for other in worker.leases.values():
                    if not other.in_slot and not other.is_lent:
                        self.promote(other)
                        break
        self.place(worker)
        self._eased(lease.client.root)

    def note_stuck(self, worker: Worker, now: float) -> None:
        """Something came back that had waited there:
        give nothing in advance to a slot that has shown nothing for long.
        """
        for lease in worker.leases.values():
            if lease.in_slot and not lease.is_stuck and now - lease.moved_at >= SILENT_SECONDS:
                lease.is_stuck = True
                worker.stuck += 1
        self.place(worker)

    def note_moved(self, lease: Lease, now: float) -> None:
        """A result came of the lease."""
        lease.moved_at = now
        self._relief.note(lease, now)
        if lease.is_stuck:
            lease.is_stuck = False
            lease.worker.stuck -= 1
            self.place(lease.worker)

    def confirm(self, lease: Lease) -> None:
        """The lease runs, as its results show. It may have had no slot,
        if another's was lent meanwhile.
        """
        worker = lease.worker
        if not lease.in_slot and not lease.is_lent and worker.taken < worker.slots:
            self.promote(lease)

    def promote(self, lease: Lease) -> None:
        """A lease that was given in advance has its slot from here on."""
        lease.in_slot = True
        lease.worker.taken += 1
        lease.client.root.prefetched -= 1
        lease.client.root.running += 1
        self.place(lease.worker)
        if _is_long(lease):
            self._unannounced[2].append((-inf, lease))

    def lend(self, client: Client) -> list[Send]:
        """Lend the place of the lease that has tasks of this client under way, or take it back."""
        return self.set_lent(client.parent, bool(client.tasks)) if client.parent else []

    def set_lent(self, lease: Lease | None, is_lent: bool) -> list[Send]:
        """Have the lease take up no slot, or one again; nothing if that is so already,
        or if it has ended.
        """
        if lease is None or not lease.left or lease.is_lent == is_lent:
            return []
        worker, root = lease.worker, lease.client.root
        worker.has_lent = True
        lease.queue.does_lend = True
        lease.is_lent = is_lent
        if not is_lent:
            lease.in_slot = True
            worker.lent -= 1
            root.lent -= 1
            worker.taken += 1
            root.running += 1
        else:
            worker.lent += 1
            root.lent += 1
            if lease.in_slot:
                worker.taken -= 1
                root.running -= 1
            else:
                root.prefetched -= 1
            lease.in_slot = False
            self._eased(root)
        self.place(worker)
        return [] if worker.is_gone else [Send(worker.peer, p.Lend(lease.number, is_lent))]

    def requeue(self, queue: TaskQueue, waiting: int) -> None:
        """``waiting`` tasks were put at the front of the queue."""
        queue.live += waiting
        queue.client.live += waiting
        if queue.live:
            self.wait(queue.client)
            queue.client.enqueue(queue)

    # --- Time -------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Send]:
        """Tell clients what is worth telling by now; call back what waits beside a free slot."""
        return self._announce(now) + self._relief.tick(now)

    def _announce(self, now: float) -> list[Send]:
        """Tell clients which of their tasks were dispatched a moment ago and are not done yet."""
        sends: list[Send] = []
        running: dict[Client, list[int]] = {}
        for unannounced in self._unannounced:
            if not unannounced or unannounced[0][0] > now:
                continue
            until = now + ANNOUNCE_TOGETHER
            while unannounced and unannounced[0][0] <= until:
                _, lease = unannounced.popleft()
                if not lease.left:  # what it held is perhaps queued again
                    continue
                tasks = lease.tasks
                ids = [task.id for task in tasks if task is not None and task.queue is not None]
                others = running.get(lease.client)
                if others is None:
                    running[lease.client] = ids
                elif len(others) + len(ids) <= p.TASKS_MAX:
                    others += ids
                else:
                    sends.append(lease.client.tell(p.Running(ids)))
        return sends + [client.tell(p.Running(ids)) for client, ids in running.items() if ids]

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        wanted = self._relief.due
        for unannounced in self._unannounced:
            if unannounced and (wanted is None or unannounced[0][0] < wanted):
                wanted = unannounced[0][0]
        return wanted

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self, workers: list[Worker]) -> None:
        """Assert the rules of this module; tests call it after every step."""
        assert self.slots == sum(worker.slots for worker in workers), "slots miscounted"
        held = {(worker.peer, *key) for worker in workers for key in worker.blobs}
        known = {
            (peer, number, blob)
            for number, blobs in self._holders.items()
            for blob, holders in blobs.items()
            for peer in holders
        }
        assert held == known, "who has which blob is miscounted"
        self._relief.check_invariants([one for worker in workers for one in worker.leases.values()])
        idle = {peer for group in self._idle.values() for peer in group}
        for worker in workers:
            leases = list(worker.leases.values())
            assert worker.taken == sum(lease.in_slot for lease in leases), "a slot leaks"
            assert worker.lent == sum(lease.is_lent for lease in leases), "a lent place leaks"
            assert worker.stuck == sum(lease.is_stuck for lease in leases), "a stuck place leaks"
            assert not any(one.in_slot and one.is_lent for one in leases), "lent and in a slot"
            assert worker.ahead <= worker.slots, f"{worker.name} holds too many leases"
            if not worker.has_lent:
                assert worker.taken == min(len(leases), worker.slots), "a slot leaks"
            is_idle = worker.state == READY and worker.taken < worker.slots
            assert is_idle == (worker.peer in idle), "the idle workers are not the idle ones"
        assert idle <= {worker.peer for worker in workers}, "a worker that left has a place"
        for client in self.waiting.values():
            root = client.root
            assert self._least_running <= root.running, "a client that holds few is passed over"
            assert self._least_places <= root.places, "a client that holds few is passed over"
            for tags in self._idle:
                if not client.root.has_all_its_slots and client.next_queue(tags):
                    raise AssertionError("a slot idles while a task waits")


def _is_long(lease: Lease) -> bool:
    """Whether it is one task that, by what is known, will not be done in a moment."""
    seconds = lease.queue.estimate.seconds
    return len(lease.tasks) == 1 and seconds is not None and seconds > ANNOUNCE_SECONDS
