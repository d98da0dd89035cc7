from __future__ import annotations

import errno
import os
import random
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic

import pytest

from achilles.core.protocol import COMING_MAX, FRAMES_MAX, Buffer
from achilles.errors import ProtocolError
from achilles.net import pipes
from achilles.net.pipes import READ_MAX, VECTOR_MAX, Ends, Pipes, accept, number_of, offer
from achilles.runtime import shared
from achilles.runtime.loop import Loop
from tests.descriptors import open_descriptors, wait_until_closed
from tests.security.attacks import attack

WAIT_SECONDS = 10.0
FRAME_MAX = 1 << 24
FAR_MORE_THAN_A_PIPE_TAKES = 2000

pytestmark = pytest.mark.skipif(not pipes.IS_AVAILABLE, reason="there is no /proc here")


class Side:
    """One side of two pipes, what has come to it, and how it has ended."""

    def __init__(self, loop: Loop, ends: Ends, theirs: int | None = None) -> None:
        self.received: list[list[bytes]] = []
        self.ended: list[ProtocolError | None] = []
        self.pipes = Pipes(
            ends,
            loop,
            lambda frames: self.received.append([bytes(frame) for frame in frames]),
            self.ended.append,
            frame_max=FRAME_MAX,
            theirs=theirs,
        )


class Both:
    """Both sides in one loop."""

    def __init__(self) -> None:
        self.loop = Loop()
        offered = offer()
        self.left = Side(self.loop, offered.ends, offered.theirs)
        self.right = Side(self.loop, accept(offered.frame))
        for side in (self.left, self.right):
            side.pipes.begin()

    def until(self, holds: Callable[[], object]) -> None:
        deadline = monotonic() + WAIT_SECONDS
        while not holds():
            assert monotonic() < deadline, "it does not come about"
            self.loop.wait(0.01)

    def at_right(self, count: int) -> list[list[bytes]]:
        self.until(lambda: len(self.right.received) >= count)
        return self.right.received

    def close(self) -> None:
        for side in (self.left, self.right):
            side.pipes.close()
        self.loop.close()


@pytest.fixture
def both() -> Iterator[Both]:
    before = open_descriptors()
    both = Both()
    yield both
    both.close()
    wait_until_closed(before)


MESSAGES: list[list[Buffer]] = [
    [b"one"],
    [b""],
    [b"", b"", b""],
    [b"head", b"part", b""],
    [memoryview(b"alone")],
    [bytearray(b"head"), memoryview(struct.pack("=4d", 1, 2, 3, 4)).cast("d")],  # type: ignore[list-item]
    [b"x" * (READ_MAX - 8)],
    [b"x" * READ_MAX],
    [b"x" * (3 * READ_MAX + 1)],
    [b"head", b"y" * READ_MAX, b"", b"z" * (2 * READ_MAX), b"", b""],
    [b"h", *[b"%d" % number for number in range(3 * VECTOR_MAX)]],
    [b"", b"x" * READ_MAX, *[b""] * (2 * VECTOR_MAX)],
    [b"last"],
]


