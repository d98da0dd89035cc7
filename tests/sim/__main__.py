"""`python -m tests.sim --seed N --log` runs one seed again;
`--first N --count N --jobs 2` runs many.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.batches import CHUNK, Batch, Report, reports
from tests.sim.coverage import missing
from tests.sim.plan import KINDS, WHOLE, Trim
from tests.sim.regressions import regressions
from tests.sim.shrink import shrink
from tests.sim.simulation import SimulationError, simulate

COVERAGE_SEEDS = 2000  # so many must have reached everything


def main() -> int:
    """Run seeds; 1 if one fails, or if all together leave something out."""
    options = _parser().parse_args()
    trim = Trim(
        None if options.kinds is None else frozenset(options.kinds),
        options.tasks,
        options.workers,
        options.horizon,
    )
    if options.seed is not None:
        outcome = simulate(options.seed, trim=trim, stride=1, log=print if options.log else None)
        print(f"seed {options.seed} is well: {outcome.steps} steps, trace {outcome.trace:08x}")
        return 0
    return _run_many(options, trim)


def _run_many(options: argparse.Namespace, trim: Trim) -> int:
    began = time.perf_counter()
    until = frozenset[str](options.until)
    runs = [(seed, trim) for seed in range(options.first, options.first + options.count)]
    if trim == WHOLE and not options.only_seeds:
        runs = [*regressions(), *runs]
    batches = [
        Batch(runs[at : at + CHUNK], options.keep_going, until) for at in range(0, len(runs), CHUNK)
    ]
    marks: Counter[str] = Counter()
    failures = steps = done = 0
    for batch, report in zip(batches, reports(batches, options.jobs)):
        marks.update(report.marks)
        steps += report.steps
        done += len(batch.runs)
        if options.trace:
            print(*report.traces, sep="\n")
        for failure in report.failures:
            failures += 1
            _tell(failure, is_shrunk=not (options.keep_going or options.no_shrink or until))
        if failures and not options.keep_going and (not until or until & _checks(report)):
            break
    seconds = time.perf_counter() - began
    if options.marks:
        print("\n".join(f"{count:9} {mark}" for mark, count in sorted(marks.items())))
    print(
        f"{done} runs, {failures} failed, {done / seconds:.0f} a second, {seconds:.0f} s; {steps} steps",
        file=sys.stderr,
    )
    left_out = missing(marks) if options.count >= COVERAGE_SEEDS and not failures else []
    for name in left_out:
        print(f"FAILED [coverage] no run reached: {name}", file=sys.stderr)
    return 1 if failures or left_out else 0


def _checks(report: Report) -> set[str]:
    return {check for _, _, check, _ in report.failures}


def _tell(failure: tuple[int, Trim, str, str], *, is_shrunk: bool) -> None:
    seed, trim, check, text = failure
    print(f"FAILED [{check}] seed {seed}\n{text}", file=sys.stderr, flush=True)
    if is_shrunk:
        smaller = shrink(SimulationError(seed, trim, check, text))
        if smaller.trim != trim:
            print(f"\nSmaller:\n{smaller}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    one = parser.add_argument_group("one seed")
    one.add_argument("--seed", type=int, help="run it alone, with every check at every step")
    one.add_argument("--log", action="store_true", help="print every message")
    less = parser.add_argument_group("less of everything")
    less.add_argument("--kinds", nargs="*", choices=KINDS, help="only these kinds of fault")
    less.add_argument("--tasks", type=int, help="only so many tasks")
    less.add_argument("--workers", type=int, help="only so many workers")
    less.add_argument("--horizon", type=float, help="the part of the time in which faults happen")
    many = parser.add_argument_group("many seeds")
    many.add_argument("--first", type=int, default=0)
    many.add_argument("--count", type=int, default=1000)
    many.add_argument("--jobs", type=int, default=1, help="processes")
    many.add_argument("--trace", action="store_true", help="print the checksum of each run")
    many.add_argument("--marks", action="store_true", help="print how often what happened")
    many.add_argument("--only-seeds", action="store_true", help="not the regressions")
    many.add_argument("--no-shrink", action="store_true", help="a failure is told as it is")
    many.add_argument("--until", nargs="*", default=(), help="go on until such a rule is broken")
    many.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
