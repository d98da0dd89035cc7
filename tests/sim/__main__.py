"""`python -m tests.sim --seed N --log` runs one seed again; `--first N --count N` runs many."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.plan import KINDS
from tests.sim.simulation import SimulationError, simulate


def main() -> int:
    """Run seeds; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument(
        "--seed", type=int, help="run this seed alone, with every check at every step"
    )
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="only these kinds of fault")
    parser.add_argument("--log", action="store_true", help="print every message")
    parser.add_argument("--trace", action="store_true", help="print the checksum of each run")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--keep-going", action="store_true", help="do not stop at the first failure"
    )
    options = parser.parse_args()
    is_one = options.seed is not None
    seeds = [options.seed] if is_one else range(options.first, options.first + options.count)
    kinds = None if options.kinds is None else frozenset(options.kinds)
    began = time.perf_counter()
    failures = steps = 0
    marks: Counter[str] = Counter()
    for seed in seeds:
        try:
            outcome = simulate(
                seed, kinds=kinds, stride=1 if is_one else None, log=print if options.log else None
            )
        except SimulationError as error:
            if is_one:
                raise
            failures += 1
            print(error, file=sys.stderr)
            if not options.keep_going:
                return 1
            continue
        steps += outcome.steps
        marks.update(outcome.marks)
        if options.trace:
            print(f"{seed} {outcome.trace:08x} {outcome.steps} {outcome.seconds!r}")
    seconds = time.perf_counter() - began
    print(
        f"{len(seeds)} seeds, {failures} failed, {len(seeds) / seconds:.0f} a second; "
        f"{steps} steps; {', '.join(f'{count} {mark}' for mark, count in sorted(marks.items()))}",
        file=sys.stderr,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
