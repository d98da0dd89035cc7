"""Messages whose large payloads pass as references to memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest

from achilles.core.protocol import FRAMES_MAX, PART_MAX, Buffer
from achilles.errors import ProtocolError
from achilles.net import near
from achilles.net.near import KINDS, STORE_MIN, fold, store_near, unfold
from achilles.runtime import shared
from achilles.runtime.shared import Mapping, store, whole
from tests.descriptors import open_descriptors, wait_until_closed
from tests.security.attacks import attack

pytestmark = pytest.mark.skipif(not shared.IS_AVAILABLE, reason="there is no memfd here")

BIG = 300_000
HEAD = b"ac and so on"


def memory(size: int = BIG, room: int = 0) -> memoryview:
    """What may be left out of a message, once its room is filled."""
    view = store([os.urandom(size)], room)
    assert isinstance(view, memoryview)
    return view


def pieces(view: memoryview, size: int = 100_000) -> list[memoryview]:
    return [view[at : at + size] for at in range(0, len(view), size)]


def is_ours(frames: Sequence[Buffer]) -> bool:
    """Whether the transport would hand it to this module."""
    return bytes(frames[0][:2]) in KINDS


def contents(frames: Sequence[Buffer]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def crossed(frames: Sequence[Buffer]) -> list[Buffer]:
    """As they come out of a socket."""
    return [memoryview(bytes(frame)) for frame in frames]


def test_what_is_in_memory_is_left_out_and_found_again() -> None:
    one, other = memory(), memory(5)
    frames: list[Buffer] = [HEAD, b"a", *pieces(one), b"", b"b" * BIG, other, other]
    folded = fold(frames)
    assert is_ours(folded)
    assert contents(folded[1:]) == [HEAD, b"a", b"", b"b" * BIG]
    assert len(folded[0]) < 200
    found = unfold(crossed(folded), keep=False)
    assert contents(found) == contents(frames)
    found[2][:1] = b"z" if found[2][0] != ord("z") else b"y"  # type: ignore[index]
    assert found[2] != one[:100_000], "it is one's own, to write to"


@pytest.mark.parametrize(
    "frames",
    [
        lambda: [HEAD],
        lambda: [HEAD, b"x" * BIG],
        lambda: [HEAD, memory()[1:]],
        lambda: [HEAD, *pieces(memory())[:-1]],
        lambda: [HEAD, memory(room=16)],
        lambda: [HEAD, shared.copy([bytes(BIG)])],
    ],
    ids=["nothing", "bytes", "not its beginning", "not its end", "room behind it", "own memory"],
)
def test_everything_else_travels_as_it_is(frames: Callable[[], list[Buffer]]) -> None:
    message = frames()
    assert fold(message) is message
    assert not is_ours(message)


def test_a_message_of_nothing_is_not_folded() -> None:
    assert not is_ours([b""])


def test_many_pieces_of_what_is_not_whole_are_looked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []

    def note(parts: Sequence[Buffer]) -> Mapping | None:
        looked.append(len(parts))
        return whole(parts)

    monkeypatch.setattr(near, "whole", note)
    parts = pieces(memory(), 1000)[1:]
    fold([HEAD, *parts])
    assert sum(looked) <= len(parts) + 1


@pytest.mark.parametrize(("size", "is_left_out"), [(STORE_MIN - 1, False), (STORE_MIN, True)])
def test_what_is_large_is_stored_where_it_can_be_left_out(size: int, is_left_out: bool) -> None:
    data = os.urandom(size - 1)
    view = store_near([b"a", data], 16)
    assert bytes(view) == b"a" + data
    tail = shared.fill(view, b"t" * 16)
    frames: list[Buffer] = [HEAD, view, tail or b"t" * 16]
    assert is_ours(fold(frames)) is is_left_out


def test_room_that_was_filled_is_part_of_it() -> None:
    view = memory(2 * PART_MAX, 16)
    tail = shared.fill(view, b"t" * 16)
    assert tail is not None
    frames: list[Buffer] = [HEAD, *pieces(view, PART_MAX), tail]
    folded = fold(frames)
    assert contents(folded[1:]) == [HEAD]
    assert contents(unfold(crossed(folded), keep=False)) == contents(frames)


def test_what_is_kept_can_be_folded_again() -> None:
    frames: list[Buffer] = [HEAD, *pieces(memory())]
    kept = unfold(crossed(fold(frames)), keep=True)
    assert contents(unfold(crossed(fold(kept)), keep=True)) == contents(frames)
    used = unfold(crossed(fold(frames)), keep=False)
    assert fold(used) is used


def test_without_mappings_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[Buffer] = [HEAD, *pieces(memory())]
    folded = fold(frames)
    monkeypatch.setattr(shared, "MAPPINGS_MAX", 0)
    before = open_descriptors()
    found = unfold(crossed(folded), keep=True)
    assert contents(found) == contents(frames)
    assert fold(found) is found
    assert open_descriptors() == before


def test_nothing_stays_open() -> None:
    before = open_descriptors()
    for keep in (False, True):
        one, other = memory(), memory()
        unfold(crossed(fold([HEAD, one, other])), keep=keep)
        del one, other
    wait_until_closed(before)


# --- What cannot be unfolded ----------------------------------------------------------------------


def told(view: memoryview, **changes: int) -> list[Buffer]:
    """A folded message that says something else of its memory."""
    mapping = view.obj
    assert isinstance(mapping, Mapping)
    values = {
        "pid": os.getpid(),
        "fd": mapping.fd,
        "inode": os.fstat(mapping.fd).st_ino,
        "size": len(view),
        "at": 1,
        **changes,
    }
    piece = near._PIECE.pack(values["at"], values["fd"], values["inode"], 1)
    head = near._HEAD.pack(near.MAGIC, values["pid"], 1) + piece
    return [head + values["size"].to_bytes(4, "little"), HEAD]


@attack("T39")
def test_what_is_told_of_memory_has_to_be_true() -> None:
    view = memory()
    assert contents(unfold(told(view), keep=False)) == [HEAD, bytes(view)]
    read, write = os.pipe()
    unfilled = memory(room=16)
    wrong: list[list[Buffer]] = [
        told(view, inode=1),
        told(view, size=len(view) - 1),
        told(view, size=0),
        told(view, fd=9999),
        told(view, pid=2**22 + 1),
        told(unfilled, size=BIG + 16),
        told(view, fd=read, inode=os.fstat(read).st_ino, size=0),
    ]
    before = open_descriptors()
    for frames in wrong:
        with pytest.raises(OSError, match=r"No such file|not the memory that was meant"):
            unfold(frames, keep=True)
    assert open_descriptors() == before
    os.close(read)
    os.close(write)


@attack("T39")
def test_a_file_is_no_memory(tmp_path: object) -> None:
    """Whoever sends is not let choose what is opened and handed to tasks."""
    path = f"{tmp_path}/secret"
    with open(path, "w+b") as file:
        file.write(bytes(BIG))
        file.flush()
        inode = os.fstat(file.fileno()).st_ino
        with pytest.raises(OSError, match="not the memory that was meant"):
            unfold(told(memory(), fd=file.fileno(), inode=inode), keep=False)


def test_every_beginning_of_a_folded_message_is_refused() -> None:
    frames: list[Buffer] = [HEAD, *pieces(memory()), b"x", memory(5)]
    (head, *rest) = fold(frames)
    for size in range(len(head)):
        if is_ours([head[:size]]):
            with pytest.raises(ProtocolError):
                unfold([head[:size], *rest], keep=False)


@pytest.mark.parametrize(
    "change", [{"at": 3}, {"at": FRAMES_MAX + 1}], ids=["beyond the frames", "beyond all bounds"]
)
def test_pieces_lie_between_the_frames_that_are_there(change: dict[str, int]) -> None:
    with pytest.raises(ProtocolError):
        unfold(told(memory(), **change), keep=False)


def test_pieces_are_in_order_and_not_endless() -> None:
    view = memory(5)
    (head, _) = told(view)
    piece = bytes(head)[near._HEAD.size :]
    start = near._HEAD.pack(near.MAGIC, os.getpid(), 2)
    first = near._PIECE.pack(0, *near._PIECE.unpack(piece[: near._PIECE.size])[1:])
    backwards = start + piece + first + piece[near._PIECE.size :]
    with pytest.raises(ProtocolError, match="out of order"):
        unfold([backwards, HEAD], keep=False)
    _, fd, inode, _ = near._PIECE.unpack(piece[: near._PIECE.size])
    for count in (0, FRAMES_MAX + 1):
        endless = near._HEAD.pack(near.MAGIC, os.getpid(), 1) + near._PIECE.pack(
            1, fd, inode, count
        )
        with pytest.raises(ProtocolError, match="too many"):
            unfold([endless, HEAD], keep=False)
