"""What a runner prints is sent on in lines, within a budget."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from achilles.runtime.output import (
    BURST,
    LINE_MAX,
    PAUSE,
    PIECE_MAX,
    RATE,
    READ_MAX,
    READS_MAX,
    OutputPipe,
    print_own,
)
from tests.printed import kept_and_told


class Pipe:
    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        os.set_blocking(read_end, False)
        self.output = OutputPipe(read_end, 1)
        self.now = 100.0
        self.client: int | None = 1

    def write(self, data: bytes) -> None:
        """As a task; a pipe's worth at a time."""
        os.write(self.write_end, data)

    def read(self, *, is_all: bool = False) -> list[bytes]:
        return self.output.read(self.now, self.client, is_all=is_all)

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


def notice(count: int) -> bytes:
    return b"[achilles: %d bytes of output were dropped here]\n" % count


def test_what_nobody_could_read_is_dropped_and_counted(pipe: Pipe) -> None:
    assert len(pipe.print_all(BURST + (1 << 20))) == BURST
    pipe.now += PAUSE
    pipe.write(b"later\n")
    assert pipe.read() == [notice(1 << 20) + b"later\n"]


def test_the_line_that_says_how_much_needs_nothing_behind_it(pipe: Pipe) -> None:
    pipe.print_all(BURST + 128)
    assert pipe.output.owes(1)
    pipe.now += PAUSE - 0.01
    assert pipe.read(is_all=True) == []
    pipe.now += 0.01
    assert pipe.read() == [notice(128)]
    assert not pipe.output.owes(1)
    assert pipe.read() == []


def test_the_end_of_the_pipe_tells_the_rest(pipe: Pipe) -> None:
    pipe.print_all(BURST)
    pipe.write(b"no end of a line")
    os.close(pipe.write_end)
    pipe.write_end = -1
    assert pipe.read() == [notice(16)]
    assert not pipe.output.owes(1)


def test_so_does_the_end_of_a_client(pipe: Pipe) -> None:
    """And then the budget that is left may be used at once."""
    pipe.print_all(BURST + 128)
    pipe.now += 0.1
    assert pipe.output.last_notice(1) == notice(128)
    assert pipe.output.last_notice(1) == pipe.output.last_notice(2) == b""
    pipe.write(b"the next task\n")
    assert pipe.read() == [b"the next task\n"]


def test_a_flood_has_one_line_a_second(pipe: Pipe) -> None:
    """Each byte is there, or counted."""
    came = b""
    for _ in range(1000):
        came += pipe.print_all(1 << 14)
        pipe.now += 0.01
    came += pipe.output.last_notice(1)
    kept, told = kept_and_told(came.decode())
    assert kept + sum(told) == 1000 << 14
    assert BURST + 9 * RATE < kept < BURST + 11 * RATE
    assert len(told) <= 11


def test_each_client_has_a_budget_of_its_own(pipe: Pipe) -> None:
    """Whoever works there in turns."""
    pipe.print_all(BURST + 128)
    pipe.client = 2
    assert len(pipe.print_all(BURST + 256)) == BURST
    pipe.client = 1
    assert pipe.print_all(128) == b""
    pipe.client = None
    assert len(pipe.print_all(128)) == 128
    assert pipe.output.last_notice(1) == notice(256)
    assert pipe.output.last_notice(2) == notice(256)
    assert pipe.output.last_notice(None) == b""


def test_who_has_not_printed_for_long_is_forgotten(pipe: Pipe) -> None:
    for client in range(100):
        pipe.client = client
        pipe.print_all(128 if client else BURST + 128)
        pipe.now += 1000.0
    assert pipe.output._quotas.keys() == {0, 99}, "one of which is still owed something"


def test_the_budget_comes_back(pipe: Pipe) -> None:
    pipe.print_all(BURST)
    pipe.now += 1.0
    assert len(pipe.print_all(RATE)) == RATE
    pipe.now += 1000.0
    assert len(pipe.print_all(BURST)) == BURST


def test_who_never_ends_does_not_keep_the_reader(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def read(fd: int, size: int) -> bytes:
        reads.append(size)
        assert len(reads) <= READS_MAX
        return b"y\n" * (size // 2)

    monkeypatch.setattr(os, "read", read)
    assert sum(map(len, pipe.read())) == BURST
    assert reads == [READ_MAX] * READS_MAX


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
