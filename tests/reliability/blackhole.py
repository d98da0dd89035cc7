"""`python -m tests.reliability.blackhole`: of twelve workers one ends every task at once, as a host
does that lacks a library (R8).

Such a worker is always free, so that without a rule against it most of the tasks would go there,
three times each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from achilles import DistributedExecutor
from benchmarks.cluster import Cluster
from tests.reliability import measure

WORKERS = 12
EATEN_MAX = 20
HOLE = "ACHILLES_TESTS_HOLE"  # the file that the bad worker's runners write to


def mix(number: int) -> int:
    """Some milliseconds of work; on the bad worker, the end of its process."""
    hole = os.environ.get(HOLE)
    if hole:
        with open(hole, "a") as log:
            log.write(f"{number}\n")
        os._exit(9)
    time.sleep(0.01)
    return 3 * number + 1


def run(tasks: int) -> tuple[int, int, int, float]:
    """Submit so many: how many the bad worker was given, how many failed, how many are wrong,
    and the seconds.
    """
    with tempfile.TemporaryDirectory() as folder, Cluster(WORKERS - 1, 1) as cluster:
        hole = Path(folder, "hole")
        hole.touch()
        cluster.environ[HOLE] = str(hole)
        cluster.add_worker(1)
        cluster.wait_until(lambda status: status["workers"] == WORKERS)
        os.environ["ACHILLES_HOME"] = cluster.home
        began = time.monotonic()
        with DistributedExecutor(address=cluster.address) as executor:
            futures = {number: executor.submit(mix, number) for number in range(tasks)}
            errors = {n: future.exception(measure.WAIT_SECONDS) for n, future in futures.items()}
        failed = sum(error is not None for error in errors.values())
        wrong = sum(
            futures[n].result() != 3 * n + 1 for n, error in errors.items() if error is None
        )
        eaten = len(hole.read_text().split())
        return eaten, failed, wrong, time.monotonic() - began


def main() -> int:
    """Run it some times; 1 if the bad worker took too many, or none: then nothing was shown."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.blackhole")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=10_000)
    options = parser.parse_args()
    failures = []
    most = lost = 0
    for number in range(options.runs):
        eaten, failed, wrong, seconds = run(options.tasks)
        print(f"run {number + 1}: {eaten} eaten, {failed} failed, {wrong} wrong, {seconds:.1f} s")
        most, lost = max(most, eaten), lost + failed + wrong
        if not 0 < eaten <= EATEN_MAX:
            failures.append(f"run {number + 1}: the bad worker was given {eaten} tasks")
    if lost:
        failures.append(f"{lost} tasks failed, or are wrong")
    return measure.finish(
        f"one of {WORKERS} workers ended each task at once, {options.runs} times: it was given {most} of {options.tasks} at most, "
        f"{lost} failed",
        failures,
    )


if __name__ == "__main__":
    sys.exit(main())
