from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from achilles.errors import ConfigError, InsecureBindError, KeyFileError
from achilles.net.endpoint import IPC_PATH_MAX, Gatekeeper, hostname
from achilles.net.keys import ROLES, find_join, key_pair, read_join
from tests.brokers import RunningBroker, answer_one, raw_peer, wait_for
from tests.security.attacks import attack

ANY = ".".join("0000")  # all interfaces


def test_a_broker_writes_join_files_and_takes_all_away_again(achilles_home: Path) -> None:
    run = achilles_home / "run"
    with RunningBroker(achilles_home) as broker:
        assert sorted(os.listdir(run)) == [
            "admin.join",
            "broker.lock",
            "client.join",
            "clients.ipc",
            "worker.join",
            "workers.ipc",
        ]
        for role in ROLES:
            join = find_join(achilles_home, role, str(broker.addresses.clients))
            assert join.worker_address == str(broker.addresses.workers)
            assert join.worker_ipc == str(broker.addresses.worker_ipc)
    assert os.listdir(run) == []
    assert broker.open_tasks == 0


@pytest.mark.parametrize("tcp", [False, True])
def test_peers_meet_over_ipc_and_over_tcp(achilles_home: Path, tcp: bool) -> None:
    with (
        RunningBroker(achilles_home) as broker,
        raw_peer(broker, "client", tcp=tcp) as client,
        raw_peer(broker, "worker", tcp=tcp) as worker,
    ):
        client.hello("client")
        worker.hello("worker")
        answer_one(client, worker, 1)


def test_without_ipc_there_are_no_sockets_in_the_file_system(achilles_home: Path) -> None:
    with RunningBroker(achilles_home, ipc=False) as broker:
        assert not list((achilles_home / "run").glob("*.ipc"))
        assert broker.addresses.ipc is broker.addresses.worker_ipc is None
        with raw_peer(broker, "client") as client:
            assert client.hello("client").credit == 1000


@attack("T7")
@pytest.mark.parametrize("ipc", [False, True])
def test_a_second_broker_is_refused_and_the_first_unharmed(achilles_home: Path, ipc: bool) -> None:
    with RunningBroker(achilles_home) as first:
        before = {path: path.stat().st_ino for path in (achilles_home / "run").iterdir()}
        with pytest.raises(ConfigError, match=rf"runs already \(pid {os.getpid()}"):
            RunningBroker(achilles_home, ipc=ipc).__enter__()
        assert {path: path.stat().st_ino for path in (achilles_home / "run").iterdir()} == before
        with raw_peer(first, "client") as client:
            client.hello("client")


def test_brokers_of_two_homes_live_side_by_side(achilles_home: Path) -> None:
    with RunningBroker(achilles_home / "a") as one, RunningBroker(achilles_home / "b") as other:
        assert one.addresses.clients != other.addresses.clients
        with raw_peer(one, "client") as client, raw_peer(other, "client") as another:
            assert client.hello("client").epoch != another.hello("client").epoch


