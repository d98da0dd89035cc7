"""What user code does to itself: each such task fails alone, says what befell it,
and its neighbours do not notice.
"""

from __future__ import annotations

import multiprocessing.reduction
import os
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from achilles.errors import ArgumentPickleError, ResultPickleError, TaskCrashedError
from tests import tasks
from tests.modes import CLUSTER, EMBEDDED, OURS, Maker, of_modes, wait_until

RESULT_SECONDS = 30


class Reducing:
    """Comes back as what ``function`` returns, which is called where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class DyingResult:
    """Ends the process that pickles it."""

    def __reduce__(self) -> Any:
        os._exit(7)


def make_dying_result() -> DyingResult:
    return DyingResult()


def raise_bare(kind: type[BaseException]) -> None:
    raise kind


# --- Arguments and results ------------------------------------------------------------------------


@pytest.mark.bad_input(2)
@of_modes(CLUSTER)
def test_a_socket_is_no_argument_on_a_cluster(make: Maker) -> None:
    with socket.socket() as one:
        error = make(1).submit(tasks.echo, one).exception(RESULT_SECONDS)
    assert type(error) is ArgumentPickleError
    assert str(error).startswith(
        "argument 1 ('value') of echo() cannot be pickled: a socket is of the machine"
    )
    assert "(it is of type socket); nothing was sent" in str(error)


def make_pipe() -> Any:
    return multiprocessing.Pipe()


def make_socket() -> Any:
    return socket.socket()


@pytest.mark.bad_input(8)
@of_modes(CLUSTER)
@pytest.mark.parametrize(
    ("make_result", "kind"), [(make_pipe, "Connection"), (make_socket, "socket")]
)
def test_a_socket_or_connection_is_no_result_on_a_cluster(
    make: Maker, make_result: Any, kind: str
) -> None:
    error = make(1).submit(make_result).exception(RESULT_SECONDS)
    assert type(error) is ResultPickleError
    assert f"cannot be pickled: a {kind} is of the machine" in str(error)


@pytest.mark.bad_input(6, 69)
@of_modes(EMBEDDED)
def test_a_module_that_is_not_there(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has it; its runners, whose path was set before, do not."""
    executor = make(1)
    assert executor.submit(tasks.add, 1).result(RESULT_SECONDS) == 2
    (tmp_path / "not_there.py").write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import not_there  # type: ignore[import-not-found]

    error = executor.submit(not_there.f).exception(RESULT_SECONDS)
    assert type(error) is ModuleNotFoundError
    assert str(error).startswith(
        "module 'not_there' cannot be imported in a runner of this executor "
    )
    assert f"Python {sys.version.split()[0]}, {sys.executable}" in str(error)
    assert executor.submit(tasks.add, 2).result(RESULT_SECONDS) == 3, "the runner lives"


@pytest.mark.bad_input(7)
@of_modes(*OURS)
def test_arguments_that_end_who_unpickles_them(make: Maker) -> None:
    executor = make(2)
    exits = executor.submit(tasks.echo, Reducing(sys.exit, 3))
    dies = executor.submit(tasks.echo, Reducing(os._exit, 9))
    assert list(executor.map(tasks.add, range(20))) == list(range(1, 21))
    error = exits.exception(RESULT_SECONDS)
    assert type(error) is SystemExit
    assert error.code == 3
    error = dies.exception(RESULT_SECONDS)
    assert type(error) is TaskCrashedError
    assert str(error).startswith("echo() (task ")
    assert str(error).count("its runner exited with code 9 on worker ") == 3


@pytest.mark.bad_input(9)
@of_modes(*OURS)
def test_a_result_that_ends_who_pickles_it(make: Maker) -> None:
    executor = make(2)
    dies = executor.submit(make_dying_result)
    assert list(executor.map(tasks.add, range(20))) == list(range(1, 21))
    error = dies.exception(RESULT_SECONDS)
    assert type(error) is TaskCrashedError
    assert "make_dying_result() (task " in str(error)
    assert str(error).count("its runner exited with code 7") == 3
    assert "ended the process that ran it too often; the executor goes on without it" in str(error)


# --- Ends -----------------------------------------------------------------------------------------


