"""Attacks on one machine: other users, what processes show and leave, what tasks find."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from zmq.utils import z85

from achilles import DistributedExecutor
from achilles.errors import KeyFileError, TaskCrashedError
from achilles.net.keys import ROLES, code_key, find_join, join_path, key_pair, read_join
from tests import commands, tasks
from tests.modes import wait_until
from tests.security.attacks import ROOT, attack

NOBODY = 65534


@pytest.fixture
def cluster(achilles_home: Path) -> Iterator[tuple[commands.Command, commands.Command]]:
    """A broker and a worker that say all they can."""
    debug = (*commands.ACHILLES, "--log-level", "debug")
    bind = ("broker", "--bind", "tcp://127.0.0.1:0")
    with commands.Command((*debug, *bind), ready="look, and stop", environ={}) as broker:
        worker = (*debug, "worker", "--slots", "1")
        with commands.Command(worker, ready="stop it:", environ={}) as working:
            yield broker, working


# --- Who may come near ----------------------------------------------------------------------------

EMBEDDED = """
import json, psutil
from achilles import DistributedExecutor

def listening():
    found = []
    for process in (me, *me.children(recursive=True)):
        for one in process.net_connections("all"):
            if one.family.name != "AF_UNIX" and one.status == psutil.CONN_LISTEN:
                found.append(str(one.laddr))
            if one.family.name == "AF_UNIX" and one.laddr:
                found.append(one.laddr)
    return found

me = psutil.Process()
with DistributedExecutor(2) as executor:
    assert list(executor.map(abs, range(-9, 0))) == list(range(9, 0, -1))
    print(json.dumps(listening()))
"""


@attack("T5")
def test_an_embedded_executor_listens_nowhere() -> None:
    """Neither on a port nor on a socket with a name, in the file system or the abstract one."""
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED], capture_output=True, timeout=40, check=True
    )
    assert json.loads(done.stdout) == []


KNOCK = """
import os, socket, sys
user = int(sys.argv[2])
if user != os.getuid():
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
with socket.socket(socket.AF_UNIX) as knocker:
    knocker.settimeout(5)
    try:
        knocker.connect(sys.argv[1])
        knocker.sendall(b"\\xff" + bytes(8) + b"\\x7f\\3\\1" + b"NULL".ljust(20, b"\\0") + bytes(32))
        print("answered" if knocker.recv(1) else "closed")
    except OSError as error:
        print(type(error).__name__)
