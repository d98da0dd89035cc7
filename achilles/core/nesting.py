"""Tasks that submit tasks: on whose behalf, when they may, and with whom it ends.

Rules
    1. A runner may submit for a client while it runs that client's task. To the scheduler it is a
       client of its own then, a *nested* one;
       the client whose task it was in the beginning is its *root*.
    2. What it submitted ends with its runner, with its worker, and with its root;
       not with the task.
    3. A task may say anything. What it may not submit fails,
       and costs neither its worker nor anybody else anything.
    4. While something of it is under way, the lease of the task that submitted it is lent
       (see `dispatch`).

Theory
    Whether a task waits for what it submitted is not known; that it has something under way must
    do. So nothing can wait for ever: each waiting task has lent its slot,
    and of a root's tasks the deepest go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from achilles.core import protocol as p
from achilles.core.dispatch import Dispatcher, Send
from achilles.core.tables import Client, Lease, PeerId, Worker
from achilles.errors import ProtocolError


class NestedPeer(NamedTuple):
    """What a nested client is known by; ``root`` is its root's number."""

    worker: PeerId
    runner: int
    root: int


class NestedClient(Client):
    """A runner whose tasks submit tasks. ``parent`` is the lease that did so last."""

    def __init__(self, key: NestedPeer, number: int, root: Client, worker: Worker) -> None:
        super().__init__(key, number, p.ClientHello(b"", "nested", "", "", root.name))
        self.key = key
        self.root = root
        self.worker = worker

    def tell(self, message: p.ToTask) -> Send:
        """The message on its way to the client, by its worker."""
        return Send(self.worker.peer, p.Relay(self.key.runner, self.key.root, 0, message))


class Receive(Protocol):
    """What the scheduler does with a client's message."""

    def __call__(self, client: Client, message: p.FromTask, now: float) -> list[Send]: ...


class Nesting:
    """The nested ones among a scheduler's clients; they are in ``clients``, too."""

    def __init__(
        self,
        clients: dict[PeerId, Client],
        dispatcher: Dispatcher,
        numbers: Iterator[int],
        *,
        receive: Receive,
        end: Callable[[Client], list[Send]],
    ) -> None:
        self._clients = clients
        self._dispatcher = dispatcher
        self._numbers = numbers
        self._receive = receive
        self._end = end
        self._nested: dict[NestedPeer, NestedClient] = {}

    # --- What tasks say ---------------------------------------------------------------------------

    def receive(self, worker: Worker, relay: p.Relay, cluster: p.Cluster, now: float) -> list[Send]:
        """Take in what a task on the worker says; ``cluster`` is what a new client is told.

        Raises:
            ProtocolError: it is nothing that a worker would let a task say.
        """
        message = relay.message
        match message:
            case p.Goodbye():
                runner = worker, relay.runner
                return self._left(lambda nested: (nested.worker, nested.key.runner) == runner)
            case p.Running() | p.Results() | p.Failed() | p.Cluster() | p.Status():
                raise ProtocolError(f"a task does not send {type(message).__name__}")
            case p.Submit() | p.Blob() | p.Forget() | p.Cancel() | p.StatusRequest():
                pass
        key = NestedPeer(worker.peer, relay.runner, relay.client)
        client = self._nested.get(key)
        lease = worker.leases.get(relay.lease)
        sends: list[Send] = []
        if lease is not None and self._is_of(lease, relay.client):
            if client is None:
                client = NestedClient(key, next(self._numbers), lease.client.root, worker)
                self._clients[key] = self._nested[key] = client
                client.root.nested += 1
                sends.append(client.tell(cluster))
            if isinstance(message, p.Submit) and client.parent is not lease:
                sends += self._dispatcher.set_lent(client.parent, False)
                client.parent = lease
        elif isinstance(message, p.Submit):
            return _refuse(worker, relay, message.ids, "the task that submitted it had ended")
        if client is None:
            return []
        try:
            return [*sends, *self._receive(client, message, now)]
        except ProtocolError as error:
            ids = message.ids if isinstance(message, p.Submit) else []
            return [*sends, *_refuse(worker, relay, ids, str(error))]

    def _is_of(self, lease: Lease, number: int) -> bool:
        """Whether the lease is that client's, or was made on its behalf,
        and the client is still there.
        """
        root = lease.client.root
        return root.number == number and (root.peer in self._clients or root.found is not None)

    # --- Who leaves -------------------------------------------------------------------------------

    def worker_left(self, worker: Worker) -> list[Send]:
        """A worker has gone, and its runners with it."""
        return self._left(lambda nested: nested.worker is worker)

    def root_left(self, root: Client) -> list[Send]:
        """A client has gone."""
        return self._left(lambda nested: nested.root is root)

    def _left(self, is_one: Callable[[NestedClient], bool]) -> list[Send]:
        sends: list[Send] = []
        for client in [client for client in self._nested.values() if is_one(client)]:
            del self._clients[client.key], self._nested[client.key]
            client.root.done += client.done
            client.root.nested -= 1
            sends += self._end(client)
        return sends

    # --- What a root and its nested clients are together ------------------------------------------

    def without_shared(self, root: Client, blobs: list[int]) -> list[int]:
        """The blobs without those that nested clients of the root use as well."""
        nested = [client for client in self._nested.values() if client.root is root]
        shared = {group.init for client in nested for group in client.queues}
        return [blob for blob in blobs if blob not in shared] if shared else blobs

    def client_statuses(self) -> list[p.ClientStatus]:
        """A row for each client; what its tasks have submitted is its own."""
        rows = {c.number: c.status() for c in self._clients.values() if c.role == "client"}
        for nested in self._nested.values():
            if nested.key.root not in rows:
                continue  # its client is not back yet
            row, more = rows[nested.key.root], nested.status()
            row.queued += more.queued
            row.running += more.running
            row.done += more.done
        return list(rows.values())

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self, workers: list[Worker], leases: list[Lease]) -> None:
        """Assert the rules of this module; tests call it after every step."""
        waiting = [nested.parent for nested in self._nested.values() if nested.tasks]
        assert all(lease in waiting for lease in leases if lease.is_lent), "lent for nothing"
        for root in {client.root for client in self._clients.values()}:
            own = sum(nested.root is root for nested in self._nested.values())
            assert root.nested == own, "nested clients are miscounted"
        for nested in self._nested.values():
            assert self._clients[nested.key] is nested, "a nested client is not among the clients"
            is_there = nested.root in self._clients.values() or nested.root.found is not None
            assert is_there, "a nested client outlives its root"
            assert nested.worker in workers, "a nested client outlives its worker"
            parent = nested.parent
            if parent is not None and parent.left and nested.tasks:
                assert parent.is_lent, "a task waits in a slot for tasks of its own"


def _refuse(worker: Worker, relay: p.Relay, ids: list[int], text: str) -> list[Send]:
    """What may not be submitted fails."""
    failures = [p.Failed(id, p.REFUSED, [text[: p.TEXT_MAX]]) for id in ids]
    return [Send(worker.peer, p.Relay(relay.runner, relay.client, 0, one)) for one in failures]
