"""Who may come in: each port of a running broker, with each kind of key."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from achilles.core import protocol as p
from achilles.net.endpoint import CurveKeys, parse_endpoint
from tests.brokers import RawPeer, RunningBroker, answer_one, hello, raw_peer, wait_for
from tests.security.attacks import attack

FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker
        with raw_peer(broker, "client") as client, raw_peer(broker, "worker") as worker:
            client.hello("client")
            worker.hello("worker")
            answer_one(client, worker, 1)


def is_let_in(address: str, keys: CurveKeys | None) -> bool:
    """Whether the handshake at the address succeeds, by libzmq's own word."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    if keys is not None:
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.broker_public)
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | FAILED)
    dealer.connect(address)
    try:
        assert monitor.poll(10_000), "neither let in nor refused"
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        return event == zmq.EVENT_HANDSHAKE_SUCCEEDED
    finally:
        dealer.disable_monitor()
        monitor.close(0)
        context.destroy(0)


@attack("T1", "T2")
def test_each_key_opens_its_own_door_alone(broker: RunningBroker) -> None:
    stranger = CurveKeys(*zmq.curve_keypair(), broker.join("client").keys.broker_public)
    keys: dict[str, CurveKeys | None] = {"nobody": None, "stranger": stranger}
    keys |= {role: broker.join(role).keys for role in ("client", "admin", "worker")}
    join = broker.join("client")
    let_in = {
        (door, who)
        for door, address in (("clients", join.address), ("workers", join.worker_address))
        for who, key in keys.items()
        if is_let_in(address, key)
    }
    assert let_in == {("clients", "client"), ("clients", "admin"), ("workers", "worker")}


@attack("T11", "T36")
def test_a_clients_key_over_tcp_does_not_administer(broker: RunningBroker) -> None:
    join = broker.join("client")
    with RawPeer(parse_endpoint(join.address), join.keys) as peer:
        peer.send(hello("admin"))
        assert "not for the role admin" in peer.expect(p.Refused).reason


def test_nothing_listens_beyond_loopback(broker: RunningBroker) -> None:
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 2
    assert set(listening) == {"127.0.0.1"}


@attack("T22")
def test_a_connection_that_says_nothing_holds_up_nobody(broker: RunningBroker) -> None:
    address = broker.addresses.clients
    with socket.create_connection((address.host, address.port)) as silent:
        silent.sendall(b"\xff\0\0\0")  # the beginning of a greeting
        with raw_peer(broker, "client", tcp=True) as client:
            client.hello("client")


def test_refusals_are_counted(broker: RunningBroker) -> None:
    before = broker.broker._sessions.refused
    with raw_peer(broker, "client") as peer:
        peer.hello("client")
        peer.send_frames(b"nonsense")
        wait_for(lambda: broker.broker._sessions.refused == before + 1, "the count")
