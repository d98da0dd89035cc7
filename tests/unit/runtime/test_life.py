"""A process ends with the pipe that it was given, whatever it does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from achilles.runtime.life import life_pipe
from tests.unit.runtime.driver import BOUND

CODE = 3


def started(life: int, then: str, before: str = "") -> subprocess.Popen[str]:
    """A process that dies with that pipe, and says so."""
    program = f"""
        import fcntl, os, signal, time
        from achilles.runtime.life import die_with
        {before}
        die_with({life}, {CODE})
        print("lives", flush=True)
        {then}
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        pass_fds=[life],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("before", "then", "code"),
    [
        ("", "while True: pass", -9),
        ("", "time.sleep(60)", -9),
        ("del fcntl.F_SETSIG", "time.sleep(60)", CODE),
        ("os.open = lambda *rest: open(os.devnull + '/nothing')", "time.sleep(60)", CODE),
    ],
    ids=["busy", "asleep", "no such signals", "no proc"],
)
def test_it_lives_as_long_as_the_pipe_is_open(before: str, then: str, code: int) -> None:
    """Each of several with the same one."""
    life, end = life_pipe()
    processes = [started(life, then, before) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "lives\n"
        assert process.poll() is None
    os.close(end)
    for process in processes:
        assert process.wait(BOUND) == code
        process.__exit__(None, None, None)
    os.close(life)


def test_a_pipe_that_has_ended() -> None:
    life, end = life_pipe()
    os.close(end)
    with started(life, "time.sleep(60)") as process:
        assert process.communicate(timeout=BOUND)[0] == ""
        assert process.returncode == CODE
    os.close(life)
