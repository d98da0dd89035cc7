"""A client answers letters in a thread of its own."""

from __future__ import annotations

import queue
import threading

import pytest

from achilles import letters
from achilles.core import protocol as p
from achilles.letters import Desk

BOUND = 20.0


def test_requests_for_modules_are_answered() -> None:
    replies: queue.SimpleQueue[p.Letter] = queue.SimpleQueue()
    desk = Desk(replies.put)
    desk.put(p.Letter(3, 2, 1, p.IMPORT, b"\1\0\0\0none_such"))
    assert replies.get(timeout=BOUND) == p.Letter(3, 2, 1, p.IMPORT, b"\1\0\0\0")
    desk.close()


def test_a_finder_that_raises_is_an_answer_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: bytes) -> bytes:
        raise RuntimeError("as wanted")

    monkeypatch.setattr(letters, "answer", broken)
    replies: queue.SimpleQueue[p.Letter] = queue.SimpleQueue()
    desk = Desk(replies.put)
    desk.put(p.Letter(3, 2, 1, p.IMPORT, b"\1\0\0\0mine"))
    assert replies.get(timeout=BOUND).body == b"\1\0\0\0"
    desk.close()
    assert "request for a module failed" in caplog.text


def test_its_thread_ends_with_it() -> None:
    before = threading.active_count()
    desk = Desk(lambda letter: None)
    desk.close()  # without one, there is nothing to end
    desk.put(p.Letter(0, 0, 0, p.IMPORT, b""))
    thread = next(thread for thread in threading.enumerate() if thread.name == "achilles-letters")
    desk.close()
    thread.join(BOUND)
    assert threading.active_count() == before
