"""The descriptors of this process: which are open,
and whether those that a test opened are closed again.
"""

from __future__ import annotations

import gc
import os

from tests.modes import wait_until

Descriptors = frozenset[tuple[int, int, int]]


def open_descriptors() -> Descriptors:
    """Number, device and inode of each: a number that was given out again is another descriptor."""
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # the one that the directory was read through
        found.add((int(name), status.st_dev, status.st_ino))
    return frozenset(found)


def wait_until_closed(before: Descriptors, more: int = 0) -> None:
    """Wait until no more than ``more`` are open that were not open before.

    libzmq closes sockets in a thread of its own, some time after it was asked to.
    """
    gc.collect()
    wait_until(
        lambda: len(open_descriptors() - before) <= more, f"descriptors of {before} alone are open"
    )
