"""Attacks below the messages: on the handshake, on the bytes, on memory before a key was shown."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.core.link import Link
from achilles.errors import AchillesError
from achilles.net import peer
from achilles.net.control import request
from achilles.net.endpoint import Gatekeeper, bind_router, dial_dealer, parse_endpoint
from achilles.net.keys import find_join
from achilles.net.peer import dialer_to
from tests import commands, tasks
from tests.brokers import RawPeer, RunningBroker, answer_one, raw_peer
from tests.security.attacks import attack
from tests.security.zmtp import (
    Flips,
    Relay,
    command,
    connect,
    frame,
    greeting,
    ready,
    send_until_closed,
)

MIB = 1 << 20


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    """A broker that serves honest peers as before, after whatever was done to it."""
    with RunningBroker(achilles_home) as broker:
        yield broker
        with raw_peer(broker, "client") as client, raw_peer(broker, "worker") as worker:
            client.hello("client")
            worker.hello("worker")
            answer_one(client, worker, 1)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to the codec."""
    seen: list[Any] = []
    original = p.decode

    def decode(frames: Any) -> Any:
        seen.append(frames)
        return original(frames)

    monkeypatch.setattr(p, "decode", decode)
    return seen


def doors(broker: RunningBroker) -> list[Any]:
    return [broker.addresses.clients, broker.addresses.workers]


# --- Handshakes -----------------------------------------------------------------------------------

HELLO = frame(b"ac\1" + bytes(33) + msgspec.msgpack.encode(["shutdown"]))
UNSAFE = {
    "no security": [greeting(b"NULL"), ready(), HELLO],
    "a password": [greeting(b"PLAIN"), command(b"HELLO", b"\4user\4pass"), HELLO],
    "no mechanism": [greeting(b""), ready(), HELLO],
    "security that was said and left out": [greeting(b"CURVE"), ready(), HELLO],
    "ZMTP 2": [b"\xff" + bytes(8) + b"\x7f\1\5", b"\0\0", b"\0" + bytes([len(HELLO)]) + HELLO],
    "ZMTP 1": [b"\1\0", bytes([len(HELLO) % 255]) + b"\0" + HELLO],
    "ZMTP 3.0": [greeting(b"NULL", version=b"\3\0"), ready(), HELLO],
}


@attack("T1", "T15", "T36")
@pytest.mark.parametrize("way", UNSAFE)
def test_without_security_not_a_byte_is_parsed(
    broker: RunningBroker, parsed: list[Any], way: str
) -> None:
    for door in doors(broker):
        with connect(door) as connection:
            send_until_closed(connection, *UNSAFE[way])
    assert parsed == []


@attack("T28")
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_web_page_is_not_understood(
    broker: RunningBroker, parsed: list[Any], method: str
) -> None:
    body = b"x" * 4096
    head = f"{method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    for door in doors(broker):
        with connect(door) as connection:
            connection.sendall(head.encode() + body)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    answer += data
            assert b"HTTP" not in answer
    assert parsed == []


@attack("T3")
def test_without_a_zap_handler_nobody_is_let_in(achilles_home: Path) -> None:
    """Not even whoever has the right key: libzmq is told to ask, and there is nobody to answer."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    public, secret = zmq.curve_keypair()
    bound = bind_router(
        context,
        tcp=parse_endpoint("tcp://127.0.0.1:0", to_bind=True),
        ipc=parse_endpoint(f"ipc://{achilles_home}/socket"),
        domain="door",
        broker_secret=secret,
    )
    assert bound.tcp is not None
    assert bound.ipc is not None
    client = zmq.curve_keypair()
    with (
        RawPeer(bound.tcp, _keys(client, public)) as one,
        RawPeer(bound.ipc) as other,
    ):
        assert not one.socket.poll(300, zmq.POLLOUT)
        assert not other.socket.poll(300, zmq.POLLOUT)
        gatekeeper = Gatekeeper(context, {})  # and so it is one who refuses
        gatekeeper.socket.close(0)
    context.destroy(0)


def _keys(pair: tuple[bytes, bytes], broker_public: bytes) -> Any:
    from achilles.net.endpoint import CurveKeys

    return CurveKeys(*pair, broker_public)


# --- Somebody between -----------------------------------------------------------------------------


@attack("T15")
@pytest.mark.parametrize("way", ["no security", "no mechanism", "ZMTP 2", "ZMTP 1", "ZMTP 3.0"])
def test_a_peer_is_not_talked_down(broker: RunningBroker, way: str) -> None:
    """It says nothing but its greeting to what offers less than CURVE,
    and a named error to its user.
    """
    pieces = UNSAFE[way]
    heard = b""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        join = broker.join("admin")
        port = server.getsockname()[1]
        dialed = dial_dealer(
            zmq.Context.instance(), parse_endpoint(f"tcp://127.0.0.1:{port}"), join.keys
        )
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            dialed.socket.poll(0, zmq.POLLOUT)
            connection.sendall(b"".join(pieces[:2]))
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    heard += data
        problems = [event.problem for event in dialed.watch.poll()]
        assert not dialed.socket.poll(0, zmq.POLLOUT)
        dialed.watch.close()
        dialed.socket.close(0)
    assert len(heard) <= 64, "more than a greeting"
    assert any(problems)


@attack("T17")
def test_what_an_administrator_sent_cannot_be_replayed(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte by byte on another connection: the keys of the connection are others.
    Nor its messages, in another session.
    """
    reloads: list[None] = []
    reload = broker.broker._reload

    def count() -> None:
        reloads.append(None)
        reload()

    monkeypatch.setattr(broker.broker, "_reload", count)
    recorded: list[bytes] = []

    def record(number: int, data: bytes) -> bytes:
        recorded.append(data)
        return data

    join = broker.join("admin")
    with Relay(broker.addresses.clients, record) as relay:
        far = msgspec.structs.replace(join, address=relay.address, ipc="")
        request(dialer_to(far), p.ReloadKeys(), timeout=10)
    assert len(reloads) == 1
    with connect(broker.addresses.clients) as connection:
        send_until_closed(connection, *recorded)
    assert len(reloads) == 1


