"""Letters arrive whole and in order, whatever the pieces that they are read in."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from achilles.core.protocol import FromRunner, RunnerDone, RunnerEvent, ToRunner
from achilles.runtime import context
from achilles.runtime.side import HEAD, IMPORT, NESTED, OUTPUT, HostSide, Reader, RunnerSide, pack
from tests.unit.runtime.driver import BOUND, CLIENT, Driver


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        yield near, far


@pytest.mark.parametrize("step", [1, 2, HEAD.size, 13, 1000])
def test_letters_in_pieces(step: int) -> None:
    letters = [(NESTED, 1, b""), (IMPORT, 7, b"body"), (OUTPUT, (1 << 32) - 1, bytes(300))]
    data = b"".join(pack(*letter) for letter in letters)
    reader = Reader()
    read = [one for at in range(0, len(data), step) for one in reader.feed(data[at : at + step])]
    assert read == letters


def test_what_does_not_fit_waits(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    side = HostSide(near.fileno())
    body = os.urandom(1 << 20)
    side.send(NESTED, 1, body)
    side.send(NESTED, 2, b"behind it")
    assert side.is_full
    reader = Reader()
    letters: list[tuple[int, int, bytes]] = []
    while len(letters) < 2:
        letters += reader.feed(far.recv(1 << 16))
        side.flush()
    assert letters == [(NESTED, 1, body), (NESTED, 2, b"behind it")]
    assert not side.is_full


def test_the_end_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    side = HostSide(near.fileno())
    assert side.receive() == []
    far.sendall(pack(IMPORT, 1, b"last"))
    far.close()
    assert side.receive() == [(IMPORT, 1, b"last")]
    assert side.receive() is None
    side.send(IMPORT, 1, b"to nobody")
    assert not side.is_full


def test_a_runner_reads_by_kind(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    host, runner = HostSide(near.fileno()), RunnerSide(far.fileno())
    seen: list[tuple[int, bytes]] = []
    is_seen = threading.Event()

    def read(client: int, body: bytes) -> None:
        seen.append((client, body))
        is_seen.set()

    runner.handle(IMPORT, read)
    host.send(OUTPUT, 1, b"of no concern")
    host.send(IMPORT, 2, b"mine")
    assert is_seen.wait(BOUND)
    assert seen == [(2, b"mine")]
    near.shutdown(socket.SHUT_WR)  # ends the reading thread


def test_a_handler_that_raises_makes_nobody_deaf(
    ends: tuple[socket.socket, socket.socket], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for the letters that came with its own, nor for those after."""
    near, far = ends
    heard: list[bytes] = []
    is_heard = threading.Event()

    def handler(client: int, body: bytes) -> None:
        if body == b"bad":
            raise LookupError("nobody knows it")
        heard.append(body)
        is_heard.set()

    runner, host = RunnerSide(far.fileno()), HostSide(near.fileno())
    os.write(near.fileno(), pack(NESTED, 1, b"bad") + pack(NESTED, 1, b"good"))
    runner.handle(NESTED, handler)
    assert is_heard.wait(BOUND)
    is_heard.clear()
    host.send(NESTED, 1, b"bad")
    host.send(NESTED, 1, b"better")
    assert is_heard.wait(BOUND)
    assert heard == [b"good", b"better"]
    assert capsys.readouterr().err.count("LookupError: nobody knows it") == 2
    near.shutdown(socket.SHUT_WR)  # ends the reading thread


