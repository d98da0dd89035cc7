"""`python -m tests.reliability.detection`: how soon what died or froze is noticed,
and its tasks run elsewhere (R4).

Shipped timings. From the signal until the task's next execution begins, which is later than its
requeueing: the limits are therefore held with something to spare.
There is a free slot for each task that is to move.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator

import psutil

from achilles import DistributedExecutor
from tests.chaos import work
from tests.chaos.history import Execution
from tests.chaos.rig import Rig, Started
from tests.reliability import measure

RUNNER_SECONDS, WORKER_SECONDS, FROZEN_SECONDS = 0.25, 3.0, 17.0
WORKERS, AT_ONCE = 8, 4  # so many of them are killed or frozen together


def main() -> int:
    """Measure all three; 1 if one is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.detection")
    parser.add_argument("--runners", type=int, default=200)
    parser.add_argument("--workers", type=int, default=40)
    parser.add_argument("--frozen", type=int, default=10)
    options = parser.parse_args()
    numbers = itertools.count(1)
    with measure.rig(2, 2, measure.SHIPPED) as rig, measure.executor(rig) as executor:
        runners = kill_runners(rig, executor, numbers, options.runners)
    with measure.rig(WORKERS, 1, measure.SHIPPED) as rig, measure.executor(rig) as executor:
        workers = befall(rig, executor, numbers, options.workers, signal.SIGKILL)
        frozen = befall(rig, executor, numbers, options.frozen, signal.SIGSTOP)
    p99 = measure.quantile(runners, 0.99)
    texts = [
        f"runner p99 {1000 * p99:.0f} ms of {len(runners)} (median {1000 * measure.quantile(runners, 0.5):.0f} ms)",
        f"worker at most {max(workers):.2f} s of {len(workers)}",
        f"frozen at most {max(frozen):.1f} s of {len(frozen)}",
    ]
    held = [p99 <= RUNNER_SECONDS, max(workers) <= WORKER_SECONDS, max(frozen) <= FROZEN_SECONDS]
    return measure.finish("; ".join(texts), [t for t, holds in zip(texts, held) if not holds])


def kill_runners(
    rig: Rig, executor: DistributedExecutor, numbers: Iterator[int], count: int
) -> list[float]:
    """Kill runners one by one in the middle of their task."""
    found = []
    list(executor.map(work.sleep, itertools.islice(numbers, 8), [str(rig.log)] * 8, [0.2] * 8))
    for number in itertools.islice(numbers, count):
        future = executor.submit(work.sleep, number, str(rig.log), 0.1)
        (first,) = measure.await_runs(rig, lambda runs: runs.get(number), "the task begins")  # noqa: B023
        found.append(_killed(rig, first))
        assert future.result(measure.WAIT_SECONDS) == work.mix(number)
    return found


def _killed(rig: Rig, first: Execution) -> float:
    """Kill its runner; seconds until it begins again."""
    killed_at = time.monotonic()
    os.kill(first.pid, signal.SIGKILL)
    return _begun_again(rig, first) - killed_at


def _begun_again(rig: Rig, first: Execution) -> float:
    def again(runs: dict[int, list[Execution]]) -> list[float]:
        return [run.at for run in runs[first.number] if run.is_begin and run.pid != first.pid]

    begins: list[float] = measure.await_runs(rig, again, f"task {first.number} begins again")
    return begins[0]


def befall(
    rig: Rig,
    executor: DistributedExecutor,
    numbers: Iterator[int],
    count: int,
    number: signal.Signals,
) -> list[float]:
    """Kill or freeze workers, several at once, each with one long task;
    seconds until those begin again.
    """
    found: list[float] = []
    while len(found) < count:
        tasks = list(itertools.islice(numbers, AT_ONCE))
        futures = [executor.submit(work.sleep, task, str(rig.log), 0.7) for task in tasks]
        first: dict[int, Execution] = measure.await_runs(
            rig,
            lambda runs: {t: runs[t][0] for t in tasks} if set(tasks) <= set(runs) else None,  # noqa: B023
            "all tasks begin",
        )
        hosts = [_host(rig, run) for run in first.values()]
        at = time.monotonic()
        for host in hosts:
            host.process.send_signal(number)
        frozen = [one for host in hosts for one in _stopped(host, number)]
        try:
            found += [_begun_again(rig, run) - at for run in first.values()]
        finally:
            for process in frozen:
                process.resume()
            for host in hosts:
                host.process.send_signal(signal.SIGCONT)
        for future, task in zip(futures, tasks):
            assert future.result(measure.WAIT_SECONDS) == work.mix(task)
        while not all(worker.is_running for worker in rig.workers):
            rig.tend(time.monotonic())
            time.sleep(0.02)
        rig.await_status(lambda status: status["workers"] == WORKERS, "all workers are back")
    return found


def _stopped(host: Started, number: signal.Signals) -> list[psutil.Process]:
    """A host that freezes does so with its runners."""
    if number != signal.SIGSTOP:
        return []
    runners = psutil.Process(host.process.pid).children()
    for runner in runners:
        runner.suspend()
    return runners


def _host(rig: Rig, run: Execution) -> Started:
    """The worker on which it runs."""
    parent = psutil.Process(run.pid).ppid()
    return next(worker for worker in rig.workers if worker.process.pid == parent)


if __name__ == "__main__":
    sys.exit(main())
