"""How many bytes each client may have at the broker,
so that all of them together stay within its memory.

Rules
    1. A client's *grant* is what its unresolved tasks and its blobs may hold, in bytes. It is told
       with `Welcome`, and later by `Credit`, which only ever raises it: what a client does with
       what it knows is never too much.
    2. All grants together are at most half of the memory; the other half is for results, and for
       what is under way. Who comes when nearly everything is granted gets `FLOOR` all the same.
    3. A grant grows with what is used of it, up to `Limits.client_bytes`, so that those who hold
       nothing keep nothing from others.
    4. One task may always go, alone, if its arguments are not larger than any may be.
    5. A client that does not take its results gets no more of its tasks run until it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from achilles.core.protocol import TOO_LARGE, Payload, size_of
from achilles.core.tables import Client, PeerId
from achilles.errors import ProtocolError

MIB = 1 << 20
GIB = 1 << 30
FLOOR = 1 * MIB
FIRST = 16 * MIB  # what a client begins with, where there is as much
_BYTES = {bytes}


class Limits(NamedTuple):
    """What a broker takes: bytes, numbers, seconds. 0 of a number of bytes: no limit."""

    frame: int = 16 * MIB
    argument: int = GIB  # of one task, with all that it shares with others
    result: int = GIB  # of one task
    client_bytes: int = 256 * MIB  # of one client's unresolved tasks
    memory: int = 2 * GIB  # of the whole process
    sessions: int = 10_000
    unauthenticated: int = 2048  # connections that have not shown a key yet
    hello_timeout: float = 5.0  # for a session to begin on a connection

    @property
    def argument_max(self) -> int:
        """The largest argument that fits, whatever is allowed."""
        return min(self.argument, self.memory // 2) if self.memory else self.argument


UNLIMITED = Limits(argument=0, result=0, client_bytes=0, memory=0)


def bytes_of(payloads: Sequence[Payload]) -> int:
    """The size of all of them."""
    if set(map(type, payloads)) <= _BYTES:  # nearly always, and then three times as fast
        return sum(map(len, payloads))
    total = 0
    for payload in payloads:
        total += len(payload) if type(payload) is bytes else payload.nbytes  # type: ignore[union-attr]
    return total


def heaviest(clients: Iterable[Client]) -> PeerId | None:
    """The one of them that holds most, if it is more than `FIRST`."""
    size, worst = FIRST, None
    for client in clients:
        if client.bytes + client.owed > size:
            size, worst = client.bytes + client.owed, client
    return None if worst is None else worst.peer


def bounded(statuses: bytes, payloads: list[Payload], limit: int) -> tuple[bytes, list[Payload]]:
    """Outcomes with a note in the place of those that are larger than ``limit`` (0: none is):
    its bytes, and the limit.
    """
    if not limit or bytes_of(payloads) <= limit:
        return statuses, payloads
    sizes = [size_of(payload) for payload in payloads]
    return (
        bytes(
            status if size <= limit else TOO_LARGE
            for status, size in zip(statuses, sizes, strict=True)
        ),
        [
            payload if size <= limit else b"%d %d" % (size, limit)
            for payload, size in zip(payloads, sizes, strict=True)
        ],
    )


class Budget:
    """The grants of all clients. `Client.grant` 0 is no limit:
    a task that submits tasks is not kept waiting for its like.
    """

    def __init__(self, limits: Limits = UNLIMITED) -> None:
        self._limits = limits
        self._pool = limits.memory // 2
        self._granted = 0
        self._owing: set[Client] = set()  # who has results to take

    def open(self, client: Client) -> None:
        """A client has come."""
        limit = self._limits.client_bytes
        if limit:
            self._grant(client, max(FLOOR, min(limit, FIRST, self._free // 2)))

    def close(self, client: Client) -> None:
        """It has gone."""
        self._granted -= client.grant
        client.grant = 0
        self._owing.discard(client)

    def take(self, client: Client, size: int, *, is_alone: bool) -> None:
        """A client has sent so many bytes; ``is_alone``: for the only task that it has here.

        Raises:
            ProtocolError: they are more than it was granted; nothing has changed.
        """
        held = client.bytes + size
        if client.grant and held > client.grant:
            allowed = max(client.grant, self._limits.argument_max) if is_alone else client.grant
            if held > allowed:
                raise ProtocolError(f"{held} bytes of unresolved tasks; {allowed} were granted")
        client.bytes = held

    def take_blob(self, client: Client, blob: int, payload: Payload) -> None:
        """A client has sent a blob.

        Raises:
            ProtocolError: it is more than it was granted; nothing has changed.
        """
        if blob in client.blobs and blob not in client.unwanted:
            return
        payload = client.blobs.get(blob, payload)
        self.take(client, size_of(payload), is_alone=not client.tasks)
        client.blobs[blob] = payload
        client.unwanted.discard(blob)

    def grow(self, client: Client) -> bool:
        """Grant more to a client that uses what it has; whether there was more to grant."""
        grant = client.grant
        if not grant or 2 * client.bytes <= grant:
            return False
        more = min(grant, self._limits.client_bytes - grant, self._free)
        if more < FLOOR:
            return False
        self._grant(client, more)
        return True

    def owes(self, client: Client, size: int) -> bool:
        """So many bytes of results are on their way to a client, or (below 0) have come there.

        Whether its tasks may be run again that were held back.
        """
        client.owed += size
        was_held = client.is_held
        if self._limits.memory:
            share = self._limits.memory // 4 // max(1, len(self._owing))
            limit = max(FLOOR, min(self._limits.client_bytes or share, share))
            client.is_held = client.owed > (limit // 2 if was_held else limit)
        if client.owed:
            self._owing.add(client)
        else:
            self._owing.discard(client)
        return was_held and not client.is_held

    def check_invariants(self, clients: Iterable[Client]) -> None:
        """Assert the rules of this module; tests call it after every step."""
        clients = list(clients)
        for client in clients:
            held = bytes_of([task.payload for task in client.tasks.values() if task.payload])
            wanted = client.blobs.keys() - client.unwanted
            held += bytes_of([client.blobs[blob] for blob in wanted])
            assert client.bytes == held, "a client's bytes are miscounted"
            assert client.owed >= 0, "a client has taken more than it was sent"
        assert self._granted == sum(client.grant for client in clients), "grants are miscounted"
        floors = FLOOR * len(clients)
        assert not self._pool or self._granted <= self._pool + floors, (
            "more is granted than there is"
        )
        assert self._owing <= set(clients), "who has left owes something"

    @property
    def _free(self) -> int:
        return max(0, self._pool - self._granted)

    def _grant(self, client: Client, more: int) -> None:
        client.grant += more
        self._granted += more

    def __repr__(self) -> str:
        return f"<Budget {self._granted} of {self._pool} bytes granted>"
