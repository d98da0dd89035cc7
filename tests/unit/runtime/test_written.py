"""What is noted of memory: each way in which its content can change,
and that nothing else counts as one.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from achilles.runtime import written
from achilles.runtime.written import PAGE, WATCH_MIN, Watch, watch

SIZE = WATCH_MIN + 3 * PAGE
SPAWN = multiprocessing.get_context("spawn")

needs_kernel = pytest.mark.skipif(
    written._find_kernel() is None, reason="this kernel does not tell what was written to"
)


class Memory:
    """Pages of one's own, which can be written to, given back, and mapped anew."""

    def __init__(
        self, size: int = SIZE, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) -> None:
        self.map = mmap.mmap(-1, size, flags=flags)
        self.map.write(b"\1" * size)
        self.place = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def watch(self, offset: int = 0, size: int = SIZE) -> Watch:
        found = watch(self.place + offset, size)
        assert found is not None
        assert found.begin()
        assert found.is_untouched()
        return found


@pytest.fixture
def memory() -> Iterator[Memory]:
    one = Memory()
    yield one
    one.map.close()


@needs_kernel
@pytest.mark.parametrize("at", [0, PAGE - 1, SIZE // 2, SIZE - 1])
def test_a_write_is_noted_until_it_is_watched_anew(memory: Memory, at: int) -> None:
    watching = memory.watch()
    memory.map[at] = 2
    assert not watching.is_untouched()
    assert not watching.is_untouched()
    assert watching.begin()
    assert watching.is_untouched()
    memory.map[at] = 2  # the same value; nobody looks at values
    assert not watching.is_untouched()


@needs_kernel
def test_reading_is_no_writing(memory: Memory) -> None:
    watching = memory.watch()
    assert memory.map[:] == b"\1" * SIZE
    assert watching.is_untouched()


@needs_kernel
def test_what_the_kernel_writes_is_noted(memory: Memory, tmp_path: Path) -> None:
    watching = memory.watch()
    (tmp_path / "file").write_bytes(b"new")
    with open(tmp_path / "file", "rb", buffering=0) as file:
        file.readinto(memoryview(memory.map)[SIZE // 2 : SIZE // 2 + 3])
    assert not watching.is_untouched()


@needs_kernel
def test_pages_given_back_count_as_written(memory: Memory) -> None:
    watching = memory.watch()
    memory.map.madvise(mmap.MADV_DONTNEED, 4 * PAGE, PAGE)
    assert memory.map[4 * PAGE] == 0
    assert not watching.is_untouched()


@needs_kernel
def test_memory_never_touched_before_is_watched_too() -> None:
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:
        place = ctypes.addressof(ctypes.c_char.from_buffer(fresh))
        watching = watch(place, SIZE)
        assert watching is not None
        assert watching.begin()
        assert watching.is_untouched()
        fresh[SIZE // 2] = 1
        assert not watching.is_untouched()


@needs_kernel
def test_memory_mapped_anew_counts_as_written(memory: Memory) -> None:
    watching = memory.watch()
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    fixed = 0x10 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    place = ctypes.c_void_p(memory.place + 8 * PAGE)
    libc.mmap(place, ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0)
    assert not watching.is_untouched()
    assert not watching.begin()


@needs_kernel
def test_only_whole_pages_are_watched(memory: Memory) -> None:
    watching = memory.watch(100, SIZE - 300)
    assert (watching.head, watching.tail) == (PAGE - 100, PAGE - 200)
    memory.map[PAGE - 1] = 2
    memory.map[SIZE - PAGE] = 2
    assert watching.is_untouched()
    memory.map[PAGE] = 2
    assert not watching.is_untouched()


@needs_kernel
@pytest.mark.parametrize("size", [SIZE, SIZE - PAGE])
def test_a_write_counts_for_all_who_watch_though_one_begins_anew(memory: Memory, size: int) -> None:
    one, other = memory.watch(), memory.watch(size=size)
    assert one.is_untouched()
    memory.map[PAGE] = 2
    assert other.begin()
    assert other.is_untouched()
    assert not one.is_untouched()
    assert one.begin()
    assert [one.is_untouched(), other.is_untouched()] == [True, True], "nothing was written between"
    memory.map[PAGE] = 3
    assert [one.is_untouched(), other.is_untouched()] == [False, False]


@needs_kernel
def test_who_watches_other_pages_is_not_told(memory: Memory) -> None:
    half = SIZE // 2 // PAGE * PAGE
    big = Memory(4 * SIZE)
    one, other = big.watch(size=2 * SIZE), big.watch(offset=2 * SIZE, size=2 * SIZE)
    big.map[half] = 2
    assert other.begin()
    assert not one.is_untouched()
    assert one.begin()
    big.map[3 * SIZE] = 2
    assert one.is_untouched()
    assert other.begin()
    assert one.is_untouched()
    del one, other
    big.map.close()


@needs_kernel
def test_many_scattered_writes_are_all_passed_on() -> None:
    count = 2 * written.REGIONS_MAX + 3
    big = Memory((2 * count + 1) * PAGE)
    whole = big.watch(size=(2 * count + 1) * PAGE)
    last = big.watch(offset=PAGE * (2 * count - WATCH_MIN // PAGE), size=WATCH_MIN + PAGE)
    for page in range(count):
        big.map[2 * page * PAGE] = 2
    assert whole.begin()
    assert whole.is_untouched()
    assert not last.is_untouched()
    del whole, last
    big.map.close()


@needs_kernel
def test_the_end_of_one_watch_counts_as_a_write_for_another(memory: Memory) -> None:
    """The kernel forgets its notes with it; who watches next begins with none."""
    one, other = memory.watch(), memory.watch()
    del other
    assert not one.is_untouched()
    third = memory.watch()
    assert not one.is_untouched()
    assert third.is_untouched()
    assert one.begin()
    assert one.is_untouched()


@needs_kernel
def test_a_watch_that_ends_leaves_the_memory_to_others(memory: Memory) -> None:
    first = memory.watch()
    assert repr(first) == f"<Watch of {SIZE} bytes at {memory.place:#x}>"
    del first
    memory.map[0] = 2
    memory.watch()


def test_nothing_small_or_shared_or_of_a_file_is_watched(memory: Memory, tmp_path: Path) -> None:
    assert watch(memory.place, WATCH_MIN - 1) is None
    shared = Memory(flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    assert watch(shared.place, SIZE) is None
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(SIZE)
        for access in (mmap.ACCESS_COPY, mmap.ACCESS_WRITE):
            with mmap.mmap(file.fileno(), SIZE, access=access) as mapped:
                place = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                assert watch(place, SIZE) is None


def test_a_kernel_that_cannot_is_asked_once(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse() -> int:
        asked.append(1)
        raise OSError("not permitted")

    monkeypatch.setattr(written, "_userfaultfd", refuse)
    monkeypatch.setattr(written, "_kernel", None)
    monkeypatch.setattr(written, "_is_known", False)
    assert [watch(memory.place, SIZE) for _ in range(3)] == [None] * 3
    assert asked == [1]


@needs_kernel
def test_a_kernel_that_notes_too_little_is_not_trusted(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watch, "is_untouched", lambda self: True)
    monkeypatch.setattr(written, "_kernel", None)
    monkeypatch.setattr(written, "_is_known", False)
    assert watch(memory.place, SIZE) is None


def test_the_user_can_switch_it_off(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACHILLES_WATCH_MEMORY", "0")
    monkeypatch.setattr(written, "_kernel", None)
    monkeypatch.setattr(written, "_is_known", False)
    assert watch(memory.place, SIZE) is None


def _in_child(queue: Any) -> None:
    memory = Memory()
    before = memory.watch()
    pid = os.fork()
    if not pid:  # pragma: no cover - no coverage is told from there
        try:
            ok = not before.is_untouched()
            memory.map[0] = 3
            own = memory.watch()
            memory.map[0] = 4
            os._exit(0 if ok and not own.is_untouched() else 1)
        except BaseException:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    queue.put((code, before.is_untouched()))


@needs_kernel
def test_a_forked_child_watches_its_own_memory() -> None:
    queue = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=_in_child, args=(queue,))
    process.start()
    assert queue.get() == (0, True)
    process.join(30)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memfd here")
def test_a_private_mapping_of_a_file_is_as_the_file_until_it_is_written_to() -> None:
    """To read it changes nothing; nor does what is written to another mapping of it."""
    size = 40 * PAGE + 100
    fd = os.memfd_create("test")
    os.write(fd, os.urandom(size))
    one, other = (mmap.mmap(fd, size, access=mmap.ACCESS_COPY) for _ in range(2))
    place = ctypes.addressof(ctypes.c_char.from_buffer(one))
    if not written.is_as_in_file(place, size):
        pytest.skip("this kernel does not tell")
    assert sum(one[::PAGE]) >= 0
    other[0] = 1
    assert written.is_as_in_file(place, size)
    for at in (0, 7 * PAGE, size - 1):
        one[at] = one[at]
        assert not written.is_as_in_file(place, size)
        one.madvise(mmap.MADV_DONTNEED)
        assert written.is_as_in_file(place, size)
    pid = os.fork()
    if pid == 0:  # what is open stands for the parent's memory
        one[3] = 1
        os._exit(int(written.is_as_in_file(place, size)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for mapping in (one, other):
        mapping.close()
    os.close(fd)
