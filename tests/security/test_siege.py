"""Attacks on a cluster as a whole, while it works: its broker is ended, its port is flooded."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import psutil
import pytest
import zmq

from achilles import DistributedExecutor
from achilles.net.endpoint import CurveKeys
from achilles.net.keys import Join, find_join, given_join
from tests import commands, tasks
from tests.integration.test_faults import own_cluster
from tests.modes import wait_until
from tests.security.attacks import attack

# What libzmq gives the first connections of a process's first ROUTER for routing ids:
# a generator that nobody seeds.
FIRST_ID = 0xE43C9869


def join_of(role: str) -> Join:
    return find_join(Path(os.environ["ACHILLES_HOME"]), role, None)


class Intruders:
    """Bare DEALERs that connect with a key; a context manager."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def connect(self, address: str, keys: CurveKeys, identity: bytes = b"") -> zmq.Socket[bytes]:
        """One more."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        if identity:
            socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.broker_public)
        socket.connect(address)
        self._sockets.append(socket)
        return socket

    def close(self) -> None:
        """End all of them without a word."""
        for socket in self._sockets:
            socket.close(0)
        self._sockets.clear()

    def __enter__(self) -> Intruders:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._context.term()


@attack("T19")
def test_a_broker_that_was_aborted_is_back_and_has_everything_again(tmp_path: Path) -> None:
    """libzmq lets a peer claim the routing id that it would give out next,
    and ends its process when it does.

    Whoever has a client's key can do that. Nothing is lost by it, the key can be revoked,
    and is worth nothing then.
    """
    with commands.broker("--no-ipc") as broker, commands.worker() as worker:
        exported = commands.run("keys", "export", "client", "--name", "intruder")
        assert exported.returncode == 0, exported.stderr
        stolen = tmp_path / "stolen.join"
        stolen.touch(mode=0o600)
        stolen.write_text(exported.stdout)
        join = given_join(str(stolen), "client", None)
        serving = broker.serving()
        with DistributedExecutor(address="auto") as executor, Intruders() as intruders:
            log, go = tmp_path / "log", tmp_path / "go"
            running = executor.submit(tasks.note_unless_there, str(log), str(go))
            futures = [executor.submit(tasks.add, n) for n in range(50)]
            wait_until(log.exists, "work has begun")
            for number in range(30):
                identity = b"\0" + struct.pack(">I", FIRST_ID + number)
                intruders.connect(join.address, join.keys, identity)
            intruders.connect(join.address, join_of("client").keys)  # is given a claimed id
            gone, _ = psutil.wait_procs([serving], timeout=5)
            if not gone:
                serving.kill()  # this libzmq gives out other ids; what comes after is the same
            intruders.close()
            revoked = commands.run("keys", "revoke", "intruder")
            assert revoked.returncode == 0, revoked.stderr
            go.touch()
            assert [future.result(30) for future in futures] == [n + 1 for n in range(50)]
            assert running.result(30) >= 1
            wait_until(lambda: executor.status()["workers"] == 1, "the worker is back")
            assert executor.status()["failed"] == 0
        assert broker.serving().pid != serving.pid
        again = commands.run(
            "status", ACHILLES_JOIN=str(stolen), ACHILLES_CLIENT_CONNECT_TIMEOUT="1"
        )
        assert again.returncode != 0
        assert worker.stop() == 0
        assert broker.stop() == 0
    assert "another one takes its place" in broker.said


@attack("T2", "T22", "T23")
def test_a_flood_of_strangers_costs_no_honest_peer_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full handshakes with unknown keys, one after the other and many at once,
    for as long as work goes on.
    """
    with own_cluster(monkeypatch, workers=1, tcp=True) as cluster:
        join = join_of("client")
        with DistributedExecutor(address=cluster.address) as executor:
            futures = [executor.submit(tasks.pause, 0.05, n) for n in range(40)]
            for wave in range(3):
                with Intruders() as intruders:
                    sockets = []
                    for address in (join.address, join_of("client").worker_address):
                        for _ in range(30):
                            keys = CurveKeys(*zmq.curve_keypair(), join.keys.broker_public)
                            sockets.append(intruders.connect(address, keys))
                    assert executor.submit(tasks.add, wave).result(20) == wave + 1
                    assert not any(one.poll(0, zmq.POLLOUT) for one in sockets)
            assert [future.result(30) for future in futures] == list(range(40))
            status = executor.status()
        assert (status["workers"], status["reassigned"], status["failed"]) == (1, 0, 0)
