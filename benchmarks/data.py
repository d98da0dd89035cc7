"""What large arguments cost: ``python -m benchmarks.data``.

64 MiB once, against ProcessPoolExecutor in the same run; and the same 64 MiB in 200 tasks, against
once. Bytes are known again by their identity; arrays are compared at each call, because they can be
written to. Each result is checked.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from achilles import DistributedExecutor
from benchmarks.quick import MIB, Report, clustered
from benchmarks.work import last_byte

SIZE = 64 * MIB
TASKS = 200
ROUNDS = 5

Make = Callable[[], Any]


def make_array() -> Any:
    return np.frombuffer(bytearray(os.urandom(SIZE)), np.uint8)


def make_bytes() -> bytes:
    return os.urandom(SIZE)


def once(executor: Executor, make: Make) -> float:
    """Seconds of one task with a new argument."""
    data = make()
    start = time.perf_counter()
    assert executor.submit(last_byte, data, 0).result() == (0, data[-1])
    return time.perf_counter() - start


def many(executor: Executor, make: Make) -> float:
    """Seconds of `TASKS` tasks with the same new argument."""
    data = make()
    start = time.perf_counter()
    futures = [executor.submit(last_byte, data, index) for index in range(TASKS)]
    assert [future.result() for future in futures] == [(n, data[-1]) for n in range(TASKS)]
    return time.perf_counter() - start


def many_of_a_function(executor: Executor, make: Make) -> float:
    """Seconds of a `map` whose function holds the argument."""
    data = make()
    start = time.perf_counter()
    found = list(executor.map(partial(last_byte, data), range(TASKS)))
    assert found == [(n, data[-1]) for n in range(TASKS)]
    return time.perf_counter() - start


def main() -> int:
    report = Report()
    rounds: dict[str, list[float]] = {}
    with ProcessPoolExecutor(2) as pool, DistributedExecutor(2) as local, clustered() as cluster:
        contestants: dict[str, Executor] = {"pool": pool, "embedded": local, "cluster": cluster}
        for executor in contestants.values():
            list(executor.map(abs, range(100)))
        for _ in range(ROUNDS):
            for name, executor in contestants.items():
                for make in (make_array, make_bytes):
                    kind = make.__name__[5:]
                    rounds.setdefault(f"{name} {kind} once", []).append(once(executor, make))
                    if name != "pool":
                        rounds.setdefault(f"{name} {kind} many", []).append(many(executor, make))
                        rounds.setdefault(f"{name} {kind} held", []).append(
                            many_of_a_function(executor, make)
                        )
    figures = {name: statistics.median(times) for name, times in rounds.items()}
    for name, seconds in figures.items():
        print(f"{name:<24} {seconds * 1e3:9.1f} ms")
    print()
    for name, limit in (("embedded", 0.15), ("cluster", 0.8)):
        for kind in ("array", "bytes"):
            one = figures[f"{name} {kind} once"]
            ratio = one / figures[f"pool {kind} once"]
            report.row(f"{name}, 64 MiB {kind}: of the pool", ratio, "x", limit, at_least=False)
            for how, what in (("many", "in 200 tasks"), ("held", "in the function of a map")):
                ratio = figures[f"{name} {kind} {how}"] / one
                text = f"{name}, 64 MiB {kind} {what}: of one transfer"
                report.row(text, ratio, "x", 1.5, at_least=False)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
