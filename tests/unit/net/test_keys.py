from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from achilles.errors import BrokerUnreachableError, ConfigError, KeyFileError
from achilles.net.endpoint import IPC_PATH_MAX, hostname
from achilles.net.keys import (
    ROLES,
    code_key,
    code_of,
    find_join,
    given_join,
    join_path,
    key_pair,
    make_pair,
    new_code_key,
    read_join,
    remove_joins,
    run_directory,
    write_joins,
)
from tests.security.attacks import attack

ADDRESS, WORKER_ADDRESS = "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556"


def write(home: Path, **changes: Any) -> None:
    """Join files as a broker writes them, but for ``changes``."""
    write_joins(home, address=ADDRESS, worker_address=WORKER_ADDRESS, ipc="", worker_ipc="")
    for role in ROLES:
        path = join_path(home, role)
        path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))


def test_a_key_pair_is_made_once_and_kept_private(achilles_home: Path) -> None:
    pair = key_pair(achilles_home, "client")
    path = achilles_home / "keys" / "client.key"
    assert key_pair(achilles_home, "client") == pair
    assert zmq.curve_public(pair.secret) == pair.public
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert pair.secret.decode() not in repr(pair)
    assert len(pair.raw_public) == 32


def test_roles_have_keys_of_their_own(achilles_home: Path) -> None:
    assert len({key_pair(achilles_home, role) for role in (*ROLES, "broker")}) == 4


@pytest.mark.bad_input(47)
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is damaged; remove it, and a new key is made"),
        (b"{}", "is damaged"),
        (b"\xff", "is damaged"),
        (b'{"role": "client", "public": "x", "secret": "y"}', "does not hold the key pair"),
        (b'{"role": "client", "public": "\xc3\xa4", "secret": "\xc3\xa4"}', "does not hold"),
    ],
)
def test_a_damaged_key_is_refused(achilles_home: Path, content: bytes, wanted: str) -> None:
    key_pair(achilles_home, "client")
    (achilles_home / "keys" / "client.key").write_bytes(content)
    with pytest.raises(KeyFileError, match=wanted):
        key_pair(achilles_home, "client")


@pytest.mark.bad_input(47)
def test_a_key_of_another_role_is_refused(achilles_home: Path) -> None:
    key_pair(achilles_home, "client")
    keys = achilles_home / "keys"
    (keys / "client.key").rename(keys / "admin.key")
    with pytest.raises(KeyFileError, match="does not hold the key pair of the role admin"):
        key_pair(achilles_home, "admin")


@attack("T8")
@pytest.mark.bad_input(47)
def test_a_loose_key_is_refused(achilles_home: Path) -> None:
    key_pair(achilles_home, "client")
    (achilles_home / "keys" / "client.key").chmod(0o604)
    with pytest.raises(KeyFileError, match="chmod 600"):
        key_pair(achilles_home, "client")
    (achilles_home / "keys").chmod(0o755)
    with pytest.raises(KeyFileError, match="chmod 700"):
        key_pair(achilles_home, "client")


def test_the_run_directory_is_below_home(achilles_home: Path) -> None:
    assert run_directory(achilles_home) == achilles_home / "run"


