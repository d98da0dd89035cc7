from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from achilles.core.budget import Limits
from achilles.net.connections import Connection, Connections
from achilles.net.transport import Route, RouterPort
from tests.brokers import RawPeer, RunningBroker, raw_peer, wait_for
from tests.modes import wait_until
from tests.security.attacks import attack


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as far,
    ):
        near, _ = server.accept()
        with near:
            yield near, far


class Port:
    """As much of a ROUTER as a route needs."""

    def __init__(self) -> None:
        self.connections = Connections()

    def route(self, fd: int) -> Route:
        port: RouterPort = self  # type: ignore[assignment]
        return Route(port, b"id", "user", fd)


def is_cut(far: socket.socket) -> bool:
    far.settimeout(10)
    with contextlib.suppress(ConnectionError):
        return far.recv(1) == b""
    return True


def test_what_came_in_and_did_not_come_out_is_counted(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    connection = Connection(near.fileno(), 0.0)
    if connection.backlog() is None:
        pytest.skip("this system does not count what comes in")
    far.sendall(bytes(10_000))
    wait_until(lambda: connection.backlog() == 10_000)
    connection.received += 4_000
    assert connection.backlog() == 6_000
    connection.received += 40_000
    assert connection.backlog() == 0


def test_a_connection_can_be_cut_and_a_listening_socket_cannot(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    Connection(near.fileno(), 0.0).cut()
    assert is_cut(far)
    with socket.create_server(("127.0.0.1", 0)) as server:
        Connection(server.fileno(), 0.0).cut()
        with socket.create_connection(server.getsockname()) as other:
            server.accept()[0].close()
            assert is_cut(other)


def test_descriptors_that_are_gone_or_are_no_sockets_are_passed_over(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        number = file.fileno()
        for _ in range(2):
            connection = Connection(number, 0.0)
            connection.cut()
            assert connection.backlog() is None
            file.close()


def test_processes_of_this_user_are_no_strangers() -> None:
    """Hundreds that start together would else end each other's connections, again and again."""
    connections = Connections()
    connections.unauthenticated_max = 1
    pairs = [socket.socketpair(socket.AF_UNIX) for _ in range(3)]
    try:
        for near, _ in pairs:
            connections.accepted(near.fileno(), 0.0)
        for _, far in pairs:
            far.setblocking(False)
            with pytest.raises(BlockingIOError):
                far.recv(1)
        assert connections.dropped == 0
    finally:
        for near, far in pairs:
            near.close()
            far.close()


@attack("T22")
def test_the_oldest_stranger_makes_room(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    connections = Connections()
    connections.unauthenticated_max = 1
    connections.accepted(near.fileno(), 0.0)
    connections.accepted(9001, 1.0)
    assert is_cut(far)
    assert connections.dropped == 1
    connections.spoke(9001)
    connections.accepted(9002, 3.0)
    connections.accepted(9002, 4.0)  # the former one has ended, and nobody told yet
    assert connections.dropped == 1


@attack("T22")
def test_a_connection_without_a_session_ends(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    port = Port()
    connections = port.connections
    connections.patience = 5.0
    connections.check(99.0, lambda _: False)
    connections.accepted(near.fileno(), 99.0)
    route = port.route(near.fileno())
    has_session = True
    now = 99.0

    def pass_to(moment: float) -> int:
        nonlocal now
        while now < moment:
            now += 1.0
            connections.check(now, lambda one: has_session and one is route)
        return connections.dropped

    assert pass_to(114.0) == 0
    has_session = False
    assert pass_to(118.0) == 0
    assert pass_to(119.0) == 1
    assert is_cut(far)
    connections.closed(near.fileno())
    assert pass_to(140.0) == 1


def test_after_a_stall_of_ours_nobody_is_late(ends: tuple[socket.socket, socket.socket]) -> None:
    near, _ = ends
    connections = Connections()
    connections.check(0.0, lambda _: False)
    connections.accepted(near.fileno(), 0.0)
    connections.check(60.0, lambda _: False)
    assert connections.dropped == 0
    for moment in range(61, 81):
        connections.check(float(moment), lambda _: False)
    assert connections.dropped >= 1


def test_a_brokers_connections_are_known_until_they_end(achilles_home: Path) -> None:
    with RunningBroker(achilles_home, limits=Limits(hello_timeout=0.2)) as broker:
        (clients, workers) = [port.connections for port in broker.broker._roles]
        wait_for(lambda: not workers.by_fd, "the end of its own attempts")
        with raw_peer(broker, "worker", tcp=True) as worker, raw_peer(broker, "client") as client:
            worker.hello("worker")
            client.hello("client")
            assert len(workers.by_fd) == 1
            with RawPeer(broker.addresses.worker_ipc or broker.addresses.workers):
                wait_for(lambda: workers.dropped, "the end of whom says no hello")
            worker.hello("worker")
        wait_for(lambda: not clients.by_fd and not workers.by_fd, "their ends")
        assert clients.dropped == 0
