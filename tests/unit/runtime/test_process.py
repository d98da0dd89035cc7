"""Starting and ending one runner's process, and the pipe of tokens with and without /proc."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from achilles.runtime.life import life_pipe
from achilles.runtime.process import (
    RunnerProcess,
    TokenPipe,
    describe_exit,
    which_limit,
)
from tests.descriptors import open_descriptors, wait_until_closed
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import driving


@pytest.fixture(params=["proc", "sockets"])
def stacks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ExitStack, ExitStack]]:
    if request.param == "sockets":
        _without_proc(monkeypatch)
    before = open_descriptors()
    with ExitStack() as ours, ExitStack() as theirs:
        yield ours, theirs
    wait_until_closed(before)


def _without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def missing(path: Any, *rest: int, **options: Any) -> int:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return original(path, *rest, **options)

    monkeypatch.setattr(os, "open", missing)


def test_tokens_are_read_or_taken_back_but_not_both(stacks: tuple[ExitStack, ExitStack]) -> None:
    pipe = TokenPipe(*stacks)
    assert pipe.take() == b""
    assert pipe.write(b"\1\1\1\2\2") == 5
    assert os.read(pipe.read_end, 1) == b"\1"
    assert pipe.take() == b"\1\1\2\2"
    pipe.write(b"\3")
    assert os.get_blocking(pipe.read_end), "the runner has to wait for tokens"
    assert os.read(pipe.read_end, 1) == b"\3"


def test_the_end_of_tokens_comes_behind_them(stacks: tuple[ExitStack, ExitStack]) -> None:
    pipe = TokenPipe(*stacks)
    pipe.write(b"\1")
    pipe.end()
    pipe.end()
    assert os.read(pipe.read_end, 1) == b"\1"
    assert os.read(pipe.read_end, 1) == b""
    assert pipe.take() == b""


def test_a_full_pipe_of_tokens(stacks: tuple[ExitStack, ExitStack]) -> None:
    pipe = TokenPipe(*stacks)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while count < 10_000_000:
            count += pipe.write(b"\1" * 10_000)
    assert count >= 10_000
    assert pipe.take() == b"\1" * count


@pytest.mark.bad_input(76)
def test_runners_work_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_proc(monkeypatch)
    with driving() as driver:
        driver.spawn()
        fn = driver.load(tasks.add)
        driver.execute(1, fn, *((n,) for n in range(3000)))
        driver.until(lambda: len(driver.results) == 3000)


def test_a_process_ends_with_its_tokens() -> None:
    before = open_descriptors()
    ends = life_pipe()
    process = RunnerProcess(ends[0], None)
    assert repr(process) == f"<RunnerProcess {process.pid}>"
    process.sock.setblocking(True)
    process.sock.send(b"\x05\0\0\0junk!")  # not even marshalled: it gives up
    assert process.reap() != 0
    process.close()
    for end in ends:
        os.close(end)
    wait_until_closed(before)


@pytest.mark.bad_input(16, 17, 18)
def test_how_processes_end() -> None:
    assert describe_exit(None).startswith("ended (how is not known")
    assert describe_exit(0) == "exited with code 0"
    assert describe_exit(-signal.SIGSEGV) == "was killed by SIGSEGV"
    assert describe_exit(-250) == "was killed by signal 250"


@pytest.mark.bad_input(61)
def test_the_limit_that_kept_a_process_from_starting_is_named() -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert f"(the limit of open files, ulimit -n: {files}; raise it" in which_limit(
        OSError(errno.EMFILE, "Too many open files")
    )
    assert "(the limit of processes, ulimit -u: " in which_limit(OSError(errno.EAGAIN, "again"))
    assert "have fewer slots" in which_limit(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert which_limit(OSError(errno.EPERM, "Operation not permitted")) == ""
