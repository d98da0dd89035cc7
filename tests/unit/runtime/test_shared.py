"""Memory that is handed from process to process."""

from __future__ import annotations

import math
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from achilles.runtime import shared, written
from achilles.runtime.shared import (
    COPY_MAX,
    HUGE_MIN,
    Handoff,
    adopt,
    copy,
    fill,
    fresh,
    store,
    whole,
)
from tests.descriptors import open_descriptors, wait_until_closed

pytestmark = pytest.mark.skipif(not shared.IS_AVAILABLE, reason="there is no memfd here")

BIG = 300_000

written.is_as_in_file(0, 1)  # opens a descriptor that stays


@pytest.fixture
def ends() -> Iterator[tuple[Handoff, Handoff]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    before = open_descriptors()
    yield Handoff(near), Handoff(far)
    wait_until_closed(before)
    near.close()
    far.close()


def test_parts_arrive_as_one_and_in_order(ends: tuple[Handoff, Handoff]) -> None:
    near, far = ends
    assert near.send([b"head", b"", bytearray(BIG), memoryview(b"tail")])
    assert near.send([b"x"] * 1000)
    first = far.receive()
    assert bytes(first) == b"head" + bytes(BIG) + b"tail"
    first[0] = 0  # writable
    assert bytes(far.receive()) == b"x" * 1000


def test_what_was_stored_is_handed_over_as_it_is(
    ends: tuple[Handoff, Handoff], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ends
    stored = store([b"ab", b"cd" * BIG])
    assert isinstance(stored, memoryview)
    monkeypatch.setattr(shared, "_write", None)  # not to be called any more
    assert near.send([stored])
    assert near.send([stored])
    first, second = far.receive(), far.receive()
    first[:2] = b"zz"
    assert bytes(second[:4]) == bytes(stored[:4]) == b"abcd"


def test_a_part_of_what_was_stored_is_copied(ends: tuple[Handoff, Handoff]) -> None:
    near, far = ends
    stored = store([b"0123456789"])
    assert isinstance(stored, memoryview)
    assert near.send([stored[2:5]])
    assert bytes(far.receive()) == b"234"


@pytest.mark.parametrize("size", [0, BIG, HUGE_MIN, HUGE_MIN + 12345])
def test_a_copy_is_of_this_moment_and_holds_no_descriptor(size: int) -> None:
    before = open_descriptors()
    source = bytearray(os.urandom(size))
    copied = copy([b"head", source, b"", memoryview(b"tail")])
    wanted = b"head" + source + b"tail"
    source[:] = bytes(size)
    assert copied == wanted
    assert open_descriptors() == before


def test_a_copy_needs_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_ADVICE", -1)  # which no kernel knows
    assert copy([bytes(HUGE_MIN), b"x"])[-1] == ord("x")
    monkeypatch.setattr(shared, "_ADVICE", None)  # as where there is no such call
    assert copy([bytes(HUGE_MIN), b"x"])[-1] == ord("x")


def test_the_memory_of_a_copy_serves_the_next_one() -> None:
    """Once nobody uses it, and if it is not much larger."""
    shared.forget_copy(math.inf)
    one = copy([b"1" * HUGE_MIN, b"2" * HUGE_MIN])
    place = id(one.obj)
    other = copy([b"3" * HUGE_MIN])
    assert id(other.obj) != place
    assert (one[0], one[-1], other[0]) == (ord("1"), ord("2"), ord("3"))
    piece = other[5:6]
    place = id(other.obj)
    del other
    again = copy([b"4" * HUGE_MIN])
    assert id(again.obj) != place
    assert bytes(piece) == b"3"
    place = id(again.obj)
    del again
    again = copy([b"5" * (HUGE_MIN + 1)])  # does not fit
    assert id(again.obj) != place
    place = id(again.obj)
    del again
    again = copy([b"6" * HUGE_MIN])
    assert id(again.obj) == place
    assert again == b"6" * HUGE_MIN
    del again
    large = copy([b"7" * 4 * HUGE_MIN])
    place = id(large.obj)
    del large
    assert id(copy([b"8" * HUGE_MIN]).obj) != place  # would hold three times as much


def test_the_memory_of_a_copy_is_not_kept_for_long() -> None:
    one = copy([b"1" * HUGE_MIN])
    shared.forget_copy(math.inf)
    assert shared._last_copy.spare is one.obj
    made = time.monotonic()
    del one
    shared.forget_copy(made - 60.0)
    assert shared._last_copy.spare is not None
    shared.forget_copy(made + 60.0)
    assert shared._last_copy.spare is None


def test_nobody_waits_for_who_takes_memory_for_a_copy() -> None:
    """A thread that does not exist in a forked child may have held the lock at the fork."""
    one = copy([b"1" * HUGE_MIN])
    place = id(one.obj)
    del one
    with shared._last_copy._lock:
        other = copy([b"2" * HUGE_MIN])
        shared.forget_copy(math.inf)
    assert id(other.obj) != place
    assert other == b"2" * HUGE_MIN
    assert id(copy([b"3" * HUGE_MIN]).obj) == place


def test_copies_in_many_threads_do_not_meet() -> None:
    def check(number: int) -> bool:
        wanted = bytes([number]) * (HUGE_MIN + number)
        return all(copy([wanted]) == wanted for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(check, range(4)))


def test_a_copy_is_handed_over_as_another_copy(ends: tuple[Handoff, Handoff]) -> None:
    near, far = ends
    copied = copy([b"x" * HUGE_MIN])
    assert near.send([copied])
    received = far.receive()
    received[:1] = b"y"
    assert bytes(received[1:]) == copied[1:]
    assert copied[0] == ord("x")


def test_beyond_the_limit_of_mappings_all_is_copied(
    ends: tuple[Handoff, Handoff], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ends
    monkeypatch.setattr(shared, "MAPPINGS_MAX", 0)
    assert store([b"ab", b"c"]) == b"abc"
    assert near.send([b"x" * BIG])
    copy = far.receive()
    copy[0] = 1
    assert bytes(copy[1:]) == b"x" * (BIG - 1)


def test_descriptors_are_freed_with_the_last_use() -> None:
    before = open_descriptors()
    stored = store([bytes(BIG)])
    piece = memoryview(stored)[5:9]
    del stored
    assert open_descriptors() - before
    del piece
    wait_until_closed(before)


def test_no_memory_and_no_descriptors(
    ends: tuple[Handoff, Handoff], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "memfd_create", fail)
    assert store([b"ab", b"c"]) == b"abc"
    assert not ends[0].send([b"x"])


def test_a_peer_that_does_not_keep_up(ends: tuple[Handoff, Handoff]) -> None:
    near, far = ends
    stored = store([b"x" * 10])
    count = 0
    while count < 100_000 and near.send([stored]):
        count += 1
    assert 0 < count < 100_000
    for _ in range(count):
        assert bytes(far.receive()) == b"x" * 10
    with pytest.raises(BlockingIOError):
        far.receive()


def test_a_payload_without_its_memory() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.send(b"m")
        with pytest.raises(OSError, match="too many open files"):
            Handoff(far).receive()


def test_what_is_kept_can_be_had_anew(
    ends: tuple[Handoff, Handoff], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ends
    assert near.send([bytes(BIG)])
    received = far.receive(keep=True)
    first, second = fresh(received), fresh(received)
    assert isinstance(first, memoryview)
    assert isinstance(first.obj, shared.Mapping)
    first[0] = 1
    assert (first[0], second[0], received[0]) == (1, 0, 0)
    monkeypatch.setattr(shared, "MAPPINGS_MAX", 0)
    copied = fresh(received)
    assert type(copied) is bytearray
    assert len(copied) == BIG
    monkeypatch.undo()
    assert near.send([b"small"])
    assert bytes(fresh(far.receive())) == b"small"  # not kept: a copy
    del first, second, received


def received(size: int = BIG, *, keep: bool) -> memoryview:
    """What a runner has of a large argument."""
    near, far = socket.socketpair()
    with near, far:
        assert Handoff(near).send([bytes(size)])
        return Handoff(far).receive(keep=keep)


def mapping_of(view: memoryview | bytearray) -> shared.Mapping:
    assert isinstance(view, memoryview)
    mapping: object = view.obj
    assert isinstance(mapping, shared.Mapping)
    return mapping


@pytest.fixture
def kept() -> memoryview:
    return received(keep=True)


def test_what_nobody_uses_any_more_is_given_again(kept: memoryview) -> None:
    """Mapped once for all tasks that only read."""
    first = fresh(kept)
    mapping = id(mapping_of(first))
    assert first[BIG - 1] == 0
    del first
    second = fresh(kept)
    assert id(mapping_of(second)) == mapping
    third = fresh(kept)  # while the second is used
    assert id(mapping_of(third)) != mapping


@pytest.mark.parametrize("at", [0, 4096, BIG - 1])
@pytest.mark.parametrize("tells", [True, False])
def test_what_was_written_is_not_there_the_next_time(
    kept: memoryview, at: int, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the kernel tells that it was."""
    if not tells:
        monkeypatch.setattr(written, "_PAGEMAP_SCAN", 0xC0606600)  # which no kernel knows
    for _ in range(3):
        mine = fresh(kept)
        assert bytes(mine) == bytes(BIG)
        mine[at] = 7
        del mine
    shared.tidy()
    spare = mapping_of(kept).spare
    assert spare is not None
    assert spare.is_clean
    del spare
    assert bytes(fresh(kept)) == bytes(BIG)


def test_what_a_system_call_wrote_counts_too(kept: memoryview) -> None:
    mine = fresh(kept)
    with open("/dev/urandom", "rb", buffering=0) as source:
        assert source.readinto(mine[5000:6000]) == 1000
    del mine
    assert bytes(fresh(kept)) == bytes(BIG)


def test_the_memory_of_what_was_written_is_let_go_of(kept: memoryview) -> None:
    mine = fresh(kept)
    mine[:] = b"x" * BIG
    mapping = mapping_of(mine)
    shared.tidy()  # it is in use
    assert mine[5] == ord("x")
    assert not written.is_as_in_file(mapping.address, BIG)
    del mine, mapping
    shared.tidy()
    spare = mapping_of(kept).spare
    assert spare is not None
    assert written.is_as_in_file(spare.address, BIG)


def test_a_mapping_that_cannot_be_put_right_is_not_given_again(
    kept: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked in memory, or on a system without the call."""
    for advice in (None, -1):
        mine = fresh(kept)
        mine[0] = 1
        mapping = id(mapping_of(mine))
        del mine
        monkeypatch.setattr(shared, "_DROP", advice)
        again = fresh(kept)
        assert again[0] == 0
        assert id(mapping_of(again)) != mapping
        again[0] = 1
        del again
        shared.tidy()
        assert mapping_of(kept).spare is None
        monkeypatch.undo()


def test_a_mapping_that_a_task_has_closed_is_not_given_again(kept: memoryview) -> None:
    mapping_of(fresh(kept)).close()
    assert bytes(fresh(kept)) == bytes(BIG)
    mapping_of(fresh(kept)).close()
    shared.tidy()
    assert mapping_of(kept).spare is None
    assert bytes(fresh(kept)) == bytes(BIG)


def test_spares_give_way_to_what_is_used(kept: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of mappings is bounded."""
    fresh(kept)
    assert mapping_of(kept).spare is not None
    monkeypatch.setattr(shared, "MAPPINGS_MAX", len(shared._mappings))
    another = received(keep=False)
    assert mapping_of(another)
    assert mapping_of(kept).spare is None
    assert type(fresh(kept)) is bytearray


# --- Memory that changes no more ------------------------------------------------------------------


def test_what_has_room_behind_it_is_final_once_that_is_filled() -> None:
    view = store([b"ab", bytes(BIG)], 4)
    mapping = mapping_of(view)  # type: ignore[arg-type]
    assert (len(view), mapping.is_final) == (BIG + 2, False)
    assert bytes(fill(view, b"tail") or b"") == b"tail"
    assert mapping.is_final
    assert bytes(mapping[:]) == b"ab" + bytes(BIG) + b"tail"
    assert bytes(fill(view, b"tail") or b"") == b"tail", "the same again is there"
    assert fill(view, b"liat") is None, "another is not"
    assert bytes(mapping[-4:]) == b"tail"


@pytest.mark.parametrize(
    "payload",
    [
        lambda: b"x" * BIG,
        lambda: memoryview(b"x" * BIG),
        lambda: store([bytes(BIG)]),
        lambda: store([bytes(BIG)], 3),
        lambda: copy([bytes(BIG)], 4),
    ],
)
def test_nothing_is_filled_where_there_is_no_such_room(payload: Callable[[], Any]) -> None:
    assert fill(payload(), b"tail") is None


def test_room_that_cannot_be_written_to_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    view = store([bytes(BIG)], 4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        assert fill(view, b"tail") is None
    assert bytes(fill(view, b"tail") or b"") == b"tail"


def test_final_memory_can_be_changed_by_nobody() -> None:
    view = store([bytes(BIG)])
    fd = mapping_of(view).fd  # type: ignore[arg-type]
    for change in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 1),
        lambda: os.ftruncate(fd, 2 * BIG),
        lambda: mmap.mmap(fd, BIG),
    ):
        with pytest.raises(PermissionError):
            change()
    view[:1] = b"x"  # type: ignore[index]
    assert bytes(adopted(view, keep=False)[:1]) == b"\0", "one's own mapping of it is one's own"


def adopted(view: Any, *, keep: bool) -> memoryview:
    fd = mapping_of(view).fd
    return adopt(os.getpid(), fd, os.fstat(fd).st_ino, len(mapping_of(view)), keep=keep)


def test_what_is_adopted_is_mapped_unless_it_is_small_and_for_nobody_else() -> None:
    for size, keep, is_mapped in (
        (COPY_MAX - 1, False, False),
        (COPY_MAX - 1, True, True),
        (COPY_MAX, False, True),
    ):
        source = store([os.urandom(size)])
        found = adopted(source, keep=keep)
        assert bytes(found) == bytes(source)
        assert isinstance(found.obj, shared.Mapping) is is_mapped
        assert not found.readonly


def test_what_is_no_memory_is_not_even_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a fifo, for example, lets who waits to write into it go on."""
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDWR)

    def fail(path: object, *args: object) -> int:
        raise AssertionError(f"{path} was opened")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            with pytest.raises(OSError, match="is not the memory that was meant"):
                adopt(os.getpid(), fd, os.fstat(fd).st_ino, BIG, keep=False)
    finally:
        os.close(fd)


def test_pieces_of_memory_are_known_to_be_all_of_it() -> None:
    one, other = store([bytes(BIG)]), store([bytes(BIG)])
    assert isinstance(one, memoryview)
    halves = [one[: BIG // 2], one[BIG // 2 :]]
    assert whole(halves) is whole([one]) is one.obj
    assert store(halves) == one
    others: list[list[Any]] = [
        [],
        halves[:1],
        [*halves, b""],
        [halves[0], other[BIG // 2 :]],
        [bytes(BIG)],
    ]
    for parts in others:
        assert whole(parts) is None


def test_what_is_kept_is_counted_until_it_is_gone() -> None:
    before = shared.kept_bytes()
    view: Any = store([bytes(BIG)])
    received: Any = adopted(view, keep=True)
    assert shared.kept_bytes() == before + 2 * BIG
    mapped = adopted(store([bytes(COPY_MAX)]), keep=False)
    assert shared.kept_bytes() == before + 2 * BIG
    del view, received, mapped
    assert shared.kept_bytes() == before


def test_descriptors_are_left_to_the_program(
    ends: tuple[Handoff, Handoff], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one that has hundreds, or `select` in it, which takes numbers below 1024."""
    near, far = ends
    data = os.urandom(COPY_MAX)
    there: Any = store([data])
    assert near.send([data])
    lowest = os.dup(0)
    os.close(lowest)
    monkeypatch.setattr(shared, "NUMBERS_MAX", lowest)
    before = open_descriptors()
    assert type(store([data])) is bytes
    assert not near.send([data])
    received = far.receive(keep=True)
    assert bytes(received) == data
    assert not isinstance(received.obj, shared.Mapping)
    found = adopted(there, keep=True)
    assert bytes(found) == data
    assert not isinstance(found.obj, shared.Mapping)
    assert open_descriptors() <= before


def test_limits_are_looked_at_anew_where_all_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(shared, "NUMBERS_MAX", 1)
    monkeypatch.setattr(shared, "MAPPINGS_MAX", 1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64_000, 64_000))
    shared.note_limits()
    assert (shared.NUMBERS_MAX, shared.MAPPINGS_MAX) == (32_000, 4000)
