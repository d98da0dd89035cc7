"""Make a failure smaller: fewer kinds of fault, fewer tasks, fewer workers, a shorter time,
the same rule broken.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.sim.plan import KINDS, Trim, make_plan
from tests.sim.simulation import SimulationError, simulate

RUNS_MAX = 100


def shrink(failure: SimulationError) -> SimulationError:
    """The smallest failure of the same seed that a bounded search finds."""
    smallest = failure
    runs = 0
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for trim in _smaller(failure.seed, smallest.trim):
            runs += 1
            if runs > RUNS_MAX:
                return smallest
            try:
                simulate(failure.seed, trim=trim)
            except SimulationError as error:
                if error.check == failure.check:
                    smallest, is_smaller = error, True
                    break
    return smallest


def _smaller(seed: int, trim: Trim) -> Iterator[Trim]:
    """What to try next, the greatest steps first."""
    plan = make_plan(seed, trim)
    for kind in KINDS:
        if kind in plan.kinds:
            yield trim._replace(kinds=plan.kinds - {kind})
    tasks = sum(len(batch) for _, batch in plan.batches)
    for fewer in (tasks // 2, tasks - tasks // 4, tasks - 1):
        if 0 < fewer < tasks:
            yield trim._replace(tasks=fewer)
    if len(plan.workers) > 1:
        yield trim._replace(workers=len(plan.workers) - 1)
    if plan.kinds and (trim.horizon or 1.0) > 0.1:
        yield trim._replace(horizon=(trim.horizon or 1.0) / 2)
