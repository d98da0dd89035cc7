"""What machines get wrong: libraries, names, clocks, disks."""

from __future__ import annotations

import ast
import errno
import importlib.util
import operator
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zmq

import achilles
from achilles.core import protocol as p
from achilles.errors import BrokerUnreachableError, ConfigError, KeyFileError, ProtocolError
from achilles.net import endpoint, private
from achilles.net.endpoint import CurveKeys, dial_dealer, parse_endpoint
from tests import commands, tasks
from tests.modes import EMBEDDED, Maker, of_modes, wait_until

PACKAGE = Path(achilles.__file__).parent


@pytest.mark.bad_input(41)
@pytest.mark.skipif(psutil.virtual_memory().available < 8 << 30, reason="it takes 6 GiB of memory")
@of_modes(EMBEDDED)
def test_an_argument_of_two_gib_and_a_byte(make: Maker) -> None:
    data = bytearray((1 << 31) + 1)
    data[0], data[-1] = 7, 9
    with make(1) as executor:
        future = executor.submit(operator.itemgetter(0, 1 << 31), bytes(data))
        assert future.result(timeout=50) == (7, 9)


@pytest.mark.bad_input(77)
def test_a_python_without_the_gil_is_refused() -> None:
    program = "import sys; sys._is_gil_enabled = lambda: False; import achilles"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: achilles needs the GIL, which is off in this Python: "
        "start it with PYTHON_GIL=1, or use the ordinary build"
    )


@pytest.mark.bad_input(77)
def test_a_subinterpreter_is_refused() -> None:
    """By Python, or by a library of ours: no program waits for anything there."""
    program = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
end = interpreters.run_string(
    interpreters.create(),
    "from achilles import DistributedExecutor; print(DistributedExecutor(1).submit(abs, -3).result())",
)
raise SystemExit(str(end))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "subinterpreter" in done.stderr


@pytest.mark.bad_input(44)
def test_a_host_that_nobody_knows() -> None:
    public, secret = zmq.curve_keypair()
    name = "x" * 64 + ".invalid"  # too long a label for any name server to be asked
    place = parse_endpoint(f"tcp://{name}:5555")
    with zmq.Context() as context:
        dialed = dial_dealer(context, place, CurveKeys(public, secret, public))
        problems: list[BrokerUnreachableError | None] = []

        def look() -> bool:
            problems.extend(event.problem for event in dialed.watch.poll())
            return bool(problems)

        try:
            wait_until(look, "a word about it")
        finally:
            dialed.watch.close()
            dialed.socket.close(0)
    assert str(problems[0]) == (
        f"no achilles broker answers at {place} (nothing listens there, or {name!r} is the name of no host); "
        "start one with: achilles broker"
    )


