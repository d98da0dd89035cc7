"""The frames of a message as libzmq takes them, also where this process may have nothing more."""

from __future__ import annotations

import subprocess
import sys
import threading
from errno import EMFILE, ENOMEM
from typing import Any

import pytest
import zmq
from zmq.utils import garbage

from achilles.net import frames
from achilles.net.frames import SHARED_MIN, has_room, prepared
from tests.descriptors import open_descriptors

HEAD = b"head"
LARGE = SHARED_MIN
Frame = zmq.Frame


class Collector:
    """In place of pyzmq's: as if it had not begun yet."""

    def is_alive(self) -> bool:
        return False


@pytest.fixture
def unbegun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "gc", Collector())
    monkeypatch.setattr(frames, "_retry_at", 0.0)


def is_shared(frame: zmq.Frame, memory: bytearray) -> bool:
    memory[0] ^= 1
    return bytes(frame.buffer) == memory


def made(*parts: bytes | bytearray) -> list[zmq.Frame]:
    ready = prepared(parts)
    assert ready is not None
    return ready


def test_what_is_large_is_not_copied() -> None:
    small, large = bytearray(LARGE - 1), bytearray(LARGE)
    ready = made(HEAD, small, large)
    assert [bytes(frame.buffer) for frame in ready] == [HEAD, small, large]
    assert not is_shared(ready[1], small)
    assert is_shared(ready[2], large)


@pytest.mark.usefixtures("unbegun")
def test_without_room_it_is_copied_and_soon_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever sends many large messages must not ask for all those threads with each."""
    asked: list[float] = []
    now = 100.0
    monkeypatch.setattr(frames, "monotonic", lambda: now)

    def has_none() -> bool:
        asked.append(now)
        return False

    monkeypatch.setattr(frames, "has_room", has_none)
    memory = bytearray(LARGE)
    for _ in range(3):
        assert not is_shared(made(HEAD, memory)[1], memory)
    now += frames.RETRY_SECONDS
    made(HEAD, memory)
    assert asked == [100.0, now]
    monkeypatch.setattr(frames, "has_room", lambda: True)
    now += frames.RETRY_SECONDS
    assert is_shared(made(HEAD, memory)[1], memory)


@pytest.mark.parametrize(
    "error", [zmq.ZMQError(EMFILE), zmq.Again(), RuntimeError("can't start new thread")]
)
def test_what_cannot_be_shared_after_all_is_copied(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def make(part: Any, *, copy: bool) -> zmq.Frame:
        if not copy:
            raise error
        return Frame(part, copy=copy)

    monkeypatch.setattr(zmq, "Frame", make)
    memory = bytearray(LARGE)
    assert not is_shared(made(HEAD, memory)[1], memory)


@pytest.mark.parametrize("error", [zmq.ZMQError(ENOMEM), MemoryError()])
def test_what_cannot_be_copied_either_is_not_made(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def make(part: Any, *, copy: bool) -> zmq.Frame:
        if part is not HEAD:
            raise error
        return Frame(part, copy=copy)

    monkeypatch.setattr(zmq, "Frame", make)
    assert prepared([HEAD, bytes(LARGE)]) is None


def test_what_is_asked_for_is_given_back() -> None:
    before, threads = open_descriptors(), threading.enumerate()
    assert has_room()
    assert (open_descriptors(), threading.enumerate()) == (before, threads)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_too_few_threads_are_no_room(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    before = threading.enumerate()
    start = threading.Thread.start
    left = [None] * (frames.THREADS - 1)

    def start_one_of_few(thread: threading.Thread) -> None:
        if not left:
            raise error
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one_of_few)
    assert not has_room()
    assert not left
    assert threading.enumerate() == before


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
def test_too_few_descriptors_are_no_room_and_the_collector_does_not_begin() -> None:
    script = """
import os, resource
from zmq.utils.garbage import gc
from achilles.net import frames

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
there = len(os.listdir("/proc/self/fd")) - 1
for free in range(frames.DESCRIPTORS):
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + free, hard))
    frames._retry_at = 0.0
    assert not frames.has_room(), free
    assert frames.prepared([b"head", bytes(frames.SHARED_MIN)]), free
    assert not gc.is_alive(), free
resource.setrlimit(resource.RLIMIT_NOFILE, (there + frames.DESCRIPTORS, hard))
frames._retry_at = 0.0
assert frames.prepared([b"head", bytes(frames.SHARED_MIN)])
assert gc.is_alive()
print(len(os.listdir("/proc/self/fd")) - 1 - there)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) <= frames.DESCRIPTORS // 2
