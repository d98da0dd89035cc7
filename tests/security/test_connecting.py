"""What is wrong with a connection is told by name, at the client and at the worker,
within the time to connect.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from achilles import errors
from achilles.net.client import Connection
from achilles.net.keys import Join
from achilles.net.peer import dialer_to
from achilles.net.worker import Worker
from tests.brokers import RunningBroker

CONNECT_SECONDS = 6.0

Told = dict[tuple[str, str], BaseException]


def listen(stack: ExitStack, serve: Callable[[socket.socket], None]) -> int:
    """A port where each connection is served by that."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # the test is over
            stack.enter_context(connection)
            serve(connection)

    thread = threading.Thread(target=accept)
    thread.start()
    stack.callback(thread.join)
    stack.callback(server.shutdown, socket.SHUT_RDWR)
    return int(server.getsockname()[1])


def answer_as_a_web_server(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # libzmq may hang up at any moment after the first byte
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)
        connection.shutdown(socket.SHUT_WR)


def router(stack: ExitStack, secret: bytes | None) -> int:
    """A port of somebody's ROUTER, who never answers."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stack.callback(context.destroy, 0)
    made = context.socket(zmq.ROUTER)
    stack.callback(made.close, 0)
    if secret is not None:
        made.setsockopt(zmq.CURVE_SERVER, 1)
        made.setsockopt(zmq.CURVE_SECRETKEY, secret)
    return made.bind_to_random_port("tcp://127.0.0.1")


def with_port(join: Join, port: int) -> Join:
    join.pid = 0  # what listens there is nobody of whom the file tells
    join.address = join.worker_address = f"tcp://127.0.0.1:{port}"
    return join


def at_client(join: Join) -> None:
    connection = Connection(
        dialer_to(join), code=None, address=join.address, connect_timeout=CONNECT_SECONDS
    )
    connection.start()


def at_worker(join: Join) -> None:
    worker = Worker(
        dialer_to(join), code=None, slots=1, name="w", tags=[], connect_timeout=CONNECT_SECONDS
    )
    worker.run(lambda: 0, lambda: None)


@pytest.fixture
def told(achilles_home: Path) -> Iterator[Told]:
    """What each peer was told in each place, all of them at once."""
    found: Told = {}
    with RunningBroker(achilles_home) as broker, ExitStack() as stack:

        def join_of(role: str) -> Join:
            join = broker.join(role)
            join.ipc = join.worker_ipc = ""
            return join

        def wrong_key(join: Join) -> Join:
            public, secret = zmq.curve_keypair()
            join.public, join.secret = public.decode(), secret.decode()
            return join

        def wrong_broker(join: Join) -> Join:
            join.broker_public = zmq.curve_keypair()[0].decode()
            return join

        public, secret = zmq.curve_keypair()
        plain, deaf = router(stack, None), router(stack, secret)
        web, silent = listen(stack, answer_as_a_web_server), listen(stack, lambda _: None)

        def deaf_broker(join: Join) -> Join:
            join.broker_public = public.decode()
            return with_port(join, deaf)

        places: dict[str, Callable[[Join], Join]] = {
            "wrong key": wrong_key,
            "wrong broker": wrong_broker,
            "plaintext": lambda join: with_port(join, plain),
            "web server": lambda join: with_port(join, web),
            "silent": lambda join: with_port(join, silent),
            "deaf": deaf_broker,
        }
        threads = []
        for place, change in places.items():
            for role, connect in (("client", at_client), ("worker", at_worker)):
                join = change(join_of(role))

                def attempt(
                    key: tuple[str, str] = (place, role),
                    join: Join = join,
                    connect: Callable[[Join], None] = connect,
                ) -> None:
                    try:
                        connect(join)
                    except errors.AchillesError as error:
                        found[key] = error

                threads.append(threading.Thread(target=attempt))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a peer waits for ever"
        yield found


def test_each_thing_that_is_wrong_has_its_own_name(told: Told) -> None:
    wanted = {
        "wrong key": (errors.KeyRefusedError, "refused this key"),
        "wrong broker": (errors.WrongBrokerError, "does not hold the expected key"),
        "plaintext": (errors.EncryptionMismatchError, "one side is encrypted"),
        "web server": (errors.NotABrokerError, "is not an achilles broker"),
        "silent": (errors.SilentBrokerError, "never spoke our protocol"),
        "deaf": (errors.SilentBrokerError, "took this key, but does not answer"),
    }
    for place, (kind, text) in wanted.items():
        for role in ("client", "worker"):
            error = told[place, role]
            assert type(error) is kind, (place, role, error)
            assert text in str(error), (place, role, error)
            assert "tcp://127.0.0.1:" in str(error)
