"""Memory that is handed from process to process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from achilles.runtime import shared
from achilles.runtime.shared import HUGE_MIN, Handoff, copy, fresh, store
from tests.descriptors import open_descriptors, wait_until_closed

pytestmark = pytest.mark.skipif(not shared.IS_AVAILABLE, reason="there is no memfd here")

BIG = 300_000


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