@pytest.mark.bad_input(49)
@pytest.mark.parametrize(
    ("has_curve", "version", "wanted"),
    [
        (False, (4, 3, 5), "achilles needs ZeroMQ 4.3.5 or later with CURVE, .* without it; "),
        (True, (4, 3, 4), "achilles needs ZeroMQ 4.3.5 or later with CURVE, and this is "),
    ],
)
def test_a_zeromq_that_will_not_do(
    monkeypatch: pytest.MonkeyPatch, has_curve: bool, version: tuple[int, int, int], wanted: str
) -> None:
    monkeypatch.setattr(zmq, "has", lambda name: has_curve)
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: version)
    spec = importlib.util.spec_from_file_location("another_endpoint", endpoint.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ConfigError, match=wanted + ".*install it with: pip install 'pyzmq>=27'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.bad_input(56)
def test_another_version_of_the_protocol() -> None:
    [frame] = p.encode(p.Header(p.NO_TOKEN, 0, 0), p.Heartbeat())
    data = bytearray(frame)
    data[data.index(p.VERSION)] = p.VERSION + 1
    with pytest.raises(ProtocolError, match=r"^protocol version 2; this side speaks 1$"):
        p.decode([bytes(data)])


# --- Clocks ---------------------------------------------------------------------------------------


@pytest.mark.bad_input(57)
def test_nobody_looks_at_the_wall_clock() -> None:
    """But for the day on which a key was made, and the time in a line of the log,
    which logging adds.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                found += [f"{path.name}: {a.name}" for a in node.names if a.name in WALL]
            elif isinstance(node, ast.Attribute) and node.attr in WALL | {"now", "today"}:
                if ast.unparse(node.value).split(".")[0] in ("time", "datetime"):
                    found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == ["authorized.py: datetime.datetime.now"]


WALL = {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "asctime"}


@pytest.mark.bad_input(57)
@of_modes(EMBEDDED)
def test_a_clock_that_jumps(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    real, year = time.time, 365 * 86400.0
    jumps = iter(range(1 << 60))
    monkeypatch.setattr(time, "time", lambda: real() + year * (next(jumps) % 3 - 1))
    executor = make(2)
    assert executor.with_options(timeout=20).submit(tasks.pause, 0.05, 1).result(20) == 1
    assert list(executor.map(tasks.add, range(100), timeout=20)) == list(range(1, 101))
    assert executor.status()["reassigned"] == 0


# --- Disks ----------------------------------------------------------------------------------------


@pytest.mark.bad_input(59)
def test_a_full_disk_leaves_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*names: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("link", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(KeyFileError) as caught:
                private.write_private(tmp_path / "key", b"x", replace=call == "replace")
        assert str(caught.value) == f"cannot write {tmp_path / 'key'}: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input(59)
def test_a_broker_that_cannot_write_its_keys(achilles_home: Path) -> None:
    """A limit of the size of files does what a full disk does, at the first byte."""
    done = subprocess.run(
        [*commands.ACHILLES, "broker", "--bind", "tcp://127.0.0.1:0"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=commands.WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.startswith(f"achilles: cannot write {achilles_home}")
    assert done.stderr.endswith(": File too large\n")
    assert done.stderr.count("\n") == 1
    left = [path.name for path in achilles_home.rglob("*") if path.is_file()]
    assert not [name for name in left if "key" in name or "join" in name], left


@pytest.mark.bad_input(59)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_that_cannot_be_written(achilles_home: Path) -> None:
    """The broker serves on."""
    with open("/dev/full", "w") as full:
        broker = subprocess.Popen(
            [*commands.ACHILLES, "--log-level", "debug", "broker", "--bind", "tcp://127.0.0.1:0"],
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # what cannot be said stays in a buffer
            stdin=subprocess.DEVNULL,
            stderr=full,
            text=True,
        )
    try:
        joins = achilles_home / "run"
        wait_until(lambda: list(joins.glob("admin*.join")), "its join files")
        status = commands.run("status")
        assert status.returncode == 0, status.stderr
        assert broker.poll() is None
        assert commands.run("shutdown", "--yes").returncode == 0
        assert broker.wait(commands.WAIT_SECONDS) in (0, 120), "120: what was to be said is lost"
        assert not list(joins.iterdir())  # and no other process has taken its place
    finally:
        if broker.poll() is None:
            broker.kill()
        broker.wait(commands.WAIT_SECONDS)


@pytest.mark.bad_input(59)
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of others are Linux's")
def test_a_broker_that_dies_while_the_disk_is_full(achilles_home: Path) -> None:
    """Another process serves at the same place: for that, nothing has to be written."""
    with open("/dev/full", "w") as full:
        broker = subprocess.Popen(
            [*commands.ACHILLES, "broker", "--bind", "tcp://127.0.0.1:0"],
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # what cannot be said stays in a buffer
            stdin=subprocess.DEVNULL,
            stderr=full,
            text=True,
        )
    try:
        wait_until(lambda: commands.run("status").returncode == 0, "it serves")
        resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (0, 0))
        (first,) = psutil.Process(broker.pid).children()
        first.kill()
        psutil.wait_procs([first], commands.WAIT_SECONDS)
        wait_until(lambda: commands.run("status").returncode == 0, "another one serves")
        assert psutil.Process(broker.pid).children() != [first]
        assert commands.run("shutdown", "--yes").returncode == 0
        assert broker.wait(commands.WAIT_SECONDS) in (0, 120), "120: what was to be said is lost"
        assert not list((achilles_home / "run").iterdir())
    finally:
        if broker.poll() is None:
            broker.kill()
        broker.wait(commands.WAIT_SECONDS)


@pytest.mark.bad_input(59)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_table_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "achilles", "config", "show"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=commands.WAIT_SECONDS,
            check=False,
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
