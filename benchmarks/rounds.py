"""Running contestants in turns: each in a process, an environment and a home of its own, and
nothing of it outlives its turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environments import ROOT, prepare
from benchmarks.systems import CONTESTANTS

TOKEN = "BENCHMARK_TURN"  # in the environment of all processes of a turn
LEAVE_SECONDS = 3.0
LOGS = ROOT / "build" / "bench" / "logs"


@dataclass
class Run:
    """What all rounds found; ``figures[contestant][figure]`` has a value
    (or None) for each round.
    """

    rounds: int
    figures: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, figure: str, reason: str) -> None:
        self.notes.setdefault(name, {})[figure] = reason

    def take(self, name: str, number: int, line: Mapping[str, Any]) -> None:
        """Take in one line of what a contestant told in round ``number``."""
        if line.get("version"):
            self.versions[name] = line["version"]
        for figure, value in line["figures"].items():
            row = self.figures.setdefault(name, {}).setdefault(figure, [None] * self.rounds)
            row[number] = value
        for figure, reason in line["notes"].items():
            self.note(name, figure, reason)


def prepare_all(run: Run, names: Sequence[str]) -> None:
    """The environments of these contestants; those that have none are absent."""
    for name in names:
        environment = prepare(CONTESTANTS[name].group)
        if environment.reason:
            run.absent[name] = environment.reason


def turn(
    run: Run,
    name: str,
    number: int,
    scale: Mapping[str, Any],
    workloads: Sequence[str],
    limit: float,
) -> float:
    """The turn of a contestant that is not absent, in round ``number``; the seconds that it took.
    What goes wrong is noted, or makes it absent.
    """
    start = time.monotonic()
    environment = prepare(CONTESTANTS[name].group)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}-{number + 1}.log"
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as home:
        output = Path(home, "found.jsonl")
        output.touch()
        command = [
            *(str(environment.python), "-m", "benchmarks.contestant", name, str(output)),
            *("--scale", json.dumps(scale), "--workloads", ",".join(workloads)),
        ]
        token = uuid.uuid4().hex
        ending = _call(command, _environ(environment.python, home, token), log, token, limit)
        lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for line in lines:
        run.take(name, number, line)
    done = [line["workload"] for line in lines]
    if not done:
        run.absent[name] = ending or _last_line(log)
    elif "end" not in done:
        missing = next((one for one in workloads if one not in done), "the end")
        run.note(name, missing, ending or _last_line(log))
    elif ending:
        run.note(name, "the end", ending)
    return time.monotonic() - start


def _environ(python: Path, home: str, token: str) -> dict[str, str]:
    """What a turn finds in its environment: no settings of the user's,
    and one thread a process in numeric libraries.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACHILLES_")}
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        **kept,
        **dict.fromkeys(threads, "1"),
        "HOME": home,
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        TOKEN: token,
    }


def _call(command: list[str], environ: dict[str, str], log: Path, token: str, limit: float) -> str:
    """Run it to its end or its limit; what went wrong, or ""."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        problem = "interrupted"
        try:
            process.wait(limit)
            problem = ""
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit:.0f} s"
        finally:
            family = _family(process.pid, token)
            if not problem:  # some helpers of the standard library end a moment after their program
                family = psutil.wait_procs(family, LEAVE_SECONDS)[1]
            for one in family:
                try:
                    one.kill()
                except psutil.NoSuchProcess:
                    pass
            process.kill()
            process.wait()
    if not problem and family:
        names = ", ".join(sorted({one.info["name"] or "?" for one in family}))
        problem = f"left {len(family)} processes behind, which were killed ({names})"
    return problem


def _family(number: int, token: str) -> list[Any]:
    """The processes of a turn that are there: its session, its descendants,
    and all that inherited its token.
    """
    found = {}
    try:
        for child in psutil.Process(number).children(recursive=True):
            found[child.pid] = child
    except psutil.NoSuchProcess:
        pass
    for process in psutil.process_iter(["name"]):
        try:
            is_of_session = os.getsid(process.pid) == number
            if is_of_session or process.environ().get(TOKEN) == token:
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue  # it ended, or is somebody else's
    found.pop(number, None)
    for process in found.values():
        if not hasattr(process, "info"):
            process.info = {"name": ""}
    return [one for one in found.values() if _is_alive(one)]


def _is_alive(process: Any) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it ended without a word"