@pytest.mark.bad_input(45)
def test_what_a_killed_broker_left_is_replaced(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker:
        join = broker.join("client")
    run = achilles_home / "run"
    (run / "broker.lock").write_text("4194305")
    (run / "clients.ipc").touch()
    (run / "client.join").write_text("what it says is no matter")
    with RunningBroker(achilles_home) as broker:
        assert broker.join("client").public == join.public, "keys outlive brokers"
        with raw_peer(broker, "client") as client:
            client.hello("client")
    assert os.listdir(run) == []


def test_a_start_that_fails_leaves_nothing(achilles_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {taken}: Address already in use"):
            RunningBroker(achilles_home, bind=taken).__enter__()
    assert os.listdir(achilles_home / "run") == []
    with RunningBroker(achilles_home):
        pass


def test_a_home_with_a_long_path_gets_sockets_elsewhere(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = achilles_home / "short"
    short.mkdir(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    home = achilles_home / ("x" * IPC_PATH_MAX)
    with RunningBroker(home) as broker:
        assert str(broker.addresses.ipc).startswith(f"ipc://{short}/")
        with raw_peer(broker, "client") as client:
            client.hello("client")
        with pytest.raises(ConfigError, match="runs already"):
            RunningBroker(home).__enter__()
    assert os.listdir(short) == os.listdir(home / "run") == []


def test_a_home_with_a_space_is_one_too(achilles_home: Path) -> None:
    home = achilles_home / "Application Support"
    with RunningBroker(home) as broker, raw_peer(broker, "client") as client:
        client.hello("client")


def test_what_is_loose_is_refused(achilles_home: Path) -> None:
    achilles_home.chmod(0o755)
    with pytest.raises(KeyFileError, match=f"chmod 700 {achilles_home}"):
        RunningBroker(achilles_home).__enter__()
    achilles_home.chmod(0o700)
    with RunningBroker(achilles_home):
        pass
    (achilles_home / "keys" / "worker.key").chmod(0o640)
    with pytest.raises(KeyFileError, match=r"chmod 600 .*worker\.key"):
        RunningBroker(achilles_home).__enter__()
    assert os.listdir(achilles_home / "run") == []


@pytest.mark.bad_input(48)
def test_beyond_loopback_every_key_must_be_in_order(achilles_home: Path) -> None:
    """Before anything is bound."""
    key_pair(achilles_home, "worker")
    (achilles_home / "keys" / "worker.key").chmod(0o640)
    with pytest.raises(InsecureBindError, match=r"reached from other machines.* chmod 600 "):
        RunningBroker(achilles_home, bind="tcp://192.168.1.1:5555").__enter__()


@attack("T3")
def test_a_broker_ends_with_its_zap_handler(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than go on with nobody at the door."""

    def die(self: Gatekeeper, frames: list[bytes]) -> str:
        raise OSError("the handler is dead")

    broker = RunningBroker(achilles_home).__enter__()
    monkeypatch.setattr(Gatekeeper, "_user", die)
    with raw_peer(broker, "client"):
        wait_for(lambda: not broker.is_alive, "the end of the broker")
    with pytest.raises(OSError, match="the handler is dead"):
        broker.stop()
    assert os.listdir(achilles_home / "run") == []


def test_what_other_hosts_are_told(achilles_home: Path) -> None:
    """A wildcard is no address: this host uses loopback, others what is advertised,
    or the host's name.
    """
    with RunningBroker(achilles_home, bind=f"tcp://{ANY}:0", advertise="broker.example.org") as one:
        assert one.addresses.clients.host == one.addresses.workers.host == "127.0.0.1"
        join = one.join("worker")
        port = one.addresses.workers.port
        assert join.worker_address == f"tcp://127.0.0.1:{port}"
        assert join.far_worker_address == f"tcp://broker.example.org:{port}"
        far = join.for_others(key_pair(achilles_home, "client"))
        assert (far.address, far.worker_address) == (join.far_address, join.far_worker_address)
        assert far.ipc == far.worker_ipc == ""
    with RunningBroker(achilles_home / "b", bind=f"tcp://{ANY}:0") as other:
        assert other.addresses.far_clients.host == hostname()


def test_workers_have_the_port_beside_the_clients(achilles_home: Path) -> None:
    """Unless somebody else on this machine takes it at that moment."""
    for _ in range(20):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with (
            contextlib.suppress(ConfigError),  # somebody has taken the first one
            RunningBroker(achilles_home, bind=f"tcp://127.0.0.1:{port}") as broker,
        ):
            if broker.addresses.workers.port == port + 1:
                return
    pytest.fail("never the port beside the clients'")


def test_join_files_are_readable_by_their_owner_alone(achilles_home: Path) -> None:
    with RunningBroker(achilles_home):
        for path in (achilles_home / "run").glob("*.join"):
            assert path.stat().st_mode & 0o777 == 0o600
            read_join(path)


@pytest.mark.bad_input(55)
def test_workers_find_the_broker_that_replaces_a_killed_one(achilles_home: Path) -> None:
    """They have no other word of where it is."""
    path = achilles_home / "run" / "worker.join"
    with RunningBroker(achilles_home) as first:
        left = path.read_bytes()
    path.write_bytes(left)
    path.chmod(0o600)
    with RunningBroker(achilles_home, bind=str(first.addresses.clients)) as second:
        assert second.addresses.workers == first.addresses.workers
