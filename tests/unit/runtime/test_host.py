"""`RunnerHost` with real runners: several at once, those that cannot be started,
and the end of them all.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from achilles.core.protocol import (
    Execute,
    Kill,
    Load,
    Recall,
    Retire,
    RunnerDone,
    Spawn,
    Unload,
)
from achilles.runtime import process as process_module
from tests.descriptors import open_descriptors, wait_until_closed
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import BOUND, Driver, Gate, await_end, driving

PRESENT = [*range(1, 6)]


def test_what_a_chunk_has_left_in_two_pipes_is_told_at_once(driver: Driver, gate: Gate) -> None:
    """All results but the last lie where they wake nobody;
    they are not worth a message of their own.
    """
    driver.execute(1, driver.load(tasks.add), *((n,) for n in range(20)))
    driver.execute(2, driver.load(tasks.wait_at), (gate.path,))
    deadline = time.monotonic() + BOUND
    while not gate.is_reached():  # the first chunk has ended, and nobody has looked yet
        assert time.monotonic() < deadline
        time.sleep(0.001)
    driver.loop.wait(BOUND)
    (done,) = driver.host.collect()
    assert isinstance(done, RunnerDone)
    assert sorted(index for seq, index, *_ in done.results) == [*range(20)]
    gate.open()
    assert driver.outcome(2) == "open"


def test_two_runners_work_at_once(driver: Driver, gate: Gate) -> None:
    driver.spawn(2)
    driver.execute(1, driver.load(tasks.wait_at), (gate.path,))
    driver.until(gate.is_reached)
    assert driver.run(tasks.add, 1, runner=2) == 1
    gate.open()
    assert driver.outcome(1) == "open"


def test_an_idle_host_need_not_be_woken(driver: Driver) -> None:
    driver.run(tasks.add, 1)
    assert driver.host.next_deadline(0.0) is None
    assert repr(driver.host) == "<RunnerHost 1 runners, 0 dying>"


def test_commands_to_unknown_runners_do_nothing(driver: Driver) -> None:
    driver.apply(
        Recall(9),
        Kill(9),
        Retire(9),
        Load(9, 1, 1, b""),
        Unload(9, 1, []),
        Execute(9, 1, 1, 1, 0, []),
    )
    assert driver.recalled == []


@pytest.mark.bad_input(61)
def test_a_runner_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with driving() as driver:
        before = open_descriptors()
        monkeypatch.setattr(process_module, "_popen", fail)
        driver.apply(Spawn(1))
        reason = driver.died[1].reason
        assert reason.startswith("could not be started: ")
        assert "Resource temporarily unavailable (the limit of processes, ulimit -u: " in reason
        wait_until_closed(before)


def test_close_ends_idle_and_busy_runners_and_frees_all(tmp_path: Path) -> None:
    before = open_descriptors()
    driver = Driver()
    pids = [driver.spawn(runner) for runner in PRESENT]
    driver.run(tasks.add, 1)
    driver.execute(1, driver.load(tasks.spin_noted), (str(tmp_path / "log"),))
    driver.until((tmp_path / "log").exists)
    started = time.monotonic()
    driver.close()
    assert time.monotonic() - started < 5.0, "an idle runner did not exit by itself"
    assert not any(psutil.pid_exists(pid) for pid in pids)
    wait_until_closed(before)


def test_close_kills_a_runner_that_does_not_exit(tmp_path: Path) -> None:
    driver = Driver()
    driver.spawn()
    driver.run(_hang_at_exit)
    driver.host.close(timeout=0.2)
    driver.loop.close()


def _hang_at_exit() -> None:
    import atexit

    from tests.unit.runtime import tasks

    atexit.register(tasks.spin)


@pytest.mark.parametrize("is_forked", [False, True], ids=["killed", "killed, but its fork lives"])
def test_a_runner_does_not_outlive_its_host(tmp_path: Path, is_forked: bool) -> None:
    script = f"""
        import os, pathlib, time
        from tests.unit.runtime import tasks
        from tests.unit.runtime.driver import Driver, await_end
        driver = Driver()
        pid = driver.spawn()
        log = {str(tmp_path / "log")!r}
        driver.execute(1, driver.load(tasks.spin_noted), (log,))
        driver.until(pathlib.Path(log).exists)
        fork = os.fork() if {is_forked} else -1
        if fork == 0:
            time.sleep(60)
            os._exit(0)
        print(pid, fork, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        runner, fork = map(int, process.stdout.readline().split())
        try:
            process.kill()
            await_end(runner)
        finally:
            if is_forked:
                os.kill(fork, signal.SIGKILL)
