"""Thousands of seeds: every task comes out right, once, whatever happens.
A failure says how to see its seed again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from achilles.core.agent import Agent
from tests.sim.coverage import FAULT_SITES, missing, unknown
from tests.sim.plan import KINDS, Trim, make_plan
from tests.sim.regressions import parse, regressions
from tests.sim.shrink import shrink
from tests.sim.simulation import SimulationError, simulate

ROOT = Path(__file__).parents[2]
CHUNK = 100
SEEDS = 2000
happened: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeds(first: int) -> None:
    """Also: the seeds are worth their time, because everything that can happen did."""
    for seed in range(first, first + CHUNK):
        happened.update(simulate(seed).marks)
        happened["seeds"] += 1
    if happened["seeds"] == SEEDS:
        assert not missing(happened), "no seed reached these"
        assert not unknown(happened), "these stand in no list of what is to be reached"


@pytest.mark.parametrize("words", [f"{seed} {trim}".strip() for seed, trim in regressions()])
def test_regressions(words: str) -> None:
    """What once failed."""
    seed, trim = parse(["--seed", *words.split()])
    simulate(seed, trim=trim, stride=1)


@pytest.mark.parametrize("seed", [0, 1, 5, 12, 21])
def test_every_check_at_every_step(seed: int) -> None:
    assert simulate(seed, stride=1).trace == simulate(seed).trace


def test_runs_do_not_depend_on_hashes_or_processes() -> None:
    """The same seeds, the same traces: where `hash` gives other numbers,
    and in one process or two.
    """
    traces = []
    for hash_seed, jobs in (("1", "1"), ("2", "2")):
        run = _run_seeds(hash_seed, "--trace", "--first", "1", "--count", "60", "--jobs", jobs)
        assert run.returncode == 0, run.stderr
        traces.append(run.stdout.splitlines())
    assert len(traces[0]) == 60 + len(regressions())
    assert traces[0] == traces[1]


def test_what_is_not_reached_fails_a_long_run() -> None:
    calm = ("--kinds", "cancel", "--count", "2000", "--tasks", "1", "--workers", "1", "--jobs", "2")
    run = _run_seeds("0", *calm)
    assert run.returncode == 1
    assert "FAILED [coverage] no run reached: fault: the broker crashes" in run.stderr


def _run_seeds(hash_seed: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "tests.sim", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50
    )


def test_a_failure_is_told_made_smaller_and_can_be_seen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A planted mistake: what it breaks, the line that shows it again,
    and a smaller plan of the same.
    """
    monkeypatch.setattr(Agent, "drain", lambda self: [])  # SIGTERM is not heard
    failure = _first_failure()
    assert failure.check == "everything ends"
    assert f"python -m tests.sim --seed {failure.seed} --log" in str(failure)
    smaller = shrink(failure)
    assert smaller.trim.kinds == frozenset({"worker-drain"})
    assert (smaller.trim.tasks or 0) <= 3
    words = str(smaller).splitlines()[-1].split("tests.sim ")[1].split()[:-1]
    seed, trim = parse(words)
    with pytest.raises(SimulationError, match=r"^everything ends: .*is still draining"):
        simulate(seed, trim=trim)


def _first_failure() -> SimulationError:
    for seed in range(100):
        try:
            simulate(seed)
        except SimulationError as error:
            return error
    pytest.fail("no seed found the planted mistake")


def test_plans_cover_every_kind_and_all_together() -> None:
    plans = [make_plan(seed) for seed in range(200)]
    for kind in KINDS:
        assert 50 < sum(kind in plan.kinds for plan in plans) < 150
    assert sum(len(plan.kinds) == len(KINDS) for plan in plans) >= 5
    assert sum(plan.is_calm for plan in plans) >= 20
    assert sum(plan.is_sound for plan in plans) >= 20
    assert sum(plan.has_tags for plan in plans) >= 40
    options = [truth.options for plan in plans for _, batch in plan.batches for truth in batch]
    for name in ("timeout", "retries", "at_most_once", "priority", "tags"):
        assert sum(bool(getattr(one, name)) for one in options) > len(options) // 20, name


def test_a_trimmed_plan_is_a_part_of_the_whole() -> None:
    whole = make_plan(7)
    part = make_plan(7, Trim(frozenset({"cut"}), tasks=5, workers=1, horizon=0.5))
    assert part.kinds == {"cut"}
    assert part.horizon == whole.horizon / 2
    assert part.workers == whole.workers[:1]
    tasks = [truth for _, batch in part.batches for truth in batch]
    assert tasks == [truth for _, batch in whole.batches for truth in batch][:5]


def test_every_fault_site_has_a_name_of_its_own() -> None:
    assert len(set(FAULT_SITES)) == len(FAULT_SITES)
