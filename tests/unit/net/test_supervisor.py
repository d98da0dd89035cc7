"""The parent of the process that serves, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from achilles.net.supervisor import EX_SOFTWARE
from tests import commands
from tests.modes import wait_until


def serving(broker: commands.Command) -> psutil.Process:
    """The process that serves."""
    (process,) = psutil.Process(broker.process.pid).children()
    return process


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def kill(process: psutil.Process) -> None:
    """Kill it, and wait until its parent has seen that."""
    process.kill()
    psutil.wait_procs([process], commands.WAIT_SECONDS)


def answer(*arguments: str) -> str:
    """What a command says that succeeds, perhaps not at once: the broker may be on its way."""
    said: list[str] = []

    def succeeds() -> bool:
        done = commands.run(*arguments)
        said.append(done.stdout + done.stderr)
        return done.returncode == 0

    wait_until(succeeds, f"achilles {arguments[0]} succeeds", 2 * commands.WAIT_SECONDS)
    return said[-1]


def test_another_process_serves_at_the_same_place(achilles_home: Path) -> None:
    def joins() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (achilles_home / "run").glob("*.join")}

    with commands.broker("--print-address") as broker, commands.worker() as worker:
        before = joins()
        assert len(before) == 3
        first = serving(broker)
        kill(first)
        wait_until(lambda: psutil.Process(broker.process.pid).children(), "another one serves")
        assert serving(broker) != first
        said = answer("status")
        assert joins() == before
        wait_until(lambda: "1 worker, 1 slot" in answer("status"), "the worker is back")
        assert said.startswith(f"broker {broker.said.split()[4]}")
        assert broker.stop() == 0
        assert worker.wait() == 0
    assert f"(pid {first.pid}) was killed by SIGKILL; another one takes its place" in broker.said
    assert len(broker.output.splitlines()) == 1  # the address once
    assert not list((achilles_home / "run").iterdir())


def test_too_many_crashes_end_it_with_an_error() -> None:
    with commands.broker(ACHILLES_BROKER_RESTARTS="1") as broker:
        kill(serving(broker))
        wait_until(lambda: psutil.Process(broker.process.pid).children(), "another one serves")
        answer("status")
        kill(serving(broker))
        assert broker.wait() == EX_SOFTWARE
    assert "and 1 before it within 60 s; giving up" in broker.said


def test_it_does_not_outlive_its_parent() -> None:
    with commands.broker() as broker:
        process = serving(broker)
        broker.process.kill()
        wait_until(lambda: not is_alive(process), "it has ended, too")
        with commands.broker() as another:  # where the first one was, if need be
            assert another.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both(number: signal.Signals) -> None:
    with commands.broker() as broker:
        process = serving(broker)
        assert broker.stop(number) == 0
        assert not psutil.pid_exists(process.pid)
    assert "takes its place" not in broker.said


def test_what_does_not_end_is_ended() -> None:
    """A process that hangs when it is asked to end."""
    program = (
        "import achilles.net.supervisor as s, signal, sys, time\n"
        "from achilles.cli.settings import StopRequests\n"
        "s.STOP_SECONDS = 0.2\n"
        "serving = s.Supervisor(StopRequests(), print).start()\n"
        "serving.is_ready(1)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    assert _ends(program, signal.SIGTERM) == 128 + signal.SIGKILL


def test_a_process_that_never_listened_is_not_started_again() -> None:
    program = (
        "import achilles.net.supervisor as s, os, sys\n"
        "from achilles.cli.settings import StopRequests\n"
        "s.Supervisor(StopRequests(), print).start()\n"
        "print('ready', flush=True)\n"
        "os._exit(7)\n"
    )
    assert _ends(program, None) == 7


def test_what_the_next_process_is_told() -> None:
    """Where the last one listened, and which workers it had."""
    program = (
        "import achilles.net.supervisor as s, os, signal\n"
        "from achilles.cli.settings import StopRequests\n"
        "serving = s.Supervisor(StopRequests(), print).start()\n"
        "print('ready' if serving.is_first else '', serving.port, serving.workers and sorted(serving.workers), flush=True)\n"
        "if serving.is_first:\n"
        "    serving.has_workers({1, 2, 3}, set())\n"
        "    serving.is_ready(4711)\n"
        "    serving.has_workers({1 << 62}, {1})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True
    )
    first, crash, second = done.stdout.splitlines()
    assert first == "ready 0 None"
    assert "was killed by SIGKILL" in crash
    assert second == f" 4711 [2, 3, {1 << 62}]"


def _ends(program: str, number: signal.Signals | None) -> int:
    """How a parent ends after the program has said that it is ready."""
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environ
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if number is not None:
                process.send_signal(number)
            return process.wait(20)
        finally:
            process.kill()