@pytest.mark.bad_input(60)
@pytest.mark.parametrize("name", ["x" * IPC_PATH_MAX, "a\nb", "a\udcffb"])
def test_sockets_are_elsewhere_where_a_path_is_none_for_them(
    achilles_home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = achilles_home / "short"
    short.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    one, other = run_directory(achilles_home / name), run_directory(achilles_home / f"{name}2")
    assert one != other
    for run in (one, other):
        assert run.parent == short
        assert run.stat().st_mode & 0o777 == 0o700


@attack("T7")
def test_a_short_directory_that_somebody_else_made_is_refused(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(achilles_home))
    long = achilles_home / ("x" * IPC_PATH_MAX)
    run_directory(long).chmod(0o777)
    with pytest.raises(KeyFileError, match="chmod 700"):
        run_directory(long)


def test_a_join_file_says_where_and_with_which_keys(achilles_home: Path) -> None:
    write(achilles_home)
    for role in ROLES:
        join = read_join(join_path(achilles_home, role))
        assert (join.role, join.address, join.pid) == (role, ADDRESS, os.getpid())
        assert join.keys.public == key_pair(achilles_home, role).public
        assert join.keys.broker_public == key_pair(achilles_home, "broker").public
        assert join.secret not in repr(join)
        assert join_path(achilles_home, role).stat().st_mode & 0o777 == 0o600
    remove_joins(achilles_home)
    remove_joins(achilles_home)
    assert os.listdir(achilles_home / "run") == []


def test_peers_on_one_host_meet_over_ipc(achilles_home: Path) -> None:
    sockets = {name: str(achilles_home / f"{name}.ipc") for name in ("clients", "workers")}
    ipc = {"ipc": f"ipc://{sockets['clients']}", "worker_ipc": f"ipc://{sockets['workers']}"}
    write(achilles_home, **ipc)
    join = read_join(join_path(achilles_home, "client"))
    assert str(join.endpoint()) == ADDRESS, "the socket is not there"
    for path in sockets.values():
        Path(path).touch()
    assert str(join.endpoint()) == ipc["ipc"]
    assert str(read_join(join_path(achilles_home, "worker")).endpoint()) == ipc["worker_ipc"]
    write(achilles_home, **ipc, host=f"not-{hostname()}")
    assert str(read_join(join_path(achilles_home, "client")).endpoint()) == ADDRESS
    assert str(read_join(join_path(achilles_home, "worker")).endpoint()) == WORKER_ADDRESS


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 0},
        {"pid": -1},
        {"pid": 2**40},
        {"pid": "1"},
        {"role": "king"},
        {"public": "x"},
        {"secret": "x" * 40},
        {"broker_public": "x"},
        {"broker_public": "\x00" * 40},
        {"broker_public": "ä" * 40},
        {"address": "http://x"},
        {"worker_address": ""},
        {"surprise": 1},
        {"version": 2},
    ],
)
def test_a_damaged_join_file_is_refused(achilles_home: Path, changes: dict[str, Any]) -> None:
    write(achilles_home, **changes)
    with pytest.raises(KeyFileError, match=r"client\.join is (damaged|of another version)"):
        read_join(join_path(achilles_home, "client"))


@attack("T8")
def test_a_loose_join_file_or_directory_is_refused(achilles_home: Path) -> None:
    write(achilles_home)
    path = join_path(achilles_home, "client")
    for loose, mode, fix in (
        (path, 0o644, "chmod 600"),
        (path.parent, 0o755, "chmod 700"),
        (achilles_home, 0o770, "chmod 700"),
    ):
        before = loose.stat().st_mode
        loose.chmod(mode)
        with pytest.raises(KeyFileError, match=f"close it with: {fix} {loose}"):
            find_join(achilles_home, "client", None)
        loose.chmod(before)
    assert find_join(achilles_home, "client", None).address == ADDRESS


@pytest.mark.parametrize("address", [None, "auto", ADDRESS, "tcp://localhost:5555"])
def test_the_running_broker_is_found(achilles_home: Path, address: str | None) -> None:
    write(achilles_home)
    assert find_join(achilles_home, "client", address).address == ADDRESS


def test_the_ipc_address_that_a_broker_says_is_good_too(achilles_home: Path) -> None:
    write(achilles_home, ipc="ipc:///x/clients.ipc")
    assert find_join(achilles_home, "client", "ipc:///x/clients.ipc").address == ADDRESS


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5554", "tcp://127.0.0.2:5555", "ipc:///x"])
def test_another_broker_has_no_key_here(achilles_home: Path, address: str) -> None:
    write(achilles_home)
    with pytest.raises(BrokerUnreachableError, match=f"is at {ADDRESS}, not at {address}"):
        find_join(achilles_home, "client", address)


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        (None, "no achilles broker of yours is running .*start one with: achilles broker"),
        (ADDRESS, f"no achilles broker of yours is running at {ADDRESS}"),
    ],
)
def test_no_broker_is_a_named_error(achilles_home: Path, address: str | None, wanted: str) -> None:
    for home in (achilles_home, achilles_home / "nothing"):
        with pytest.raises(BrokerUnreachableError, match=wanted):
            find_join(home, "client", address)


