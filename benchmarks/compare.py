"""achilles beside every peer that installs here, on the same work in one run: ``make bench``.

Contestants take turns: in each round each runs alone, in a process and an environment of its own,
and every other round goes backwards. Ratios are taken within a round. Writes ``results.json``,
``table.md`` and a chart a figure (SVG) to the folder given by ``--output``.

A goal that is missed is printed as missed;
the exit status is 1 only if achilles itself failed or returned a wrong result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots, tables
from benchmarks.environments import ROOT
from benchmarks.rounds import Run, prepare_all, turn
from benchmarks.stats import summarize
from benchmarks.systems import CONTESTANTS, OURS, SLOTS
from benchmarks.targets import Verdict, goals, judge
from benchmarks.workloads import EACH_ROUND, ONCE, Scale

RESULTS = ROOT / "benchmarks" / "results"


class Mode(NamedTuple):
    """How much there is to do; ``limit``: seconds for one turn."""

    rounds: int
    scale: Scale
    limit: float


FULL = Mode(3, Scale(), 240.0)
QUICK = Mode(
    1,
    Scale(
        seconds=0.2,
        tasks_max=20_000,
        trips=300,
        repeats=1,
        million=0,
        words=200_000,
        skewed=500,
        searches=9,
    ),
    60.0,
)
TINY = Mode(  # checks that everything runs, and measures nothing
    1,
    Scale(
        0.02,
        mib=1,
        tasks_max=500,
        trips=20,
        repeats=1,
        million=0,
        words=10_000,
        skewed=100,
        skewed_ms=0.1,
        searches=9,
    ),
    120.0,
)
CHARTS = (
    ("submit_rate", "No-op submits a second", "1/s", True),
    ("p50_us", "Round trip of a no-op, median", "µs", True),
    ("map_rate", "map of no-ops a second, nothing tuned", "1/s", True),
    ("efficiency_1ms", "Tasks of 1 ms: part of the ideal schedule", "%", False),
    ("argument_ms", "One task with a new argument of 64 MiB", "ms", True),
    ("shared_ms", "One argument of 64 MiB in 200 tasks", "ms", True),
    ("startup_s", "Start-up to first result", "s", False),
)


def execute(mode: Mode, names: Sequence[str], workloads: Sequence[str]) -> Run:
    """All rounds."""
    run = Run(mode.rounds)
    prepare_all(run, names)
    for name, why in run.absent.items():
        print(f"{CONTESTANTS[name].title} is absent: {why}", flush=True)
    for number in range(mode.rounds):
        todo = [one for one in workloads if number == 0 or one in EACH_ROUND]
        for name in names if number % 2 == 0 else reversed(names):
            if name in run.absent:
                continue
            seconds = turn(run, name, number, mode.scale._asdict(), todo, mode.limit)
            reason = run.absent.get(name)
            print(
                f"round {number + 1} of {mode.rounds}: {CONTESTANTS[name].title:<34} "
                + (f"absent: {reason}" if reason else f"{seconds:6.1f} s"),
                flush=True,
            )
    return run


def report(run: Run, verdicts: Sequence[Verdict], about: dict[str, Any]) -> str:
    """Everything that was found, in Markdown."""
    titles = {name: CONTESTANTS[name].title for name in CONTESTANTS if name in run.figures}
    machine = ", ".join(f"{about[key]}" for key in ("platform", "processor", "cores", "python"))
    parts = [
        f"# {about['date']}, commit {about['commit']}",
        f"{machine}. {about['rounds']} rounds ({about['mode']}), {SLOTS} slots for each contestant, load average "
        f"{about['load_before']:.2f} before and {about['load_after']:.2f} after. "
        + ", ".join(f"{titles.get(name, name)} {text}" for name, text in run.versions.items()),
        "## Where it must stand",
        tables.verdicts_table(titles, verdicts),
        "## Figures",
        "Medians of the rounds; ± is half the distance from the lowest to the highest round.",
        tables.figures_table(titles, run.figures),
        "## As multiples of ProcessPoolExecutor",
        tables.ratios_table(titles, run.figures),
    ]
    if run.absent or run.notes:
        absent = {name: {"absent": reason} for name, reason in run.absent.items()}
        names = {name: contestant.title for name, contestant in CONTESTANTS.items()}
        parts += [
            "## Not measured, or not as the others",
            tables.notes_list(names, {**run.notes, **absent}),
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def charts(run: Run) -> dict[str, str]:
    """Charts by file name."""
    found = {}
    for figure, title, unit, logarithmic in CHARTS:
        rows = []
        for name, contestant in CONTESTANTS.items():
            value = summarize(run.figures.get(name, {}).get(figure, ()))
            notes = run.notes.get(name, {})
            note = run.absent.get(name) or notes.get(figure) or "not measured"
            if name in run.figures or name in run.absent:
                rows.append(plots.Bar(contestant.title, value, name in OURS, note[:60]))
        if any(row.value for row in rows):
            found[f"{figure}.svg"] = plots.bars(title, unit, rows, logarithmic=logarithmic)
    return found


def write(folder: Path, run: Run, verdicts: Sequence[Verdict], about: dict[str, Any]) -> None:
    """The files of a run; those of an earlier one are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "about": about,
        "versions": run.versions,
        "absent": run.absent,
        "notes": run.notes,
        "figures": run.figures,
        "goals": [
            {
                **verdict.goal._asdict(),
                "measured": verdict.measured._asdict() if verdict.measured else None,
                "verdict": verdict.word,
            }
            for verdict in verdicts
        ],
    }
    text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True)
    (folder / "results.json").write_text(text + "\n", "utf-8")
    (folder / "table.md").write_text(report(run, verdicts, about), "utf-8")
    for name, drawing in charts(run).items():
        (folder / name).write_text(drawing, "utf-8")


