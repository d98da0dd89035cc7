"""How much memory a process has for itself."""

from __future__ import annotations

import mmap
import os

from achilles.runtime.memory import resident

SIZE, PIECE = 64 << 20, 1 << 20


def fill(memory: mmap.mmap) -> None:
    """Touch all of it, without as much again on the heap, where some may lie free from before."""
    for _ in range(SIZE // PIECE):
        memory.write(b"x" * PIECE)


def test_what_is_touched_counts() -> None:
    before = resident(os.getpid())
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
        fill(own)
        assert resident(os.getpid()) - before > SIZE // 2


def test_what_is_shared_does_not_count() -> None:
    before = resident(os.getpid())
    with mmap.mmap(-1, SIZE) as shared:  # anonymous and shared, as memory that is handed over
        fill(shared)
        assert resident(os.getpid()) - before < SIZE // 2


def test_a_process_that_is_gone_has_none() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert resident(pid) == 0