def as_bytes(frames: Sequence[Buffer]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def test_messages_arrive_whole_and_in_order_both_ways(both: Both) -> None:
    for frames in MESSAGES:
        both.left.pipes.send(frames)
        both.right.pipes.send(frames)
    wanted = [as_bytes(frames) for frames in MESSAGES]
    assert both.at_right(len(MESSAGES)) == wanted
    both.until(lambda: len(both.left.received) == len(MESSAGES))
    assert both.left.received == wanted
    both.until(lambda: not both.left.pipes.has_outbox and not both.right.pipes.has_outbox)


def test_it_does_not_matter_how_what_is_read_was_cut() -> None:
    """Each byte may be the last that has come so far."""
    chance = random.Random(7)
    loop = Loop()
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    side = Side(loop, Ends(read, os.dup(write), os.dup(read)))
    side.pipes.begin()
    for _ in range(300):
        messages = [
            [chance.randbytes(chance.choice((0, 1, 5, 300))) for _ in range(chance.randint(1, 4))]
            for _ in range(chance.randint(1, 5))
        ]
        if chance.random() < 0.2:
            messages.insert(chance.randint(0, len(messages)), [b"l" * (READ_MAX + 10), b"", b"t"])
        raw = b"".join(
            struct.pack(f"<{len(frames) + 1}I", len(frames), *map(len, frames)) + b"".join(frames)
            for frames in messages
        )
        at = 0
        while at < len(raw):
            at += os.write(write, raw[at : at + chance.choice((1, 7, 500, 4000))])
            if chance.random() < 0.5 or len(raw) - at > 4000:
                loop.wait(0.0)
        for _ in range(10):
            loop.wait(0.0)
        assert side.received == messages
        side.received.clear()
    os.close(write)
    side.pipes.close()
    loop.close()


def test_what_the_pipe_does_not_take_is_kept_and_goes_later(both: Both) -> None:
    for number in range(FAR_MORE_THAN_A_PIPE_TAKES):
        both.left.pipes.send([number.to_bytes(4, "big") + bytes(1000)])
    assert both.left.pipes.has_outbox
    got = [int.from_bytes(frames[0][:4], "big") for frames in both.at_right(2000)]
    assert got == list(range(FAR_MORE_THAN_A_PIPE_TAKES))
    both.until(lambda: not both.left.pipes.has_outbox)


def test_an_outbox_has_an_end_and_no_message_is_cut(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link sends again what was dropped."""
    monkeypatch.setattr(pipes, "OUTBOX_MAX", 10)
    for number in range(FAR_MORE_THAN_A_PIPE_TAKES):
        both.left.pipes.send([number.to_bytes(4, "big") + bytes(1000)])
    both.until(lambda: not both.left.pipes.has_outbox)
    both.left.pipes.send([b"next"])
    both.until(lambda: both.right.received and both.right.received[-1] == [b"next"])
    numbers = [int.from_bytes(frames[0][:4], "big") for frames in both.right.received[:-1]]
    assert numbers == list(range(len(numbers)))
    assert 10 < len(numbers) < FAR_MORE_THAN_A_PIPE_TAKES


def test_a_large_message_is_as_it_was_when_it_was_sent_in_parts(both: Both) -> None:
    """What is kept of it is what was given, not a copy: it must not change, and need not."""
    large = os.urandom(20 * READ_MAX)
    both.left.pipes.send([b"head", memoryview(large)])
    both.left.pipes.send([b"next"])
    assert both.at_right(2) == [[b"head", large], [b"next"]]


def test_when_one_side_ends_the_other_is_told_once_and_has_what_was_written(both: Both) -> None:
    both.left.pipes.send([b"last words"])
    both.left.pipes.close()
    both.until(lambda: both.right.ended)
    assert both.right.received == [[b"last words"]]
    assert both.right.ended == [None]
    assert both.right.pipes.is_closed
    assert both.left.ended == []


def test_who_closes_first_may_take_what_has_come(both: Both) -> None:
    for _ in range(50):
        both.left.pipes.send([bytes(600)])
    both.right.pipes.drain()
    assert both.right.received == [[bytes(600)]] * 50
    both.left.pipes.close()
    both.right.pipes.drain()
    assert both.right.ended == [None]
    both.right.pipes.drain()


def test_to_write_when_nobody_reads_any_more_is_no_error_and_no_signal(both: Both) -> None:
    """Programs may have SIGPIPE end them."""
    both.right.pipes.close()
    for _ in range(FAR_MORE_THAN_A_PIPE_TAKES):
        both.left.pipes.send([bytes(1000)])
    assert both.left.pipes.has_outbox
    both.until(lambda: both.left.ended)


def test_nothing_is_read_before_it_is_begun() -> None:
    loop = Loop()
    offered = offer()
    left = Side(loop, offered.ends, offered.theirs)
    right = Side(loop, accept(offered.frame))
    right.pipes.begin()
    right.pipes.send([b"too early"])
    left.pipes.send([b"at once"])
    loop.wait(0.0)
    assert (left.received, right.received) == ([], [[b"at once"]])
    left.pipes.begin()
    loop.wait(1.0)
    assert left.received == [[b"too early"]]
    left.pipes.close()
    right.pipes.close()
    loop.close()


def test_pipes_that_nobody_accepted_leave_nothing() -> None:
    before = open_descriptors()
    loop = Loop()
    offered = offer()
    Side(loop, offered.ends, offered.theirs).pipes.close()
    loop.close()
    wait_until_closed(before)


def test_who_is_closed_while_messages_are_handed_on_hands_on_no_more(both: Both) -> None:
    def close(frames: list[Buffer]) -> None:
        both.right.received.append([bytes(frame) for frame in frames])
        both.right.pipes.close()

    both.right.pipes._on_frames = close
    both.left.pipes.send([b"one"])
    both.left.pipes.send([b"two"])
    both.until(lambda: both.right.pipes.is_closed)
    assert both.right.received == [[b"one"]]
    assert both.right.ended == []


@pytest.mark.parametrize("error", [MemoryError(), BlockingIOError(), ProtocolError("of ours")])
def test_errors_of_who_handles_a_message_are_not_taken_for_the_pipes(
    both: Both, error: Exception
) -> None:
    """The link has counted the message by then: whoever hides the error loses it."""

    def fail(frames: list[Buffer]) -> None:
        raise error

    both.right.pipes._on_frames = fail
    both.left.pipes.send([b"one"])
    with pytest.raises(type(error)):
        both.until(lambda: both.right.ended)
    assert not both.right.pipes.is_closed


def test_a_pipe_that_cannot_be_written_to_ends(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a message may be in it."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOMEM, "no pages")

    monkeypatch.setattr(os, "writev", fail)
    both.left.pipes.send([b"one"])
    assert both.left.ended == [None]
    both.right.pipes._outbox.append(deque([memoryview(b"one")]))
    both.right.pipes.flush()
    assert both.right.ended == [None]


# --- What is no message, and what are no pipes ----------------------------------------------------


@attack("T21")
@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<II", 0, 5),
        struct.pack("<II", FRAMES_MAX + 1, 5),
        struct.pack("<II", 1, FRAME_MAX + 1),
        struct.pack("<III", 2, 5, FRAME_MAX + 1),
        struct.pack("<I", 2000) + struct.pack("<I", FRAME_MAX) * 2000,
    ],
    ids=["no frames", "too many frames", "a large frame", "a large second one", "large in all"],
)
def test_what_is_no_message_ends_the_pipes(both: Both, raw: bytes) -> None:
    assert 2000 * FRAME_MAX > COMING_MAX
    os.write(both.left.pipes._ends.write, raw)
    both.until(lambda: both.right.ended)
    assert isinstance(both.right.ended[0], ProtocolError)
    assert both.right.pipes.is_closed
    assert both.right.received == []


@attack("T21")
def test_memory_is_taken_for_what_comes_not_for_what_is_announced(both: Both) -> None:
    count = COMING_MAX // FRAME_MAX
    os.write(
        both.left.pipes._ends.write, struct.pack(f"<{count + 1}I", count, *[FRAME_MAX] * count)
    )
    both.left.pipes.send([bytes(READ_MAX)] * 4)
    both.until(lambda: both.right.pipes._frames and not both.left.pipes.has_outbox)
    assert len(both.right.pipes._frames) == 1


def test_no_memory_for_a_message_ends_the_pipes_without_blame(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_: Pipes) -> None:
        raise MemoryError

    monkeypatch.setattr(Pipes, "_make_room", no_room)
    both.left.pipes.send([bytes(3 * READ_MAX)])
    both.until(lambda: both.right.ended)
    assert both.right.ended == [None]


def told(frame: bytes, **changes: int) -> bytes:
    names = ("magic", "pid", "theirs", "inode", "ours", "our_inode")
    fields = dict(zip(names, pipes._OFFER.unpack(frame), strict=True)) | changes
    return pipes._OFFER.pack(*fields.values())


@attack("T39")
def test_what_is_told_of_pipes_has_to_be_true(tmp_path: Path) -> None:
    ends, theirs, frame, number = offer()
    assert number_of(frame) == number
    (tmp_path / "file").touch()
    file = os.open(tmp_path / "file", os.O_RDWR)
    inode = os.fstat(file).st_ino
    before = open_descriptors()
    for wrong in (
        told(frame, pid=(1 << 31) - 1),
        told(frame, inode=1),
        told(frame, our_inode=1),
        told(frame, theirs=-1),
        told(frame, theirs=file, inode=inode),
        told(frame, ours=file, our_inode=inode),
    ):
        with pytest.raises(OSError, match=r"descriptor|No such|Permission"):
            accept(wrong)
    for wrong in (frame[:-1], frame + b"x", b"ao"):
        with pytest.raises(ProtocolError):
            accept(wrong)
    assert open_descriptors() == before
    for fd in (*ends, theirs, file):
        os.close(fd)


@attack("T39")
def test_nothing_else_is_opened_to_see_what_it_is(tmp_path: Path) -> None:
    """To open a device, or a named pipe for which somebody waits, has an effect."""
    ends, theirs, frame, _ = offer()
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    inode = os.fstat(fifo).st_ino
    opened: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda *args: opened.append(args))
        with pytest.raises(OSError, match="not the pipe"):
            accept(told(frame, theirs=fifo, inode=inode))
    assert not opened
    for fd in (*ends, theirs, fifo):
        os.close(fd)


def test_descriptors_are_left_to_connections_and_to_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """libzmq ends a broker that has none left for a connection."""
    ends, theirs, frame, _ = offer()
    before = open_descriptors()
    monkeypatch.setattr(shared, "NUMBERS_MAX", 2 * max(*ends, theirs) + 2)
    with pytest.raises(OSError, match="not many"):
        accept(frame)
    monkeypatch.setattr(shared, "NUMBERS_MAX", max(*ends, theirs))
    with pytest.raises(OSError, match="not many"):
        offer()
    assert open_descriptors() == before
    for fd in (*ends, theirs):
        os.close(fd)


def test_without_descriptors_there_is_no_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    make = os.pipe
    made: list[tuple[int, int]] = []

    def pipe() -> tuple[int, int]:
        if made:
            raise OSError(24, "Too many open files")
        made.append(make())
        return made[0]

    monkeypatch.setattr(os, "pipe", pipe)
    with pytest.raises(OSError, match="Too many"):
        offer()
    assert open_descriptors() == before
