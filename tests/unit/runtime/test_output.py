"""What a runner prints is sent on in lines, within a budget."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from achilles.runtime.output import BURST, LINE_MAX, PIECE_MAX, RATE, OutputPipe, print_own


class Pipe:
    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        os.set_blocking(read_end, False)
        self.output = OutputPipe(read_end, 1)
        self.now = 100.0

    def write(self, data: bytes) -> None:
        """As a task; a pipe's worth at a time."""
        os.write(self.write_end, data)

    def read(self, *, is_all: bool = False) -> list[bytes]:
        return self.output.read(self.now, is_all=is_all)

    def print_all(self, size: int) -> bytes:
        """Lines of that many bytes in all; what came of them."""
        came = b""
        for at in range(0, size, 1 << 14):
            self.write((b"x" * 127 + b"\n") * (min(1 << 14, size - at) // 128))
            came += b"".join(self.read())
        return came

    def close(self) -> None:
        os.close(self.output.fd)
        if self.write_end >= 0:
            os.close(self.write_end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_go_on_and_beginnings_wait(pipe: Pipe) -> None:
    pipe.write(b"one\ntwo\nthr")
    assert pipe.read() == [b"one\ntwo\n"]
    assert pipe.read() == []
    pipe.write(b"ee\nfour")
    assert pipe.read() == [b"three\n"]
    assert pipe.read(is_all=True) == [b"four"]
    assert pipe.read(is_all=True) == []


def test_a_long_line_does_not_wait_for_its_end(pipe: Pipe) -> None:
    pipe.write(b"x" * (LINE_MAX + 1))
    assert pipe.read() == [b"x" * (LINE_MAX + 1)]


def test_pieces_are_small(pipe: Pipe) -> None:
    pipe.write(b"x\n" * PIECE_MAX)
    assert [len(piece) for piece in pipe.read()] == [PIECE_MAX, PIECE_MAX]


def test_the_end(pipe: Pipe) -> None:
    pipe.write(b"last words")
    os.close(pipe.write_end)
    pipe.write_end = -1
    assert pipe.read() == [b"last words"]
    assert not pipe.output.is_open
    assert pipe.read() == []


def test_what_nobody_could_read_is_dropped_and_counted(pipe: Pipe) -> None:
    came = pipe.print_all(BURST + (1 << 20))
    assert BURST - (1 << 14) <= len(came) <= BURST
    pipe.now += 1.0
    pipe.write(b"later\n")
    (piece,) = pipe.read()
    dropped = BURST + (1 << 20) - len(came)
    assert piece == b"[achilles: %d bytes of output were dropped here]\nlater\n" % dropped


def test_the_budget_comes_back(pipe: Pipe) -> None:
    pipe.print_all(BURST)
    pipe.now += 1.0
    assert RATE - (1 << 14) <= len(pipe.print_all(RATE)) <= RATE
    pipe.now += 1000.0
    assert len(pipe.print_all(BURST)) == BURST


def test_what_is_nobodys_is_printed_as_far_as_that_takes_no_time() -> None:
    """To a pipe that somebody reads, that nobody reads for now, and that nobody will read."""
    read_end, write_end = os.pipe()
    print_own(b"a line\n", write_end)
    assert os.read(read_end, 100) == b"a line\n"
    print_own(bytes(1 << 20), write_end)  # more than a pipe holds: what does not fit is dropped
    assert 0 < len(os.read(read_end, 1 << 20)) < 1 << 20
    os.close(read_end)
    print_own(b"another\n", write_end)
    os.close(write_end)
