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
from achilles.runtime.seal import ANSWER, OUTPUT, QUESTION, TAG_SIZE, Seal, Sealer

BOUND = 20.0
SEAL = Seal(bytes(32))


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
    """One short wait, then none; what is too much is dropped; when it goes on,
    all else is printed.
    """
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


# --- Sealed ---------------------------------------------------------------------------------------


def test_only_sealed_questions_are_answered_and_answers_are_sealed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sealer = Sealer(SEAL)
    replies: queue.SimpleQueue[p.Letter] = queue.SimpleQueue()
    desk = Desk(replies.put, sealer)
    number, once, name = b"\1\0\0\0", bytes(range(16)), b"tests.tasks"
    tag = SEAL.letter(QUESTION, sealer.root, once, name)
    foreign = Sealer(SEAL).letter(QUESTION, once, name)
    bad = [
        number + name,
        number + once + bytes(TAG_SIZE) + name,
        number + once + foreign + name,
        number + once + tag + b"tests.other",
        number + b"x" * 16 + tag + name,
        b"",
    ]
    for body in [*bad, number + once + tag + name]:
        desk.put(p.Letter(3, 2, 1, p.IMPORT, body))
    body = replies.get(timeout=BOUND).body
    assert replies.empty()
    desk.close()
    assert body[:4] == number
    assert b"def add" in body
    assert body[-TAG_SIZE:] == sealer.letter(ANSWER, once, body[4:-TAG_SIZE])
    assert caplog.text.count("is not sealed was not answered") == len(bad)


def test_only_sealed_output_is_printed_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    sealer = Sealer(SEAL)

    def letter(count: int, text: bytes, root: bytes = b"") -> p.Letter:
        once = b"worker 1" + count.to_bytes(8, "big")
        body = b"\1" + text
        tag = SEAL.letter(OUTPUT, root or sealer.root, once, body)
        return p.Letter(1, 1, 1, p.OUTPUT, once + tag + body)

    printer = Printer(sealer)
    good = letter(2, b"two\n")
    for one in (
        letter(1, b"one\n"),
        good,
        good,
        letter(1, b"one again\n"),
        letter(3, b"another client's\n", bytes(16)),
        p.Letter(1, 1, 1, p.OUTPUT, b"\1plain\n"),
        p.Letter(1, 1, 1, p.OUTPUT, b""),
        p.Letter(1, 1, 1, p.OUTPUT, letter(4, b"").body + b"more\n"),
        letter(300, b"three\n"),
    ):
        printer.put(one)
    printer.close()
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