"""


def knock(path: str, user: int) -> str:
    """What a process of that user gets to see of the socket."""
    done = subprocess.run(
        [sys.executable, "-c", KNOCK, path, str(user)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def need_root(what: str) -> None:
    if os.getuid() != 0:
        pytest.skip(f"{what} takes root")


@attack("T6")
def test_another_user_does_not_reach_the_sockets(
    cluster: tuple[commands.Command, commands.Command], achilles_home: Path
) -> None:
    need_root("to be another user")
    join = find_join(achilles_home, "client", None)
    for address in (join.ipc, join.worker_ipc):
        path = address.removeprefix("ipc://")
        assert knock(path, os.getuid()) == "answered"
        assert knock(path, NOBODY) == "PermissionError"
        for folder in (achilles_home, achilles_home / "run"):  # somebody opens the folders
            folder.chmod(0o755)
        os.chmod(path, 0o777)
        assert knock(path, os.getuid()) == "answered"
        assert knock(path, NOBODY) in ("closed", "ConnectionResetError", "BrokenPipeError")
        for folder in (achilles_home, achilles_home / "run"):
            folder.chmod(0o700)


@attack("T7")
@pytest.mark.parametrize("kind", ["link to a folder", "file", "open folder", "socket"])
def test_what_somebody_put_in_place_is_refused(
    achilles_home: Path, tmp_path: Path, kind: str
) -> None:
    place = achilles_home / "run"
    with socket.socket(socket.AF_UNIX) as planted:
        if kind == "link to a folder":
            tmp_path.chmod(0o700)
            place.symlink_to(tmp_path)
        elif kind == "file":
            place.touch(mode=0o600)
        elif kind == "open folder":
            place.mkdir(mode=0o777)
            place.chmod(0o777)
        else:
            planted.bind(str(place))
        done = commands.run("broker", "--bind", "tcp://127.0.0.1:0")
    assert done.returncode == 78
    assert str(place) in done.stderr
    assert "chmod 700" in done.stderr or "a link or a file" in done.stderr
    assert not list(tmp_path.iterdir())


@attack("T7")
def test_a_socket_that_was_put_in_place_is_not_used(achilles_home: Path) -> None:
    """In the folder of the user alone it can only be left by an earlier broker: it is replaced,
    not joined.
    """
    (achilles_home / "run").mkdir(mode=0o700, parents=True)
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(achilles_home / "run" / "clients.ipc"))
        planted.listen()
        planted.setblocking(False)
        with commands.broker(), DistributedExecutor(address="auto") as executor:
            assert executor.status()["workers"] == 0
        with pytest.raises(BlockingIOError):
            planted.accept()


@attack("T8")
@pytest.mark.parametrize("role", ["broker", *ROLES])
def test_keys_of_somebody_else_are_refused(achilles_home: Path, role: str) -> None:
    need_root("to give a file to somebody else")
    key_pair(achilles_home, role)
    path = achilles_home / "keys" / f"{role}.key"
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(KeyFileError, match=f"belongs to user {NOBODY}.*chown"):
        key_pair(achilles_home, role)
    os.chown(path.parent, NOBODY, NOBODY)
    with pytest.raises(KeyFileError, match=r"keys belongs to user"):
        key_pair(achilles_home, role)


# --- What is shown --------------------------------------------------------------------------------


def secrets_of(home: Path) -> set[str]:
    """Every secret of a home, in each form in which it could be shown."""
    found = {key_pair(home, role).secret.decode() for role in ("broker", *ROLES)}
    code = code_key(home)
    found |= {code.hex(), z85.encode(code).decode(), base64.b64encode(code).decode()}
    return found | {repr(code)[2:-1], repr(code)[12:-1]}


@attack("T9", "T27")
def test_secrets_are_in_no_argument_environment_or_log(
    cluster: tuple[commands.Command, commands.Command], achilles_home: Path
) -> None:
    """Of broker, worker, client and runners, at the level of most detail,
    while a task runs and after errors.
    """
    broker, worker = cluster
    secrets = secrets_of(achilles_home)
    seen: list[str] = []
    with DistributedExecutor(address="auto") as executor:
        runner = executor.submit(os.getpid).result(20)
        for pid in (broker.process.pid, broker.serving().pid, worker.process.pid, runner):
            process = psutil.Process(pid)
            seen += [*process.cmdline(), *process.environ().values()]
        with pytest.raises(ZeroDivisionError) as caught:
            executor.submit(lambda: 1 / 0).result(20)
        seen.append(repr(caught.value.__cause__))
        seen.append(json.dumps(executor.status()))
    path = join_path(achilles_home, "worker")
    join = read_join(path)
    seen += [repr(one) for one in (join, join.keys, key_pair(achilles_home, "worker"))]
    seen += [str(one) for one in (join, join.keys, key_pair(achilles_home, "worker"))]
    path.write_bytes(path.read_bytes()[:-20])  # damaged: the error must not quote it
    failed = commands.run("worker")
    assert failed.returncode == 78
    seen += [failed.stdout, failed.stderr]
    for command in (["status"], ["status", "-o", "json"], ["keys", "list"], ["config", "show"]):
        done = commands.run("--log-level", "debug", *command)
        seen += [done.stdout, done.stderr]
    assert worker.stop() == 0
    assert broker.stop() == 0
    seen += [worker.said, worker.output, broker.said, broker.output]
    text = "\n".join(seen)
    assert len(text) > 1000
    assert not [secret for secret in secrets if secret in text]


# --- What tasks do --------------------------------------------------------------------------------


@attack("T31")
def test_a_task_inherits_no_key_and_no_socket(
    cluster: tuple[commands.Command, commands.Command], achilles_home: Path
) -> None:
    """What it may read as the worker's user is documented;
    a host that joined by stdin has no file with a key.
    """
    with DistributedExecutor(address="auto") as executor:
        environ, arguments, descriptors = executor.submit(tasks.surroundings).result(20)
    shown = "\n".join([*environ, *arguments])
    assert not [secret for secret in secrets_of(achilles_home) if secret in shown]
    assert not [one for one in descriptors if str(achilles_home) in one]
    worker = psutil.Process(cluster[1].process.pid)
    theirs = {os.readlink(f"/proc/{worker.pid}/fd/{one.fd}") for one in worker.net_connections()}
    assert not theirs & set(descriptors), "a socket of the worker's"
    text = " ".join((ROOT / "SECURITY.md").read_text("utf-8").split())
    assert "may read what that user may read, the worker's key" in text


@attack("T30")
def test_what_a_task_leaves_behind_ends_with_its_runner(
    cluster: tuple[commands.Command, commands.Command], tmp_path: Path
) -> None:
    """Children that ignore signals, descriptors that it closed, output without end;
    the worker goes on.
    """
    worker = psutil.Process(cluster[1].process.pid)
    with DistributedExecutor(address="auto") as executor:
        child = executor.submit(tasks.leave_a_stubborn_child).result(20)
        assert psutil.pid_exists(child)
        with pytest.raises(TaskCrashedError):
            executor.submit(tasks.close_all).result(30)
        wait_until(lambda: not _lives(child), "the child ends with its runner")
        before = worker.memory_info().rss
        executor.submit(tasks.flood, 16 << 20).result(30)
        assert worker.memory_info().rss - before < 8 << 20
        assert executor.submit(tasks.add, 1).result(20) == 2
    assert cluster[1].process.poll() is None


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


FORK = """
import json, os, secrets, sys
from achilles.net.keys import make_pair
from achilles.core import protocol as p
from achilles.net.broker import secrets as tokens
from tests.brokers import hello

def draw():
    return [make_pair().secret.decode() for _ in range(20)] + [
        tokens.token_bytes(16).hex() for _ in range(20)] + [hello("client").incarnation.hex()]

draw()
values = []
for _ in range(4):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write_end, json.dumps(draw()).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        values += json.loads(file.read())
    os.waitpid(pid, 0)
values += draw()
print(json.dumps(values))
"""


@attack("T37")
def test_nothing_that_is_drawn_repeats_after_a_fork() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, timeout=40, check=True, cwd=ROOT
    )
    values = json.loads(done.stdout)
    assert len(values) == len(set(values)) == 5 * 41


@attack("T37")
def test_what_must_not_be_guessed_is_not_drawn_at_random() -> None:
    """`random` can be predicted from what it drew before; it is for pauses alone."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "achilles").rglob("*.py")
        if "import random" in path.read_text("utf-8")
    }
    assert users == {"achilles/net/peer.py"}
    text = (ROOT / "achilles/net/peer.py").read_text("utf-8")
    assert text.count("random.") == text.count("random.uniform(0.5, 1.0)") == 1
