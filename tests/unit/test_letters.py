"""A client answers letters in a thread of its own."""

from __future__ import annotations

import io
import queue
import sys
import threading

import pytest

from achilles import letters
from achilles.core import protocol as p
from achilles.letters import Desk, Printer

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


# --- Output ---------------------------------------------------------------------------------------


def printed(stream: int, text: bytes) -> p.Letter:
    return p.Letter(1, 1, 1, p.OUTPUT, bytes((stream,)) + text)


def test_output_is_printed_where_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    printer.put(printed(1, b"out\n"))
    printer.put(printed(2, "é\n".encode() + b"\xff"))
    printer.put(p.Letter(1, 1, 1, p.OUTPUT, b""))
    printer.close()
    assert capsys.readouterr() == ("out\n", "é\n\N{REPLACEMENT CHARACTER}")


class Stuck(io.StringIO):
    """A terminal that was stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.goes_on.wait(BOUND)
        return super().write(text)


def test_a_terminal_that_is_stopped_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short wait, then none; what is too much is dropped; when it goes on, all else is printed."""
    stuck = Stuck()
    monkeypatch.setattr(sys, "stdout", stuck)
    monkeypatch.setattr(letters, "PRINT_SECONDS", 0.01)
    printer = Printer()
    line = b"x" * (1 << 20)
    for _ in range(20):
        printer.put(printed(1, line))
    stuck.goes_on.set()
    printer.close()
    thread = next(thread for thread in threading.enumerate() if thread.name == "achilles-output")
    thread.join(BOUND)
    assert letters.PENDING_MAX <= len(stuck.getvalue()) <= letters.PENDING_MAX + len(line)


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    printer = Printer()
    printer.put(printed(1, b"nowhere"))
    printer.put(printed(2, b"nowhere"))
    printer.close()