@pytest.mark.bad_input(15)
@of_modes(*OURS)
def test_whatever_is_raised_is_an_outcome(make: Maker) -> None:
    executor = make(1)
    first = executor.submit(tasks.pid).result(RESULT_SECONDS)
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, BaseException):
        error = executor.submit(raise_bare, kind).exception(RESULT_SECONDS)
        assert type(error) is kind
        assert "in raise_bare" in str(error.__cause__), "the remote traceback"
    if make.mode == EMBEDDED:
        assert executor.submit(tasks.pid).result(RESULT_SECONDS) == first, "the runner lives"


@pytest.mark.bad_input(17)
@of_modes(EMBEDDED)
def test_signals_are_named(make: Maker) -> None:
    executor = make(2)
    for number in (signal.SIGABRT, signal.SIGILL, signal.SIGBUS):
        error = executor.submit(_kill_oneself, number).exception(RESULT_SECONDS)
        assert type(error) is TaskCrashedError
        assert str(error).count(f"its runner was killed by {number.name} on worker local") == 3
    assert executor.submit(tasks.add, 1).result(RESULT_SECONDS) == 2


def _kill_oneself(number: int) -> None:
    os.kill(os.getpid(), number)


# --- What it leaves behind ------------------------------------------------------------------------


@pytest.mark.bad_input(24)
@of_modes(EMBEDDED)
def test_threads_of_a_task_end_with_their_runner(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(1)
    pid = executor.submit(_start_threads, str(path)).result(RESULT_SECONDS)
    wait_until(lambda: len(tasks.notes(path)) > 2, "the thread runs on after its task")
    assert executor.submit(tasks.pid).result(RESULT_SECONDS) == pid, "and holds up nobody"
    executor.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _start_threads(path: str) -> int:
    def note() -> None:
        while True:
            tasks.note_and_pause(path, "alive", 0.01)

    threading.Thread(target=note, daemon=True).start()
    return os.getpid()


@pytest.mark.bad_input(25)
@of_modes(EMBEDDED)
def test_what_a_task_changes_stays_in_its_runner(make: Maker, tmp_path: Path) -> None:
    """As in ProcessPoolExecutor: for the tasks to come there, and for nobody else."""
    executor = make(1)
    before = _surroundings()
    executor.submit(_change, str(tmp_path)).result(RESULT_SECONDS)
    assert executor.submit(_surroundings).result(RESULT_SECONDS) == {
        "cwd": str(tmp_path),
        "variable": "changed",
        "umask": 0o027,
        "path": "first",
        "recursion": 5000,
        "handler": False,
    }
    assert _surroundings() == before
    other = make(1)
    theirs = other.submit(_surroundings).result(RESULT_SECONDS)
    assert (theirs["variable"], theirs["umask"]) == (before["variable"], before["umask"])


def _change(folder: str) -> None:
    os.chdir(folder)
    os.umask(0o027)
    os.environ["A_TASKS_VARIABLE"] = "changed"
    sys.path.insert(0, "first")
    sys.setrecursionlimit(5000)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _surroundings() -> dict[str, Any]:
    umask = os.umask(0)
    os.umask(umask)
    return {
        "cwd": os.path.realpath(os.getcwd()),
        "variable": os.environ.get("A_TASKS_VARIABLE"),
        "umask": umask,
        "path": sys.path[0],
        "recursion": sys.getrecursionlimit(),
        "handler": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    }


@pytest.mark.bad_input(27)
@of_modes(EMBEDDED)
def test_a_task_may_use_all_of_the_standard_library(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(1)
    assert executor.submit(_use_much, str(path)).result(RESULT_SECONDS) == 3
    assert executor.submit(tasks.add, 1).result(RESULT_SECONDS) == 2
    assert tasks.notes(path) == []
    executor.shutdown()
    assert tasks.notes(path) == ["at exit"], "when the runner ends"


def _use_much(path: str) -> int:
    import atexit
    import logging
    import subprocess

    atexit.register(tasks.note, path, "at exit")
    logging.warning("to stderr")
    logging.shutdown()
    process = subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=False)
    return process.returncode


@pytest.mark.bad_input(66)
@of_modes(EMBEDDED, CLUSTER)
def test_a_module_that_makes_an_executor_when_it_is_imported(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        from achilles import DistributedExecutor
        executor = DistributedExecutor(1)
        def twice(n):
            return 2 * n
        """
    (tmp_path / "makes_one.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    import makes_one  # type: ignore[import-not-found]

    assert list(make(1).map(makes_one.twice, range(3))) == [0, 2, 4]
    makes_one.executor.shutdown()
    del sys.modules["makes_one"]
