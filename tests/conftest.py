"""Rules that every test is held to: a home of its own, and no process that outlives it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# Under nohup, or in a shell's background, these are ignored,
# by all whom the tests start as well; some are about them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
END_SECONDS = 10.0  # for what a test started to end by itself, on a busy machine

# Helpers of the standard library's multiprocessing that live as long as their program, by design.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.fixture(autouse=True)
def achilles_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new `$ACHILLES_HOME`, with a path short enough for ipc sockets;
    no other setting is inherited.
    """
    for name in list(os.environ):
        if name.startswith("ACHILLES_"):
            monkeypatch.delenv(name)
    home = Path(tempfile.mkdtemp(prefix="ach-"))
    monkeypatch.setenv("ACHILLES_HOME", str(home))
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Iterator[None]:
    """A command that ran in this process must not have later tests' children ignore SIGTERM."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_process_survives(request: pytest.FixtureRequest, achilles_home: Path) -> Iterator[None]:
    """Fail the test that leaves a process behind, orphans of a killed parent included;
    end what it left.
    """
    before = set(psutil.pids())
    yield
    if request.node.get_closest_marker("shared_executor") is None:
        _check_survivors(before, str(achilles_home))


@pytest.fixture(autouse=True, scope="session")
def _no_process_survives_all_tests() -> Iterator[None]:
    before = set(psutil.pids())
    yield
    _check_survivors(before, None)


def _check_survivors(before: set[int], home: str | None) -> None:
    deadline = time.monotonic() + END_SECONDS
    pause = 0.002
    while left := _survivors(before, home):
        if time.monotonic() > deadline:
            described = [_describe(process) for process in left]
            for process in left:
                try:
                    process.kill()
                    process.wait(5)
                except psutil.Error:
                    pass  # ended meanwhile, or is not ours to wait for
            pytest.fail(
                "processes outlived their test:\n  " + "\n  ".join(described), pytrace=False
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


def _survivors(before: set[int], home: str | None) -> list[psutil.Process]:
    """New processes of this test: its descendants,
    and orphans that carry its home in their environment.
    """
    survivors = []
    for pid in set(psutil.pids()) - before:
        try:
            process = psutil.Process(pid)
            if _descends_from_test(process, before):
                is_ours = not _is_helper(process)
            else:
                is_ours = home is not None and process.environ().get("ACHILLES_HOME") == home
        except psutil.Error:
            continue  # ended while we looked, or belongs to somebody else
        if is_ours:
            survivors.append(process)
    return survivors


def _is_helper(process: psutil.Process) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False  # and has no command line any more
    return any(helper in " ".join(process.cmdline()) for helper in HELPERS)


def _descends_from_test(process: psutil.Process, before: set[int]) -> bool:
    """Whether it comes from this process, and not through one that was there before the test."""
    for parent in process.parents():
        if parent.pid == os.getpid():
            return True
        if parent.pid in before:
            return False
    return False


def _describe(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return f"{process.pid}: {process.name()}, which has ended, but nobody waited for it"
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid}: has just ended"
