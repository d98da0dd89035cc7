from __future__ import annotations

import math
import os
import platform
import subprocess
import sys

import pytest

from achilles.net import memory
from achilles.net.connections import Connection, Connections
from achilles.net.memory import (
    CALM_SECONDS,
    HOARD,
    PAUSE,
    SILENT_SECONDS,
    SLACK,
    Leftovers,
    MemoryWatch,
    in_use,
)
from achilles.net.transport import Route
from achilles.runtime import shared

LIMIT = 1 << 30
SOMEBODY: Route = object()  # type: ignore[assignment]


class Fake(Connection):
    """A connection with as much on it as a test says."""

    def __init__(
        self, waiting: int | None, heard_at: float = 0.0, route: Route | None = SOMEBODY
    ) -> None:
        super().__init__(-1, heard_at)
        self.route = route  # it has said something
        self.waiting = waiting
        self.is_cut = False

    def backlog(self) -> int | None:
        return self.waiting

    def cut(self) -> None:
        self.is_cut = True


class Scene:
    def __init__(self, *found: Fake, sessions: int = 0) -> None:
        self.used = LIMIT + SLACK + 1
        self.sessions = sessions
        connections = Connections()
        connections.by_fd = dict(enumerate(found))
        self.watch = MemoryWatch(LIMIT, [connections], self.end, used=lambda: self.used)

    def end(self, now: float) -> bool:
        self.sessions -= 1
        return self.sessions >= 0


def test_within_the_limit_nobody_has_to_go() -> None:
    scene = Scene(Fake(1 << 40), sessions=1)
    scene.used = LIMIT + SLACK
    assert scene.watch.look(0.0) == ""
    assert scene.sessions == 1


def test_the_connection_with_most_on_it_goes_first_then_sessions_then_whoever_is_silent() -> None:
    least, most, silent, heard = (
        Fake(HOARD),
        Fake(2 * HOARD),
        Fake(None, 10.0),
        Fake(None, 10.0 + SILENT_SECONDS),
    )
    scene = Scene(least, most, silent, heard, sessions=1)
    now = 10.1 + SILENT_SECONDS
    said = scene.watch.look(now)
    assert said.startswith("1088 MiB are in use, 1024 are the limit (broker.memory)")
    assert [one.is_cut for one in (least, most)] == [False, True]
    assert scene.watch.look(now + PAUSE / 2) == "", "it takes a while to have an effect"
    most.waiting = 0
    scene.watch.look(now + PAUSE)
    assert least.is_cut
    least.waiting = HOARD - 1
    assert "the session" in scene.watch.look(now + 2 * PAUSE)
    assert not silent.is_cut
    heard.heard_at += 2.5 * PAUSE
    assert "1 connections" in scene.watch.look(now + 3 * PAUSE)
    assert (silent.is_cut, heard.is_cut) == (True, False)
    silent.heard_at += 10
    assert "nobody" in scene.watch.look(now + 4 * PAUSE)
    assert scene.watch.shed == 4


def test_whoever_never_said_anything_is_silent_at_once() -> None:
    stranger, known = Fake(None, 10.0, route=None), Fake(None, 10.0)
    scene = Scene(stranger, known)
    assert "ended 1 connections" in scene.watch.look(10.0)
    assert (stranger.is_cut, known.is_cut) == (True, False)


def test_without_a_limit_nobody_looks() -> None:
    watch = MemoryWatch(0, [], lambda _: True, used=lambda: 1 << 60)
    assert watch.look(0.0) == ""


def test_the_memory_in_use_is_known() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells it in a file")
    assert in_use() > 10 << 20
    assert in_use() % os.sysconf("SC_PAGE_SIZE") == 0


@pytest.mark.skipif(not shared.IS_AVAILABLE, reason="there is no memfd here")
def test_memory_that_is_handed_on_is_in_use() -> None:
    """It is in no process's account that does not touch it, and yet nobody else has it."""
    block = bytes(1 << 20)  # what is larger may stay with the C library, as memory in use
    before = in_use()
    written = shared.store([block] * 64)
    fd = written.obj.fd  # type: ignore[union-attr]
    kept = [
        shared.adopt(os.getpid(), fd, os.fstat(fd).st_ino, 64 << 20, keep=True) for _ in range(2)
    ]
    assert 150 << 20 < in_use() - before < 220 << 20
    assert not any(kept[0][::4096])  # which brings it into memory
    assert 150 << 20 < in_use() - before < 220 << 20
    del written, kept
    assert in_use() - before < 64 << 20


def test_what_is_free_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given back before anybody has to go."""
    scene = Scene(sessions=1)

    def trim() -> None:
        scene.used = LIMIT

    monkeypatch.setattr(memory, "_trim", trim)
    assert scene.watch.look(0.0) == ""
    assert scene.sessions == 1


def test_the_memory_of_large_messages_is_given_back_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_trim", lambda: trimmed.append(1))
    left = Leftovers()
    left.look(5.0, -math.inf)
    left.look(5.0, 5.0)
    left.look(5.0 + CALM_SECONDS / 2, 5.0)
    left.look(6.0 + CALM_SECONDS / 2, 6.0)
    assert trimmed == []
    left.look(6.0 + CALM_SECONDS, 6.0)
    left.look(100.0, 6.0)
    assert trimmed == [1]
    left.look(200.0, 150.0)
    assert trimmed == [1, 1]


def test_freed_memory_is_kept_for_the_next_large_message() -> None:
    """In a process of its own, as this one's memory is of all tests."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be told so")
    code = (
        "from achilles.net.memory import Leftovers, in_use, _trim\n"
        "left, before = Leftovers(), in_use()\n"
        "data = b'x' * (48 << 20); del data\n"
        "kept = in_use() - before\n"
        "_trim()\n"
        "print(kept > 40 << 20, in_use() - before < 8 << 20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True True\n"