def write_readme(run: Run, about: dict[str, Any]) -> None:
    """The short table, and where it is from."""
    titles = {name: contestant.title for name, contestant in CONTESTANTS.items()}
    shown = {key: text for key, text in titles.items() if key in run.figures or key in run.absent}
    body = (
        tables.summary_table(shown, run.figures, run.absent)
        + f"\n{about['cores']} ({about['processor']}), {about['python']}, {about['date']}, medians of {about['rounds']} rounds; "
        "`make bench` measures it on your machine, `make profile` says where the time goes "
        "([docs/performance.md](docs/performance.md))."
    )
    readme = ROOT / "README.md"
    readme.write_text(tables.with_block(readme.read_text("utf-8"), "bench", body), "utf-8")


def _about(mode: str, rounds: int) -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": done.stdout.strip() or "unknown",
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": f"{os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
        "mode": mode,
        "rounds": rounds,
        "load_before": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one round, some three minutes")
    size.add_argument("--tiny", action="store_true", help="check that everything runs, no more")
    parser.add_argument("--rounds", type=int, help="how many rounds (3, or 1 of the short ones)")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    workloads = [*EACH_ROUND, *ONCE]
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=workloads)
    parser.add_argument("--readme", action="store_true", help="put a short table into README.md")
    parser.add_argument("--output", type=Path, help="the folder for what is found")
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else "tiny" if options.tiny else "full"
    mode = {"quick": QUICK, "tiny": TINY, "full": FULL}[name]
    if options.rounds:
        mode = mode._replace(rounds=options.rounds)
    if not mode.scale.million:
        options.workloads = [one for one in options.workloads if one != "million"]
    about = _about(name, mode.rounds)
    start = time.monotonic()
    run = execute(mode, options.only, options.workloads)
    about["load_after"] = os.getloadavg()[0]
    about["seconds"] = round(time.monotonic() - start)
    verdicts = [judge(goal, run.figures) for goal in goals() if goal.contestant in options.only]
    folder = options.output or (RESULTS if name == "full" else ROOT / "build" / "bench" / name)
    write(folder, run, verdicts, about)
    if options.readme:
        write_readme(run, about)
    print("\n" + report(run, verdicts, about))
    print(f"{folder}: results.json, table.md and charts; {about['seconds']} s")
    return 1 if _has_failed(run, options.only) else 0


def _has_failed(run: Run, names: Sequence[str]) -> bool:
    """Whether achilles was absent, returned a wrong result, or did not get to the end."""
    ours = [name for name in names if name in OURS]
    bad = [reason for name in ours for reason in run.notes.get(name, {}).values()]
    return any(name in run.absent for name in ours) or any(
        reason.startswith(("failed", "took", "left")) for reason in bad
    )


if __name__ == "__main__":
    sys.exit(main())
