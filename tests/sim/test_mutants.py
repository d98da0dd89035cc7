"""The simulator is worth trusting: each of the mistakes of `tests.sim.mutants`, planted in a copy
of the cores, is caught within 2,000 seeds by a rule that it breaks,
not by some crash that follows from it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
SEEDS = 2000
MUTANTS_MIN = 40


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place from which Python takes the cores and the simulator before all others."""
    place = tmp_path_factory.mktemp("mutants")
    package = place / "achilles"
    shutil.copytree(
        ROOT / "achilles" / "core", package / "core", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "achilles" / name, package / name)
    ignored = shutil.ignore_patterns("test_*", "__pycache__")
    shutil.copytree(ROOT / "tests" / "sim", place / "tests" / "sim", ignore=ignored)
    return place


def _run(place: Path, first: int, count: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-m", "tests.sim", "--only-seeds", "--no-shrink", *words]
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [*command, "--first", str(first), "--count", str(count)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def _is_caught(mutant: Mutant, run: subprocess.CompletedProcess[str]) -> bool:
    """Whether a seed failed by one of the mutant's rules."""
    told = [line for line in run.stderr.splitlines() if line.startswith("FAILED [")]
    return any(
        line.startswith(f"FAILED [{check}] seed") for check in mutant.checks for line in told
    )


@pytest.mark.timeout(300)  # where the seed that is tried first catches it no more
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_is_caught(mutant: Mutant, copy: Path) -> None:
    path = copy / "achilles" / "core" / f"{mutant.module}.py"
    original = path.read_text()
    assert original.count(mutant.old) == 1, (
        f"the text of this mutant stands {original.count(mutant.old)} times in core/{mutant.module}.py"
    )
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        run = _run(copy, mutant.seed, 1)
        if not _is_caught(mutant, run):
            run = _run(copy, 0, SEEDS, "--until", *mutant.checks)
    finally:
        path.write_text(original)
    assert _is_caught(mutant, run), (
        f"{mutant.name}: not told as {mutant.checks} within {SEEDS} seeds\n{run.stderr[-3000:]}"
    )
    assert run.returncode == 1
    assert "To see it again: python -m tests.sim --seed" in run.stderr


def test_there_are_enough_mutants() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= MUTANTS_MIN
    assert all(mutant.checks for mutant in MUTANTS)


def test_copy_without_mutant_passes(copy: Path) -> None:
    run = _run(copy, 1, 20)
    assert run.returncode == 0, run.stderr
    assert "20 runs, 0 failed" in run.stderr
