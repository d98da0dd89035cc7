"""What a run's clients saw, what its tasks left, and what follows: the five buckets,
and the verdict.

Buckets, as Jepsen has them
    acknowledged   resolved once, with the outcome that the oracle says (or with a cancellation that
    was asked for) lost           never resolved, though its client lived to the end
    unexpected     resolved with another value or error, or never submitted
    duplicated     resolved more than once
    recovered      of the acknowledged: begun more than once,
    because something befell its first execution

and beside them ``open``: submitted by a client that was killed, so nobody knows; ``excused``:
failed by the rules, as a task whose runners were killed three times is, which its error must tell
(and a run has no more of them than it has kills for);
``behind``: items of a map behind one that was excused.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.work import AWKWARD, digest, mix

CRASHES_MAX, LOSSES_MAX = 3, 5  # what a task is allowed
EXCUSES = {  # an error's name: what each line of its story has, and how many lines there must be
    "TaskCrashedError": ("SIGKILL", CRASHES_MAX),
    "WorkerLostError": ("was lost", LOSSES_MAX),
}
SHOWN = 5

Expected = tuple[str, Any]  # ("value", it) or ("error", its class's name)


class Execution(NamedTuple):
    """A line that a task left."""

    number: int
    attempt: int
    pid: int
    at: float
    is_begin: bool


@dataclass
class Buckets:
    """How many of each, and the first few that are wrong, in words."""

    submitted: int = 0
    acknowledged: int = 0
    lost: int = 0
    unexpected: int = 0
    duplicated: int = 0
    recovered: int = 0
    open: int = 0
    excused: int = 0
    behind: int = 0
    compared: int = 0  # values, with the oracle's
    charged: int = 0  # attempts of tasks that harm nobody, beyond each one's first
    wrong: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether every promise about single tasks was kept."""
        return not (self.lost or self.unexpected or self.duplicated)

    def blame(self, text: str) -> None:
        """Remember the first few."""
        if len(self.wrong) < SHOWN:
            self.wrong.append(text)

    def add(self, other: Buckets) -> None:
        """Count another run's in."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        for text in other.wrong:
            self.blame(text)

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in vars(self).items() if isinstance(n, int))
        return "\n    ".join([counts, *self.wrong])


def expected(number: int, kind: str, detail: Any) -> Expected:
    """What a task must give, all else being well."""
    if kind == "fat":
        return "value", digest(number + 1, detail)
    if kind == "late":
        return "error", "TaskTimeoutError"
    error = AWKWARD.get(kind)
    return ("value", mix(number)) if error is None else ("error", error)


def lines_of(path: Path, *, may_be_cut: bool) -> Iterator[dict[str, Any]]:
    """The records of a client; ``may_be_cut``: it was killed, so the last one may be half of one.

    Raises:
        ValueError: another record is none.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    for at, line in enumerate(lines):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            if may_be_cut and at == len(lines) - 1:
                return
            raise
        yield record


def executions(path: Path) -> list[Execution]:
    """What tasks left, but for a line that somebody was killed in the middle of."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        words = line.split()
        if len(words) == 5 and words[4] in "+-":
            number, attempt, pid = map(int, words[:3])
            found.append(Execution(number, attempt, pid, float(words[3]), words[4] == "+"))
    return found


@dataclass
class Submitted:
    """One task as its client knows it."""

    kind: str
    detail: Any
    outcomes: list[Expected] = field(default_factory=list)
    text: str = ""  # of its error


def judge(
    records: Iterable[Mapping[str, Any]], runs: Mapping[int, list[Execution]], *, was_killed: bool
) -> Buckets:
    """Sort the tasks of one client; ``runs`` are the executions by number."""
    buckets = Buckets()
    tasks, strangers = _read(records)
    for number in strangers:
        buckets.unexpected += 1
        buckets.blame(f"task {number}: an outcome, and nobody submitted it")
    for number, task in tasks.items():
        buckets.submitted += 1
        if len(task.outcomes) > 1:
            buckets.duplicated += 1
            buckets.blame(f"task {number} ({task.kind}) was resolved {len(task.outcomes)} times")
        elif task.outcomes:
            _judge_one(buckets, number, task, runs.get(number, []))
        elif was_killed:
            buckets.open += 1
        else:
            buckets.lost += 1
            begun = len([run for run in runs.get(number, []) if run.is_begin])
            buckets.blame(f"task {number} ({task.kind}) was never resolved; it began {begun} times")
    return buckets


def _read(records: Iterable[Mapping[str, Any]]) -> tuple[dict[int, Submitted], list[int]]:
    """The tasks, and the numbers of outcomes without one."""
    tasks: dict[int, Submitted] = {}
    strangers: list[int] = []
    for record in records:
        first = record.get("first", 0)
        if record["op"] == "submit":
            for number in range(first, first + record["count"]):
                tasks[number] = Submitted(record["kind"], record.get("detail"))
        elif record["op"] == "done":
            for number, given in enumerate(record["given"], first):
                if number in tasks:
                    tasks[number].outcomes.append((record["what"], given))
                    tasks[number].text = record.get("text", "")
                else:
                    strangers.append(number)
    return tasks, strangers


def _judge_one(buckets: Buckets, number: int, task: Submitted, runs: list[Execution]) -> None:
    what, given = task.outcomes[0]
    wanted = expected(number, task.kind, task.detail)
    begun = [run for run in runs if run.is_begin]
    ended = [run for run in runs if not run.is_begin]
    buckets.compared += what == "value"
    if task.kind not in AWKWARD:
        buckets.charged += max((run.attempt for run in runs), default=1) - 1
    if (what, given) == wanted or (what == "cancelled" and task.kind in ("cancel", "late")):
        buckets.acknowledged += 1
        buckets.recovered += len(begun) > 1 and wanted[0] == "value"
        return
    if what == "behind":
        buckets.behind += 1
        return
    mark, limit = EXCUSES.get(given, ("", 0)) if what == "error" else ("", 0)
    if limit and task.text.count(mark) >= limit:
        buckets.excused += 1
        return
    buckets.unexpected += 1
    buckets.blame(
        f"task {number} ({task.kind}) gave {what} {str(given)[:100]}, not {wanted[0]} {str(wanted[1])[:100]}; "
        f"it began {len(begun)} times and ended {len(ended)} times"
    )


def by_number(runs: Iterable[Execution]) -> dict[int, list[Execution]]:
    """Executions of each task."""
    found: defaultdict[int, list[Execution]] = defaultdict(list)
    for run in runs:
        found[run.number].append(run)
    return dict(found)


def repeated(runs: Mapping[int, list[Execution]]) -> Counter[str]:
    """What happened more than once.

    ``requeued``: executions that were not their task's first. ``late``: executions that ended after
    another one of the same task had, so their results came too late.
    """
    counts: Counter[str] = Counter()
    for lines in runs.values():
        begins = sum(run.is_begin for run in lines)
        counts["requeued"] += max(0, begins - 1)
        counts["late"] += max(0, len(lines) - begins - 1)
    return counts


# --- Vacuity --------------------------------------------------------------------------------------


def vacuous(needs: Mapping[str, int], effects: Mapping[str, int]) -> list[str]:
    """What a run needed and did not have: then it proved nothing."""
    return [
        f"{effects.get(name, 0)} of at least {least} {name}"
        for name, least in sorted(needs.items())
        if effects.get(name, 0) < least
    ]


def first(texts: Iterable[str]) -> str:
    """The first few of them."""
    return "; ".join(islice(texts, SHOWN))