def test_an_address_that_cannot_be_is_refused(achilles_home: Path) -> None:
    with pytest.raises(ConfigError, match="is not an endpoint"):
        find_join(achilles_home, "client", "http://x")


def test_a_stale_join_file_is_told(achilles_home: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(achilles_home, pid=gone.pid)
    with pytest.raises(BrokerUnreachableError, match="has ended without removing its join file"):
        find_join(achilles_home, "client", None)
    write(achilles_home, pid=gone.pid, host=f"not-{hostname()}")
    join = find_join(achilles_home, "client", None)
    assert (join.pid, join.running_pid()) == (gone.pid, 0), "not for us to tell"


def test_the_running_brokers_process_is_known_on_its_host(achilles_home: Path) -> None:
    write(achilles_home)
    join = find_join(achilles_home, "client", None)
    assert join.running_pid() == join.pid
    assert join.for_others(key_pair(achilles_home, "client")).running_pid() == 0


# --- The code key ---------------------------------------------------------------------------------


def test_the_code_key_is_made_once_and_kept_private(achilles_home: Path) -> None:
    code = code_key(achilles_home)
    path = achilles_home / "keys" / "code.key"
    assert len(code) == 32
    assert code_key(achilles_home) == code
    assert path.stat().st_mode & 0o777 == 0o600
    assert new_code_key(achilles_home) == code_key(achilles_home) != code


def test_a_code_key_that_is_loose_or_damaged_is_refused(achilles_home: Path) -> None:
    code_key(achilles_home)
    path = achilles_home / "keys" / "code.key"
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        code_key(achilles_home)
    path.chmod(0o600)
    for content in (b"", b"{}", b'{"role":"code","secret":"short"}', b'{"role":"x","secret":"y"}'):
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match="is damaged; copy it from another"):
            code_key(achilles_home)
    path.unlink()
    path.symlink_to(achilles_home / "elsewhere")
    with pytest.raises(KeyFileError, match="is a link"):
        code_key(achilles_home)


def test_the_broker_has_it_in_no_file(achilles_home: Path) -> None:
    write(achilles_home)
    assert not (achilles_home / "keys" / "code.key").exists()
    for role in ROLES:
        assert read_join(join_path(achilles_home, role)).code == ""


def test_a_join_file_brings_it_to_another_host(achilles_home: Path, tmp_path: Path) -> None:
    write(achilles_home)
    near = read_join(join_path(achilles_home, "worker"))
    code = code_key(achilles_home)
    assert code_of(near, achilles_home) == code
    far = near.for_others(make_pair(), code)
    elsewhere = tmp_path / "home"
    assert code_of(far, elsewhere) == code
    assert not elsewhere.exists(), "a secret was left on the other host"
    assert far.code not in repr(far)
    without = near.for_others(make_pair())
    with pytest.raises(KeyFileError, match="exported without the code key"):
        code_of(without, elsewhere)
    own = code_key(elsewhere)  # as copied from a client
    assert code_of(without, elsewhere) == own


def test_a_running_brokers_join_file_means_the_code_key_beside_it(
    achilles_home: Path, tmp_path: Path
) -> None:
    write(achilles_home)
    code = code_key(achilles_home)
    path = join_path(achilles_home, "client")
    assert code_of(given_join(str(path), "client", None), tmp_path / "another home") == code


def test_a_damaged_code_key_in_a_join_file_is_refused(achilles_home: Path) -> None:
    write(achilles_home, code="short")
    with pytest.raises(KeyFileError, match="is damaged"):
        read_join(join_path(achilles_home, "client"))
