"""What the benchmarks' tasks do. A module of its own, so that functions travel by name."""

from __future__ import annotations

import os
import time
from typing import Any


def noop(value: object = None) -> object:
    """Return the argument."""
    return value


def spin(seconds: float) -> float:
    """Keep a core busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def tell_and_wait(directory: str, seconds: float) -> int:
    """Leave a file named by this process and the moment, then sleep: shows when and where a task began."""
    path = os.path.join(directory, f"{os.getpid()}-{time.monotonic_ns()}")
    with open(path, "x"):
        pass
    time.sleep(seconds)
    return os.getpid()


def last_byte(data: Any, index: int) -> tuple[int, int]:
    """The index, and the last byte of the data."""
    return index, int(data[-1])