def test_many_threads_write(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    host, runner = HostSide(near.fileno()), RunnerSide(far.fileno())
    bodies = [bytes([n]) * 50_000 for n in range(8)]
    threads = [threading.Thread(target=runner.send, args=(NESTED, 1, body)) for body in bodies]
    for thread in threads:
        thread.start()
    letters: list[tuple[int, int, bytes]] = []
    while len(letters) < len(bodies):
        letters += host.receive() or ()
    for thread in threads:
        thread.join()
    assert sorted(body for _, _, body in letters) == bodies


def _echo(body: bytes) -> tuple[int, bytes]:
    """Send a letter, and wait for the answer."""
    side = context.side
    assert side is not None
    answer: list[bytes] = []
    is_there = threading.Event()

    def take(_: int, body: bytes) -> None:
        answer.append(body)
        is_there.set()

    side.handle(NESTED, take)
    side.send(NESTED, context.client, body)
    is_there.wait(BOUND)
    return context.client, answer[0]


def _send_and_die() -> None:
    assert context.side is not None
    context.side.send(IMPORT, 1, b"last words")
    os._exit(3)


def _close_and_return() -> str:
    assert context.side is not None
    context.side.close()
    return "done"


def test_a_task_sends_a_letter_and_reads_the_answer(driver: Driver) -> None:
    driver.execute(1, driver.load(_echo), (b"question",))
    driver.until(lambda: driver.letters)
    (letter,) = driver.letters
    assert (letter.runner, letter.client, letter.kind, letter.body) == (1, CLIENT, 1, b"question")
    large = os.urandom(1 << 20)  # more than fits at once
    driver.apply(ToRunner(1, CLIENT, NESTED, large))
    assert driver.outcome(1) == (CLIENT, large)


def test_last_letters_are_read(driver: Driver) -> None:
    driver.execute(1, driver.load(_send_and_die), ())
    assert driver.death().reason == "exited with code 3"
    assert [letter.body for letter in driver.letters] == [b"last words"]


def _write_late(number: int) -> int:
    """Have a letter written when the task is over."""
    side = context.side
    assert side is not None
    side._flushers.clear()
    side.before_results(lambda: side.send(IMPORT, 1, b"of %d" % number))
    return number


def test_what_a_task_wrote_is_read_before_its_result(driver: Driver) -> None:
    """Whichever of its channels the loop looks at first."""
    order: list[str] = []
    take = driver._take

    def note(events: list[RunnerEvent]) -> None:
        for event in events:
            if isinstance(event, FromRunner):
                order.append(event.body.decode())
            elif isinstance(event, RunnerDone):
                order.extend(f"result {row[0]}" for row in event.results)
        take(events)

    driver._take = note  # type: ignore[method-assign]
    fn = driver.load(_write_late)
    for number in range(1, 51):
        driver.execute(number, fn, (number,))
        assert driver.outcome(number) == number
    assert order == [text for n in range(1, 51) for text in (f"of {n}", f"result {n}")]


def test_a_task_may_close_it(driver: Driver) -> None:
    assert driver.run(_close_and_return) == "done"
    driver.apply(ToRunner(1, CLIENT, NESTED, b"nobody reads this"))


def test_one_letter_is_read_without_a_thread(ends: tuple[socket.socket, socket.socket]) -> None:
    """As long as nobody wants others: then its thread does so."""
    near, far = ends
    host, runner = HostSide(near.fileno()), RunnerSide(far.fileno())
    threads = threading.active_count()
    is_there = threading.Lock()
    is_there.acquire()
    for _ in range(2):
        host.send(IMPORT, 1, b"answer")
        runner.read_until(IMPORT, lambda client, body: is_there.release(), is_there, BOUND)
        assert is_there.locked()  # it was released, and taken
    assert threading.active_count() == threads
    runner.read_until(IMPORT, lambda client, body: None, is_there, 0.001)  # nothing comes
    other: list[bytes] = []
    is_other_there = threading.Event()

    def take(client: int, body: bytes) -> None:
        other.append(body)
        is_other_there.set()

    host.send(NESTED, 1, b"for another")
    runner.handle(NESTED, take)
    assert is_other_there.wait(BOUND)
    host.send(IMPORT, 1, b"answer")
    runner.read_until(IMPORT, lambda client, body: is_there.release(), is_there, BOUND)
    assert other == [b"for another"]
    near.shutdown(socket.SHUT_RDWR)


def test_the_end_of_the_host_ends_the_reading(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    runner = RunnerSide(far.fileno())
    near.shutdown(socket.SHUT_RDWR)
    never = threading.Lock()
    never.acquire()
    with pytest.raises(OSError, match="closed the side channel"):
        runner.read_until(IMPORT, lambda client, body: None, never, BOUND)
