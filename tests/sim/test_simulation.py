"""Thousands of seeds: every task comes out right, once, whatever happens. A failure says how to see its seed again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.sim.plan import KINDS, make_plan
from tests.sim.simulation import simulate

ROOT = Path(__file__).parents[2]
CHUNK = 125
SEEDS = 2000


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeds(first: int) -> None:
    """Also: the seeds are worth their time, because everything that can happen did."""
    happened: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        happened.update(simulate(seed).marks)
    marks = ("run again", "crashed", "lost", "late", "cancelled", "failed", "resync", "rejoined")
    assert all(happened[mark] for mark in marks), f"these seeds prove too little: {happened}"


@pytest.mark.parametrize("seed", [0, 1, 5, 12, 21])
def test_every_check_at_every_step(seed: int) -> None:
    assert simulate(seed, stride=1).trace == simulate(seed).trace


def test_runs_do_not_depend_on_hashes() -> None:
    """The same seeds, the same traces: where `hash` gives other numbers, too."""
    command = [sys.executable, "-m", "tests.sim", "--trace", "--first", "1", "--count", "12"]
    traces = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50
        )
        assert run.returncode == 0, run.stderr
        traces.append(run.stdout.splitlines())
    assert len(traces[0]) == 12
    assert traces[0] == traces[1]


def test_plans_cover_every_kind_and_all_together() -> None:
    plans = [make_plan(seed) for seed in range(200)]
    for kind in KINDS:
        assert 50 < sum(kind in plan.kinds for plan in plans) < 150
    assert sum(len(plan.kinds) == len(KINDS) for plan in plans) >= 5
    assert sum(plan.is_calm for plan in plans) >= 20
    assert sum(plan.is_sound for plan in plans) >= 20