@attack("T17", "T36")
def test_an_administrators_token_is_worth_nothing_with_another_key(broker: RunningBroker) -> None:
    join = broker.join("client")
    with (
        raw_peer(broker, "admin", tcp=True) as admin,
        RawPeer(parse_endpoint(join.address), join.keys) as thief,
        raw_peer(broker, "worker", tcp=True) as worker,
    ):
        admin.hello("admin")
        for other in (thief, worker):
            other.send(p.Shutdown(), Link(admin.link.token))
            other.expect(p.Gone)
        admin.send(p.StatusRequest())
        admin.expect(p.Status)
        admin.send(p.Goodbye("done"))
        with raw_peer(broker, "admin", tcp=True) as another:
            another.send(p.Shutdown(), Link(admin.link.token))  # of a session that is over
            another.expect(p.Gone)
    assert not broker.broker._sessions.is_shutting_down


@attack("T16")
def test_flipped_bits_change_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 of them, one by one and many at once: each ends its connection,
    and what was under way is sent again.
    """
    with commands.broker("--no-ipc"), commands.worker("--slots", "2"):
        join = find_join(Path(os.environ["ACHILLES_HOME"]), "client", None)
        there, back = Flips(seed=7), Flips(seed=8)
        with Relay(parse_endpoint(join.address), there, back) as relay:
            file = tmp_path / "client.join"
            file.touch(mode=0o600)
            file.write_bytes(msgspec.structs.replace(join, address=relay.address, pid=0).encode())
            monkeypatch.setenv("ACHILLES_JOIN", str(file))
            monkeypatch.setattr(peer, "SILENCE_SECONDS", 2.0)  # a length that is garbled is awaited
            values = [(n, os.urandom(10_000)) for n in range(20)]
            with DistributedExecutor() as executor:
                while (
                    there.count + back.count < 100_000 or there.connections + back.connections < 8
                ):
                    assert [*executor.map(tasks.echo, values, timeout=30)] == values


# --- Memory before a key was shown ----------------------------------------------------------------

GIB = 1 << 30
GREEDY = {
    "a frame that claims 12 GiB": [greeting(b"CURVE"), b"\2" + struct.pack(">Q", 12 * GIB)],
    "a command that claims 12 GiB": [greeting(b"CURVE"), b"\6" + struct.pack(">Q", 12 * GIB)],
    "a claim beyond all memory": [greeting(b"CURVE"), b"\6" + struct.pack(">Q", 2**63 - 1)],
    "one more than the limit": [greeting(b"CURVE"), b"\6" + struct.pack(">Q", 16 * MIB + 1)],
    "a GiB of commands": [
        greeting(b"CURVE"),
        *[command(b"HELLO", bytes(15 * MIB))] * 70,
    ],
    "a GiB of frames": [greeting(b"CURVE"), *[frame(bytes(15 * MIB))] * 70],
    "a GiB of noise": [*[bytes(MIB)] * 1024],
}


@attack("T20")
def test_what_is_too_much_ends_the_connection_before_any_key() -> None:
    with commands.broker() as broker:
        join = find_join(Path(os.environ["ACHILLES_HOME"]), "client", None)
        process = broker.serving()
        before = process.memory_info().rss
        for name, pieces in GREEDY.items():
            for address in (join.address, join.worker_address):
                with connect(parse_endpoint(address)) as connection:
                    sent = send_until_closed(connection, *pieces)
                assert sent < 64 * MIB, name
                grown = process.memory_info().rss - before
                assert grown < 32 * MIB, f"{name}: {grown >> 20} MiB"
        with DistributedExecutor(address="auto") as executor:
            assert executor.status()["workers"] == 0


@attack("T15")
def test_another_brokers_key_is_named(broker: RunningBroker) -> None:
    other, _ = zmq.curve_keypair()
    join = msgspec.structs.replace(broker.join("admin"), broker_public=other.decode(), ipc="")
    with pytest.raises(AchillesError, match="does not hold the expected key"):
        request(dialer_to(join), p.StatusRequest(), timeout=1.0)
