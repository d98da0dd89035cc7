"""The runs of ``regressions.txt``."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.sim.plan import Trim

PATH = Path(__file__).with_name("regressions.txt")


def regressions() -> list[tuple[int, Trim]]:
    """Seeds and what to leave out of their plans."""
    lines = PATH.read_text().splitlines()
    return [parse(words) for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> tuple[int, Trim]:
    """The run that these arguments of ``python -m tests.sim`` name."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            values[name] = []
        else:
            values[name].append(word)
    kinds = values.get("kinds")
    tasks, workers, horizon = (
        values[name][0] if name in values else None for name in ("tasks", "workers", "horizon")
    )
    trim = Trim(
        kinds=None if kinds is None else frozenset(kinds),
        tasks=None if tasks is None else int(tasks),
        workers=None if workers is None else int(workers),
        horizon=None if horizon is None else float(horizon),
    )
    return int(values["seed"][0]), trim
