"""What the benchmarks' tasks do. A module of its own, so that functions travel by name;
workers of all systems import it.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

POLL_SECONDS = 0.01


def noop(value: object = None) -> object:
    """Return the argument."""
    return value


def spin(seconds: float) -> float:
    """Keep a core busy for a time by the clock on the wall."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def burn(index: int, seconds: float) -> tuple[int, int, float, float]:
    """Use that much of a core's time; the index, this process,
    and from when to when by the system's monotonic clock.

    It is CPU time, so that what a system itself computes beside the tasks is not hidden in them.
    """
    start = time.monotonic()
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return index, os.getpid(), start, time.monotonic()


def burn_pair(pair: tuple[int, float]) -> tuple[int, int, float, float]:
    """`burn` for a `map` of one argument."""
    return burn(*pair)


def tell_and_wait(directory: str, seconds: float) -> int:
    """Leave a file named by this process and the moment, then sleep:
    shows when and where a task began.
    """
    path = os.path.join(directory, f"{os.getpid()}-{time.monotonic_ns()}")
    with open(path, "x"):
        pass
    time.sleep(seconds)
    return os.getpid()


def wait_for_file(path: str, index: int, seconds: float) -> int:
    """Tell by a file ``path.INDEX`` that this runs, then hold a slot until ``path`` exists;
    the index.

    Raises:
        TimeoutError: it does not come to exist.
    """
    with open(f"{path}.{index}", "w"):
        pass
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} was not made within {seconds} s")
        time.sleep(POLL_SECONDS)
    return index


def last_byte(data: Any, index: int) -> tuple[int, int]:
    """The index, and the last byte of the data."""
    return index, int(data[-1])


def filled(size: int, value: int) -> Any:
    """An array of that many bytes, all of that value."""
    import numpy as np

    return np.full(size, value, np.uint8)


def run_many(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """A chunk by hand, for systems whose `map` takes no chunk size."""
    return [function(item) for item in items]


def text_of(seed: int, words: int) -> str:
    """A text of so many words, of which few are frequent and many are rare;
    the same for the same seed.
    """
    draw = random.Random(seed)
    return " ".join(f"w{int(draw.paretovariate(0.7))}" for _ in range(words))


def count_words(text: str) -> dict[str, int]:
    """How often each word is in the text."""
    return dict(Counter(text.split()))
