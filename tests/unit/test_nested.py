"""A task's connection, with a test in the place of the runner's host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from achilles import nested
from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.protocol import Group
from achilles.errors import BrokerLostError, BrokerUnreachableError, SealError
from achilles.mailbox import INIT_BLOB
from achilles.nested import NestedConnection
from achilles.runtime import context
from achilles.runtime.seal import Opener, Seal
from achilles.runtime.serialize import dumps
from achilles.runtime.side import NESTED, HostSide, RunnerSide
from tests.modes import wait_until

CLIENT, SEQ = 3, 9


class Scene:
    """A runner's side channel, with the test as its host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        near, self.far = socket.socketpair()
        near.setblocking(False)
        self.near = near
        self.host = HostSide(near.fileno())
        self.side = RunnerSide(self.far.fileno())
        self.messages: list[Any] = []
        monkeypatch.setattr(context, "side", self.side)
        monkeypatch.setattr(context, "client", CLIENT)
        monkeypatch.setattr(context, "seq", SEQ)

    def connect(self, credit: int = 0) -> NestedConnection:
        connection = nested.connection(credit, 4)
        assert connection is not None
        return connection

    def read(self, count: int) -> list[Any]:
        """The next messages of the task."""

        def read() -> bool:
            for kind, client, body in self.host.drain():
                seq, message = envelope.unpack(body)
                assert (kind, client, seq) == (NESTED, CLIENT, SEQ)
                self.messages.append(message)
            return len(self.messages) >= count

        wait_until(read)
        taken, self.messages = self.messages[:count], self.messages[count:]
        return taken

    def read_cancels(self, count: int) -> list[p.Cancel]:
        """The next ones, among whatever else."""
        found: list[p.Cancel] = []
        while len(found) < count:
            found += [one for one in self.read(1) if isinstance(one, p.Cancel)]
        return found

    def tell(self, message: Any) -> None:
        self.host.send(NESTED, CLIENT, envelope.pack(0, message))

    def close(self) -> None:
        for connection in nested._connections.values():
            connection.close()
        nested._connections.clear()
        self.near.close()  # the reading thread sees the end
        self.far.close()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene(monkeypatch)
    yield scene
    scene.close()


def submit(connection: NestedConnection, payload: bytes = b"call", init: int = 0) -> Any:
    return connection.mailbox.submit(Group(1, init), b"function", payload, "f")


def test_outside_of_a_runner_there_is_none() -> None:
    assert nested.connection(0, 1) is None


def test_a_client_has_one_connection(scene: Scene) -> None:
    assert scene.connect() is scene.connect()


def test_tasks_go_by_letters_and_their_results_come_so(scene: Scene) -> None:
    connection = scene.connect()
    future = submit(connection)
    assert scene.read(2) == [p.Blob(0, 1, b"function"), p.Submit(1, 0, [1], [b"call"])]
    scene.tell(p.Cluster(2, 8))
    scene.tell(p.Running([1]))
    scene.tell(p.Results([1], b"\0", [dumps("value")]))
    assert future.result(10) == "value"
    assert (connection.mailbox.workers, connection.mailbox.slots) == (2, 8)


def test_an_initializer_is_the_clients_and_stays_there(scene: Scene) -> None:
    submit(scene.connect(), init=INIT_BLOB)
    assert scene.read(2) == [p.Blob(0, 1, b"function"), p.Submit(1, INIT_BLOB, [1], [b"call"])]


def test_a_task_ends_when_all_that_it_submitted_is_with_the_broker(scene: Scene) -> None:
    connection = scene.connect(credit=2)
    futures = [submit(connection) for _ in range(3)]
    scene.read(2)
    ended = threading.Event()

    def end() -> None:
        scene.side.settle()
        ended.set()

    thread = threading.Thread(target=end)
    thread.start()
    assert not ended.wait(0.05)
    scene.tell(p.Results([1, 2], b"\0\0", [dumps(1), dumps(2)]))
    thread.join(10)
    assert ended.is_set()
    assert scene.read(1) == [p.Submit(1, 0, [3], [b"call"])]
    assert [future.done() for future in futures] == [True, True, False]


def test_cancelled_tasks_are_taken_back(scene: Scene) -> None:
    connection = scene.connect()
    future = submit(connection)
    scene.read(2)
    assert future.cancel()
    assert scene.read(1) == [p.Cancel([1])]
    other = submit(connection)
    scene.read(1)
    connection.cancel_pending()
    assert scene.read(1) == [p.Cancel([2])]
    assert other.cancelled()


