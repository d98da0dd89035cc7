from __future__ import annotations

import os
import sys

import pytest

from achilles.net.connections import Connection, Connections
from achilles.net.memory import HOARD, PAUSE, SILENT_SECONDS, SLACK, MemoryWatch, resident
from achilles.net.transport import Route

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
    assert resident() > 10 << 20
    assert resident() % os.sysconf("SC_PAGE_SIZE") == 0
