"""Other hosts join with a key of their own, and lose what it gave when it is revoked: over TCP,
on real processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from achilles import DistributedExecutor
from achilles.errors import AchillesError, KeyFileError
from tests import tasks
from tests.modes import wait_until
from tests.security.attacks import attack

BOUND = 30.0


@pytest.fixture
def far_home() -> Iterator[Path]:
    """What stands for another host: a home without any key."""
    home = Path(tempfile.mkdtemp(prefix="ach-far-"))
    yield home
    shutil.rmtree(home)


class Site:
    """A broker that can be reached from elsewhere, and commands of its user."""

    def __init__(self, home: Path) -> None:
        self.environ = {**os.environ, "ACHILLES_HOME": str(home)}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = _free_ports()

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.run(
            [sys.executable, "-m", "achilles", *arguments],
            env=self.environ,
            timeout=BOUND,
            check=False,
            text=True,
            **options,
        )

    def start(
        self, *arguments: str, environ: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "achilles", *arguments],
            env=environ or self.environ,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def export(self, role: str, name: str) -> str:
        done = self.command("keys", "export", role, "--name", name)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def workers(self) -> list[str]:
        done = self.command("status", "-o", "json")
        return [*json.loads(done.stdout)["workers_by_name"]] if done.returncode == 0 else []


def _free_ports() -> int:
    """The first of two neighbours that nobody has now."""
    while True:
        with socket.create_server(("0.0.0.0", 0)) as one, contextlib.suppress(OSError):
            port: int = one.getsockname()[1]
            socket.create_server(("0.0.0.0", port + 1)).close()
            return port


def _serve(site: Site, ready: Path) -> None:
    """Start the broker; anew, on other ports, if somebody was faster to take one of them."""
    options = ("--advertise", "127.0.0.1", "--no-ipc")
    broker = site.start("broker", "--bind", f"tcp://0.0.0.0:{site.port}", *options)
    wait_until(lambda: ready.exists() or broker.poll() is not None, "the broker is up")
    if broker.poll() is not None:
        broker.communicate()
        site.processes.remove(broker)
        site.port = _free_ports()
        _serve(site, ready)


@pytest.fixture
def site(achilles_home: Path) -> Iterator[Site]:
    site = Site(achilles_home)
    try:
        _serve(site, achilles_home / "run" / "admin.join")
        yield site
    finally:
        for process in reversed(site.processes):
            process.terminate()
            process.communicate(timeout=BOUND)


def join(site: Site, name: str, exported: str, far_home: Path) -> subprocess.Popen[bytes]:
    """A worker of the other host, which gets its join file on stdin."""
    environ = {**site.environ, "ACHILLES_HOME": str(far_home)}
    worker = site.start("worker", "--join", "-", "--name", name, "--slots", "1", environ=environ)
    assert worker.stdin is not None
    worker.stdin.write(exported.encode())
    worker.stdin.close()
    worker.stdin = None
    wait_until(lambda: name in site.workers(), f"{name} joins")
    return worker


def far_client(
    monkeypatch: pytest.MonkeyPatch, home: Path, exported: str, **options: Any
) -> DistributedExecutor:
    """An executor of the other host."""
    file = home / "client.join"
    file.touch(mode=0o600)
    file.write_text(exported)
    monkeypatch.setenv("ACHILLES_HOME", str(home))
    monkeypatch.setenv("ACHILLES_JOIN", str(file))
    return DistributedExecutor(**options)


@attack("T9", "T31", "T32")
@pytest.mark.bad_input(47)
def test_another_host_joins_and_is_revoked(
    site: Site, far_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session ends within a second, its task runs elsewhere uncharged,
    and its key opens nothing any more.
    """
    exported = site.export("worker", "node7")
    node7 = join(site, "node7", exported, far_home)
    assert not list(far_home.iterdir()), "a secret was left on the other host"
    secrets = [json.loads(exported)[name] for name in ("secret", "code")]
    for process in psutil.Process().children(recursive=True):
        told = " ".join([*process.cmdline(), *process.environ().values()])
        assert not [secret for secret in secrets if secret in told]
    with far_client(monkeypatch, far_home, site.export("client", "laptop")) as executor:
        log = tmp_path / "log"
        future = executor.submit(tasks.note_unless_there, str(log), str(tmp_path / "go"))
        wait_until(lambda: log.exists() and log.read_text(), "the task runs")
        node8 = join(site, "node8", site.export("worker", "node8"), far_home)
        done = site.command("keys", "revoke", "node7")
        assert "the running broker cut 1 session" in done.stdout
        assert node7.wait(BOUND) != 0
        assert site.workers() == ["node8"]
        (tmp_path / "go").touch()
        assert future.result(BOUND) == 2  # it began on the first worker, too
        assert executor.status()["reassigned"] == 1
        again = site.command("worker", "--join", "-", input=exported)
        assert again.returncode == 69
        assert "refused this key" in again.stderr
        site.command("keys", "revoke", "laptop")
        with pytest.raises(AchillesError):
            executor.submit(tasks.add, 1).result(BOUND)
    assert node8.poll() is None


def test_a_key_is_good_for_its_role(
    site: Site, far_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's join file makes no client, whatever is written into it."""
    exported = site.export("worker", "node7")
    with pytest.raises(KeyFileError, match="is for a worker, and this is a client"):
        far_client(monkeypatch, far_home, exported)
    with pytest.raises(AchillesError, match="refused"):
        far_client(monkeypatch, far_home, exported.replace('"role":"worker"', '"role":"client"'))


@attack("T9")
def test_secrets_are_not_shown_on_a_terminal(site: Site) -> None:
    near, far = os.openpty()
    done = site.command(
        "keys", "export", "worker", capture_output=False, stdout=far, stderr=subprocess.PIPE
    )
    os.close(far)
    os.close(near)
    assert done.returncode == 2
    assert "prints a secret, and stdout is a terminal" in done.stderr


@attack("T4")
@pytest.mark.bad_input(48)
def test_beyond_loopback_without_keys_nothing_is_bound(achilles_home: Path) -> None:
    """Keys that are loose protect nothing: exit 2, before any socket is there."""
    site = Site(achilles_home)
    site.command("keys", "list")
    key = achilles_home / "keys" / "client.key"
    key.chmod(0o644)
    done = site.command("broker", "--bind", f"tcp://0.0.0.0:{site.port}")
    assert done.returncode == 2
    assert "can be reached from other machines" in done.stderr
    assert f"chmod 600 {key}" in done.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", site.port)) != 0


@attack("T32")
def test_rotation_cuts_who_used_the_old_key(site: Site, achilles_home: Path) -> None:
    own = site.start("worker", "--name", "own", "--slots", "1")
    wait_until(lambda: "own" in site.workers(), "it joins")
    done = site.command("keys", "rotate", "worker")
    assert "the running broker cut 1 session" in done.stdout
    assert own.wait(BOUND) != 0
    site.start("worker", "--name", "anew", "--slots", "1")
    wait_until(lambda: "anew" in site.workers(), "the new key is good")
