from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from achilles.errors import SelfAttackError
from achilles.net import serve as serve_module
from achilles.net.endpoint import Endpoint, Gatekeeper
from achilles.net.loop import SocketLoop
from achilles.net.self_attack import Door, attack
from tests.brokers import RunningBroker
from tests.security import attacks

LOOPBACK = Endpoint("tcp", "127.0.0.1", 0, "")


class Place:
    """A port that is made as a test wants it, with the ZAP handler of one domain beside it."""

    def __init__(self, *, has_handler: bool = True) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.loop = SocketLoop()
        self.router: zmq.Socket[bytes] | None = None
        self.worker = zmq.curve_keypair()
        self.public, self.secret = zmq.curve_keypair()
        if has_handler:
            self.gatekeeper = Gatekeeper(self.context, {"door": {}})
            self.loop.register(self.gatekeeper.socket.FD, self.gatekeeper.answer)
            self.gatekeeper.answer()

    def open(
        self, *, curve: bool = True, zap: bool = True, frame_max: int = 16 * 1024 * 1024
    ) -> Door:
        """Listen."""
        router = self.router = self.context.socket(zmq.ROUTER)
        router.setsockopt(zmq.MAXMSGSIZE, frame_max)
        if zap:
            router.setsockopt_string(zmq.ZAP_DOMAIN, "door")
            router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if curve:
            router.setsockopt(zmq.CURVE_SERVER, 1)
            router.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        router.bind(str(LOOPBACK))
        port = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        return self.door(port)

    def door(self, port: int) -> Door:
        return Door(LOOPBACK._replace(port=port), self.public, {"worker": self.worker})

    def attack(self, door: Door, timeout: float = 10.0) -> None:
        attack(self.context, [door], self.loop, self.loop.wait, timeout=timeout)

    def close(self) -> None:
        self.context.destroy(0)
        self.loop.close()


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def test_a_door_that_refuses_everybody_is_in_order(place: Place) -> None:
    place.attack(place.open())
    assert place.gatekeeper.refused == 2, "the unknown key, and the worker's"


@attacks.attack("T1")
def test_a_door_without_encryption_must_not_do(place: Place) -> None:
    with pytest.raises(SelfAttackError, match=r"lets in a peer without security|without CURVE"):
        place.attack(place.open(curve=False, zap=False))


@attacks.attack("T3")
def test_a_door_that_asks_nobody_must_not_do() -> None:
    """CURVE alone lets every key in; which of them is seen first is chance."""
    finding = r"lets in a peer with (an unknown|the \w+'s) key"
    with (
        contextlib.closing(Place(has_handler=False)) as place,
        pytest.raises(SelfAttackError, match=finding),
    ):
        place.attack(place.open(zap=False))


def test_the_key_of_another_role_must_not_do(place: Place) -> None:
    raw = bytes(z85.decode(place.worker[0]))
    place.gatekeeper.users = {"door": {raw: "worker/x"}}
    with pytest.raises(SelfAttackError, match="lets in a peer with the worker's key"):
        place.attack(place.open())


@attacks.attack("T20")
def test_a_frame_that_is_too_large_must_not_do(place: Place) -> None:
    door = place.open(frame_max=17 * 1024 * 1024)
    with pytest.raises(SelfAttackError, match="not refuse in time: a frame of more than 16777216"):
        place.attack(door, timeout=0.3)


def test_what_nobody_decides_is_not_refused(place: Place) -> None:
    """A port whose handler is dead lets nobody in either, but proves nothing."""
    place.loop.unregister(place.gatekeeper.socket.FD)
    with pytest.raises(SelfAttackError, match=r"did not refuse within 0\.3 s: a peer with an"):
        place.attack(place.open(), timeout=0.3)


def test_a_port_that_cannot_be_reached_proves_nothing(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(SelfAttackError, match=f"cannot be reached at tcp://127.0.0.1:{free}"):
        place.attack(place.door(free))


def test_what_speaks_something_else_is_no_door(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        door = place.door(server.getsockname()[1])
        with pytest.raises(SelfAttackError, match="not refuse in time"):
            place.attack(door, timeout=0.1)


@attacks.attack("T1", "T2")
def test_a_broker_with_an_open_door_tells_nobody_where_it_is(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each key opened each port."""
    users = serve_module._users

    def everybody(home: Path) -> dict[str, dict[bytes, str]]:
        both = {key: user for each in users(home).values() for key, user in each.items()}
        return dict.fromkeys(users(home), both)

    monkeypatch.setattr(serve_module, "_users", everybody)
    with pytest.raises(SelfAttackError, match=r"lets in a peer with the \w+'s key at tcp://"):
        RunningBroker(achilles_home).__enter__()
    assert os.listdir(achilles_home / "run") == []
