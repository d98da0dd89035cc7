"""A broker that follows another one: what workers still hold goes on where it is.

Rules
    1. Who comes back says what it has of its earlier session: a worker each lease that it holds
       (`Held`), a client each task that it had submitted (`Submit.is_again`); and then, that this
       was all (`Resumed`). A worker's reports follow: they may be large,
       and what nobody holds does not wait for them.
    2. What a worker holds and its client asks for stays with that worker.
       It is not given to anybody else.
    3. For a short time after the broker's start, what clients that are back have queued is held
       back: a worker may be on its way that holds it. That ends when all workers are back that the
       earlier broker had, if it is known which.
    4. What a worker holds and nobody asks for is taken back, and ended if it runs;
       results of it are dropped.
    5. A task that may run at most once, and that no worker holds, fails: it may have run.

Picture
    worker ─Held─▶ Lease of *found* tasks ──Submit(is_again)──▶ a lease like any other ─Done─▶ Results ─▶ client
                        └─Done─▶ found result ──Submit(is_again)──▶ Results

Theory
    Nothing has to be on disk. A client has every task of which it has no outcome, and a worker
    every report that no broker has acknowledged; their numbers (`stable_number`) and a client's for
    its tasks are the same for each broker. What none of them has was done, or was never begun,
    or its worker is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b

from achilles.core import protocol as p
from achilles.core.charges import Charges, may_retry
from achilles.core.dispatch import Dispatcher, Send
from achilles.core.tables import Blame, Client, Found, Lease, PeerId, Task, TaskQueue, Worker
from achilles.errors import ProtocolError

LETTERS_MAX = 1000  # that wait for a client
IN_DOUBT = "the broker was lost, and nobody knows whether the task had started"


def stable_number(incarnation: bytes) -> int:
    """A peer's number, which is the same for each broker, and tells nothing of its incarnation."""
    digest = blake2b(incarnation, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2 | 1 << 62  # none that a broker counts to


class Recovery:
    """What one broker finds, and for how long it waits for it.

    ``clients``: those that are there, by number; ``seconds``: how long tasks are held back at most;
    ``patience``: how long what is found waits for its client (both 0: there was no other broker);
    ``awaited``: the numbers of the workers that the earlier broker had; None: not known.
    """

    def __init__(
        self,
        clients: Mapping[int, Client],
        dispatcher: Dispatcher,
        charges: Charges,
        *,
        now: float,
        seconds: float,
        patience: float,
        awaited: frozenset[int] | None,
        end: Callable[[Client], list[Send]],
    ) -> None:
        self._clients = clients
        self._dispatcher = dispatcher
        self._charges = charges
        self._seconds = seconds
        self._awaited = None if awaited is None else set(awaited)
        self._over_at: float | None = now + seconds if seconds and self._awaited != set() else None
        self._expires_at: float | None = now + patience if patience else None
        self.due: float | None = None  # when `tick` wants to be called
        self._note_due()
        self._absent: dict[int, Client] = {}  # clients of which something was found, by number
        self._end = end

    @property
    def is_open(self) -> bool:
        """Whether workers may be on their way that hold tasks."""
        return self._over_at is not None

    # --- Clients ----------------------------------------------------------------------------------

    def client(self, peer: PeerId, number: int, hello: p.ClientHello) -> tuple[Client, list[Send]]:
        """The client that says hello, and what has waited for it."""
        client = self._absent.pop(number, None)
        if client is None:
            client = Client(peer, number, hello)
        client.come_back(peer, hello)
        if not hello.is_back:
            return client, self._drop_found(client)
        client.found = client.found or Found()
        client.is_held_back = self.is_open
        letters, client.found.letters = client.found.letters, []
        return client, [Send(peer, letter) for letter in letters]

    def claim(
        self, client: Client, found: Found, queue: TaskQueue, message: p.Submit, now: float
    ) -> tuple[p.Results, list[Send]]:
        """A client asks for tasks of this queue: those that workers have go on where they are. The
        results that there are, and failures.

        All these are taken out of the message.
        """
        results = p.Results([], b"", [])
        sends: list[Send] = []
        ids: list[int] = []
        payloads: list[p.Payload] = []
        for id, payload in zip(message.ids, message.payloads, strict=True):
            if id in found.results:
                status, result, _ = found.results.pop(id)
                task = Task(id, queue, payload)
                if status == p.ERROR and may_retry(task, queue):
                    client.tasks[id] = task
                    self._charges.requeue(queue, [task])
                    continue
                results.ids.append(id)
                results.statuses += bytes([status])
                results.payloads.append(result)
                client.bytes -= p.size_of(payload)
            elif id in found.ended:
                kind, text, _ = found.ended.pop(id)
                task = client.tasks[id] = Task(id, queue, payload)
                sends += self._charges.exceeded(task, kind, text)
            elif id in found.tasks and self._assign(found.tasks[id], queue):
                self._take_in(found.tasks.pop(id), queue, payload, now)
            else:
                ids.append(id)
                payloads.append(payload)
        message.ids, message.payloads = ids, payloads
        return results, sends

    def give_up_doubtful(self, client: Client) -> list[Send]:
        """Fail the queued tasks that may run at most once,
        and that were perhaps begun under an earlier broker.
        """
        sends: list[Send] = []
        for task in [client.tasks[id] for id in sorted(client.doubtful) if id in client.tasks]:
            queue = task.queue
            if task.lease is None and queue is not None:
                self._charges.unqueue(task)
                sends += self._charges.give_up(task, queue, p.LOST, IN_DOUBT)
                task.queue = task.payload = None
        client.doubtful.clear()
        if client.live == 0:
            self._dispatcher.waiting.pop(client.peer, None)
        return sends

    def _take_in(self, task: Task, queue: TaskQueue, payload: p.Payload | None, now: float) -> None:
        lease = task.lease
        assert lease is not None
        task.queue, task.payload = queue, payload
        queue.client.tasks[task.id] = task
        self._dispatcher.announce_soon(lease, now)

    def resumed(self, client: Client) -> list[Send]:
        """The client has asked for all that it wants."""
        return self._drop_found(client)

    def gone(self, client: Client, tasks: Iterable[Task]) -> None:
        """Tasks are at their worker no more, and have no result."""
        found = client.found
        if found is not None:
            for task in tasks:
                if found.tasks.get(task.id) is task:
                    del found.tasks[task.id]

    def keep(
        self, client: Client, tasks: list[Task], statuses: bytes, payloads: list[p.Payload]
    ) -> None:
        """Results of a client's leases have come: keep those that it may still ask for."""
        found = client.found
        if found is not None:
            for task, status, payload in zip(tasks, statuses, payloads, strict=True):
                if found.tasks.get(task.id) is task:
                    del found.tasks[task.id]
                    found.results[task.id] = status, payload, _earlier(task)

    def keep_end(self, client: Client, task: Task, kind: str, text: str) -> None:
        """A task took more time or memory than it may: its client may still ask for it,
        and says then whether it has retries.
        """
        found = client.found
        if found is not None and found.tasks.get(task.id) is task:
            del found.tasks[task.id]
            found.ended[task.id] = kind, text, _earlier(task)

    def keep_letter(self, client: Client, letter: p.Letter) -> None:
        """What a task has printed, whose client is not back. What it asks, it asks again."""
        found = client.found
        if found is not None and letter.kind == p.OUTPUT and len(found.letters) < LETTERS_MAX:
            found.letters.append(letter)

    def _drop_found(self, client: Client) -> list[Send]:
        """Take back what nobody wants."""
        found, client.found = client.found, None
        return [] if found is None else _revoke(found.tasks.values())

    # --- Workers ----------------------------------------------------------------------------------

    def held(self, worker: Worker, held: p.Held, now: float) -> list[Send]:
        """A worker that is back holds a lease of an earlier broker's.

        Raises:
            ProtocolError: it cannot be.
        """
        if not worker.is_returning:
            raise ProtocolError("only a worker that is back tells what it holds")
        if self._dispatcher.is_own(held.lease) or held.lease in worker.leases:
            raise ProtocolError(f"lease {held.lease} was not made by an earlier broker")
        if worker.ahead >= worker.slots:  # more than an earlier broker can have given it
            return [Send(worker.peer, p.Revoke(held.lease, held.indexes, kill=True))]
        client = self._client_of(held.client)
        queue = TaskQueue(client, p.Group(0, 0))  # until its tasks are asked for
        lease = Lease(held.lease, worker, queue, [], False, now)
        lease.tasks = [None] * len(held.ids)
        lease.left = len(held.indexes)
        self._dispatcher.adopt(lease)
        for blob in held.blobs:
            self._dispatcher.note_blob(worker, client.number, blob)
        unwanted = []
        for index in held.indexes:
            task = lease.tasks[index] = Task(held.ids[index], queue, b"")
            task.queue, task.lease = None, lease
            if held.attempt > 1:
                task.blame = Blame(queue.options)
                task.blame.earlier = held.attempt - 1
            spare = self._match(client, task, now)
            if spare is not None:
                unwanted.append(spare)
        return _revoke(unwanted)

    def _match(self, client: Client, task: Task, now: float) -> Task | None:
        """Let the client have this task from this worker,
        if it wants it or may yet ask for it; which task nobody wants now.

        Of two workers that tell of one task, the later attempt is the one to have: the earlier one
        has ended somehow. If it has ended with a value, nothing more is wanted.
        """
        queued = client.tasks.get(task.id)
        if queued is None:
            found = client.found
            if found is None:
                return task
            if task.id in found.results:
                status, _, earlier = found.results[task.id]
                if status == p.VALUE or earlier >= _earlier(task):
                    return task
                del found.results[task.id]
            if task.id in found.ended:
                if found.ended[task.id][2] >= _earlier(task):
                    return task
                del found.ended[task.id]
            known = found.tasks.get(task.id)
            if known is not None and _earlier(known) >= _earlier(task):
                return task
            found.tasks[task.id] = task
            return known
        queue, lease = queued.queue, queued.lease
        if lease is not None:
            is_later = not self._dispatcher.is_own(lease.number) and _earlier(queued) < _earlier(
                task
            )
            if queue is None or not is_later or not self._assign(task, queue):
                return task
            payload, queued.queue, queued.payload = queued.payload, None, None
            self._take_in(task, queue, payload, now)
            return queued
        if queue is None or not self._assign(task, queue):
            return task
        self._charges.unqueue(queued)
        if client.live == 0:
            self._dispatcher.waiting.pop(client.peer, None)
        client.doubtful.discard(task.id)
        if queued.blame is not None:
            held = 0 if task.blame is None else task.blame.earlier
            if held < queued.blame.attempts and queued.blame.earlier:
                queued.blame.earlier -= 1  # this very attempt, which is counted when it ends
            task.blame = queued.blame
        payload, queued.payload = queued.payload, None
        self._take_in(task, queue, payload, now)
        return None

    def _assign(self, task: Task, queue: TaskQueue) -> bool:
        """Make the task's lease one of this queue,
        which it is not known to be of until a task of it is asked for.
        """
        lease = task.lease
        assert lease is not None
        known = lease.queue
        if known is not queue:
            if queue.client.queues.get(known.group) is known:
                return False
            known.leases -= 1
            queue.leases += 1
            lease.queue = queue
        return True

    def back(self, worker: Worker) -> None:
        """The worker has told all that it holds."""
        worker.is_returning = False
        if self._awaited is not None:
            self._awaited.discard(worker.number)

    def _client_of(self, number: int) -> Client:
        """The client of that number: one that is there, or one that may come."""
        known = self._clients.get(number) or self._absent.get(number)
        if known is not None:
            return known
        nobody = p.ClientHello(b"", "client", "", "", "not back yet")
        absent = Client(("absent", number), number, nobody)
        if self._expires_at is not None:
            absent.found = Found()
            self._absent[number] = absent
        return absent

    # --- Time -------------------------------------------------------------------------------------

    def extend(self, now: float) -> None:
        """The broker itself has slept."""
        if self._over_at is not None:
            self._over_at = now + self._seconds
            self._note_due()

    def tick(self, now: float) -> list[Send]:
        """Hold nothing back any more, if its time has come;
        wait no more for clients that are not back by now.
        """
        sends: list[Send] = []
        if self._over_at is not None and (now >= self._over_at or self._awaited == set()):
            self._over_at = None
            for client in self._clients.values():
                if client.is_held_back:
                    client.is_held_back = False
                    if client.live:
                        self._dispatcher.wait(client)
                    sends += self.give_up_doubtful(client)
        if self._expires_at is not None and now >= self._expires_at:
            self._expires_at = None
            for client in self._absent.values():
                client.found = None
                sends += self._end(client)
            self._absent.clear()
        self._note_due()
        return sends

    def _note_due(self) -> None:
        self.due = min(
            (at for at in (self._over_at, self._expires_at) if at is not None), default=None
        )

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        wanted = [at for at in (self._over_at, self._expires_at) if at is not None]
        assert self.due == min(wanted, default=None), "a stale deadline"
        for client in (*self._absent.values(), *self._clients.values()):
            found = client.found or Found()
            for id, task in found.tasks.items():
                lease = task.lease
                assert task.queue is None, "found, and asked for"
                assert id not in client.tasks, "found, and queued"
                assert lease is not None, "found nowhere"
                assert lease.client is client, "found of another client"
                assert task in lease.tasks, "found, and ended"
                assert not lease.worker.is_gone, "a worker that left holds a task"
                assert id not in found.ended, "found, and took too much"
            assert self.is_open or not client.is_held_back, "a client is held back for ever"


def _earlier(task: Task) -> int:
    """How many attempts of it there were before the broker changed."""
    return 0 if task.blame is None else task.blame.earlier


def _revoke(tasks: Iterable[Task]) -> list[Send]:
    """Take these back from their workers."""
    indexes: dict[Lease, list[int]] = {}
    for task in tasks:
        lease = task.lease
        assert lease is not None
        indexes.setdefault(lease, []).append(lease.tasks.index(task))
    return [
        Send(lease.worker.peer, p.Revoke(lease.number, sorted(found), kill=True))
        for lease, found in indexes.items()
    ]