def test_kill_ends_what_runs(scene: Scene) -> None:
    """And what may run, for all that is known here."""
    connection = scene.connect()
    running, dispatched = submit(connection), submit(connection)
    connection.flush()
    scene.tell(p.Running([1]))
    wait_until(running.running)
    connection.kill(lambda: BrokerLostError("killed"))
    assert isinstance(running.exception(10), BrokerLostError)
    wait_until(dispatched.cancelled)
    assert scene.read_cancels(2) == [p.Cancel([2], kill=True), p.Cancel([1], kill=True)]


def test_join_waits_for_what_was_submitted_before_it(scene: Scene) -> None:
    connection = scene.connect()
    submit(connection)
    scene.read(2)
    thread = threading.Thread(target=connection.join)
    thread.start()
    submit(connection)
    scene.read(1)
    assert thread.is_alive()
    scene.tell(p.Results([1], b"\0", [dumps(1)]))
    thread.join(10)
    assert not thread.is_alive()


def test_the_status_is_asked_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = scene.connect()
    status = p.Status([], [], 1, 2, 3, 4, 5, 6, 7.0)
    thread = threading.Thread(
        target=lambda: (scene.read(1), scene.tell(status))  # type: ignore[func-returns-value]
    )
    thread.start()
    assert connection.status() == status
    thread.join(10)
    monkeypatch.setattr(nested, "STATUS_SECONDS", 0.05)
    with pytest.raises(BrokerUnreachableError, match="no answer"):
        connection.status()


def test_what_was_refused_fails(scene: Scene) -> None:
    future = submit(scene.connect())
    scene.read(2)
    scene.tell(p.Failed(1, p.REFUSED, ["the task that submitted it had ended"]))
    with pytest.raises(RuntimeError, match=r"cannot schedule f.*the task that submitted it had"):
        future.result(10)


def test_a_host_that_is_gone_leaves_nobody_waiting(scene: Scene) -> None:
    connection = scene.connect()
    future = submit(connection)
    scene.read(2)
    scene.near.shutdown(socket.SHUT_RDWR)
    late = submit(connection, bytes(1 << 20))
    for one in (future, late):
        with pytest.raises(BrokerLostError):
            one.result(10)
    connection.flush()
    connection.join()
    with pytest.raises(BrokerLostError):
        submit(connection)


def test_nonsense_of_the_host_leaves_nobody_waiting(scene: Scene) -> None:
    connection = scene.connect()
    future = submit(connection)
    scene.tell(p.Cancel([1]))
    with pytest.raises(BrokerLostError, match="does not tell tasks a Cancel"):
        future.result(10)
    assert repr(connection) == "in a task"


def test_a_client_that_is_gone_leaves_nothing_here(scene: Scene) -> None:
    connection = scene.connect()
    future = submit(connection)
    nested.forget(CLIENT)
    nested.forget(CLIENT)
    assert isinstance(future.exception(0), BrokerLostError)
    assert connection.thread is not None
    assert not connection.thread.is_alive()
    assert scene.side._flushers == []
    assert scene.connect() is not connection


def test_when_the_runner_exits_nothing_is_waited_for(scene: Scene) -> None:
    connection = scene.connect()
    future = submit(connection)
    connection.close()
    assert connection.thread is not None
    assert not connection.thread.is_alive()
    assert isinstance(future.exception(0), BrokerLostError)


def test_where_calls_are_sealed_a_tasks_are_too(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Seal(bytes(32))
    root = bytes(range(16))
    monkeypatch.setattr(context, "seal", seal)
    monkeypatch.setattr(context, "root", root)
    connection = scene.connect()
    futures = [submit(connection)]
    blob, first = scene.read(2)
    futures.append(submit(connection))
    scene.read(1)
    blobs = {(CLIENT, 1): blob.payload}
    opener = Opener(seal, blobs)
    opener.begin(CLIENT, CLIENT, (1, 0, ()))
    assert opener.open_call(1, first.payloads[0]) == b"call"
    assert opener.root == root
    sealed: Any = opener.result(1, p.VALUE, dumps("value"))
    scene.tell(p.Results([1], b"\0", [sealed]))
    scene.tell(p.Results([2], b"\0", [sealed]))
    assert futures[0].result(10) == "value"
    with pytest.raises(SealError):
        futures[1].result(10)
    assert scene.connect() is connection
    monkeypatch.setattr(context, "root", bytes(16))
    other = scene.connect()
    assert other is not connection
    connection.close()
