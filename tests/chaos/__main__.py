"""`python -m tests.chaos --seed N --seconds S` runs one schedule;
`--rounds N` runs every nemesis N times.

Real processes, real sockets, loopback only. A run that fails prints the line that replays it; how
its processes are scheduled is not in the seed, so a failure may want several replays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos.history import Buckets, vacuous
from tests.chaos.nemeses import KILLS
from tests.chaos.plan import FULL_SECONDS, LOADS, NEMESES, Plan, plan, round_of
from tests.chaos.run import Report, run

ROUND_NEEDS = {"kills": 100, "requeued": 50, "late": 1}  # of a round at `FULL_SECONDS`


def main() -> int:
    """Run schedules; 1 if one fails, or if they prove nothing."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken away
    plans = _plans(options)
    if options.print:
        for fault in itertools.chain.from_iterable(one.faults for one in plans):
            print(fault)
        return 0
    folder = Path(options.keep or tempfile.mkdtemp(prefix="ach-chaos-"))
    began = time.monotonic()
    reports = []
    for number, one in enumerate(plans):
        report = run(one, folder / f"{number}-{one.nemesis.name}-{one.load}", _say)
        _tell(report)
        reports.append(report)
        if report.problems and not options.keep_going:
            break
    failures = _sum_up(reports, plans, time.monotonic() - began)
    if options.json:
        Path(options.json).write_text(json.dumps([as_dict(report) for report in reports]))
    if not any(report.problems for report in reports) and not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


def _plans(options: argparse.Namespace) -> list[Plan]:
    seed, seconds, is_near = options.seed, options.seconds, options.near
    if options.rounds:
        return [
            one
            for turn in range(options.rounds)
            for one in round_of(seed + turn * len(NEMESES), seconds, is_near=is_near)
        ]
    return [plan(seed, seconds, options.nemesis, options.load, is_near=is_near)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(report: Report) -> None:
    nemesis, buckets = report.plan.nemesis, report.buckets
    print(
        f"{nemesis.name:<4}{nemesis.title:<16} {report.plan.load}  {report.verdict:<16}"
        f"{report.effects['faults']:>4} faults {buckets.acknowledged:>7} acknowledged {buckets.lost} lost "
        f"{buckets.unexpected} unexpected {buckets.duplicated} duplicated {buckets.recovered:>5} recovered "
        f"{buckets.open:>4} open {buckets.excused:>2} excused; drained in {report.drain_seconds:.1f} s",
        flush=True,
    )
    for line in report.unavailable:
        print(f"    not to be had here: {line}")
    if report.vacuous:
        print(f"    PROVED NOTHING: {', '.join(report.vacuous)}")
    for line in report.problems:
        print(f"    FAILED: {line}")
    if not report.is_well:
        print(f"    replay: {report.plan.command}", flush=True)


def _sum_up(reports: list[Report], plans: list[Plan], seconds: float) -> int:
    """Print the sums; how many runs failed, or the round as a whole."""
    total = Buckets()
    effects = {"kills": 0, "requeued": 0, "late": 0, "faults": 0}
    for report in reports:
        total.add(report.buckets)
        effects["kills"] += sum(report.effects[kind] for kind in KILLS)
        for name in ("requeued", "late", "faults"):
            effects[name] += report.effects[name]
    failures = sum(not report.is_well and not report.unavailable for report in reports)
    left_out = sum(bool(report.unavailable) for report in reports)
    if len(reports) >= len(NEMESES) and not plans[0].is_near:
        share = min(1.0, plans[0].seconds / FULL_SECONDS) * len(reports) / len(NEMESES)
        needs = {name: max(1, int(least * share)) for name, least in ROUND_NEEDS.items()}
        lacking = vacuous(needs, effects)
        if lacking:
            failures += 1
            print(f"PROVED NOTHING as a whole: {', '.join(lacking)}")
    said = ", ".join(f"{count} {name}" for name, count in effects.items())
    print(f"all: {total}\n    {said}")
    print(
        f"{len(reports)} runs, {failures} failed, {left_out} not to be had here, {len(plans) - len(reports)} not begun, "
        f"{seconds:.0f} s"
    )
    return failures


def as_dict(report: Report) -> dict[str, Any]:
    """For `tests.reliability`."""
    return {
        "nemesis": report.plan.nemesis.name,
        "load": report.plan.load,
        "verdict": report.verdict,
        "buckets": {k: v for k, v in vars(report.buckets).items() if isinstance(v, int)},
        "effects": dict(report.effects),
        "drain_seconds": report.drain_seconds,
        "recovery_seconds": report.recovery_seconds,
        "first_after_kill": report.first_after_kill,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="of faults, each run")
    parser.add_argument("--nemesis", choices=NEMESES, help="otherwise the seed's")
    parser.add_argument("--load", choices=LOADS, help="otherwise the seed's")
    parser.add_argument("--near", action="store_true", help="over ipc, where faults befall no line")
    parser.add_argument("--rounds", type=int, default=0, help="run every nemesis so many times")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--keep", metavar="FOLDER", help="where the files of failures are put")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--print", action="store_true", help="print the plan, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
