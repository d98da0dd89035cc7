"""Many runs, in one process or in several."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.sim.plan import Trim
from tests.sim.simulation import SimulationError, simulate

CHUNK = 40


class Batch(NamedTuple):
    """Runs that a process does in one go."""

    runs: list[tuple[int, Trim]]
    keep_going: bool
    until: frozenset[str]  # go on until one of these rules is broken


class Report(NamedTuple):
    """What came of some runs."""

    marks: Counter[str]
    steps: int
    traces: list[str]
    failures: list[tuple[int, Trim, str, str]]  # seed, trim, check, text


def reports(batches: list[Batch], jobs: int) -> Iterator[Report]:
    """What came of each, in order."""
    if jobs == 1:
        yield from map(_run, batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            yield from pool.map(_run, batches)
        finally:
            pool.shutdown(cancel_futures=True)


def _run(batch: Batch) -> Report:
    marks: Counter[str] = Counter()
    steps = 0
    traces = []
    failures = []
    for seed, trim in batch.runs:
        try:
            outcome = simulate(seed, trim=trim)
        except SimulationError as error:
            failures.append((seed, trim, error.check, str(error)))
            if not batch.keep_going and (not batch.until or error.check in batch.until):
                break
            continue
        steps += outcome.steps
        marks.update(outcome.marks)
        traces.append(f"{seed} {outcome.trace:08x} {outcome.steps} {outcome.seconds!r}")
    return Report(marks, steps, traces, failures)
