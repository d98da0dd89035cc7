"""The README's swaps: each diff is applied to a program, which says the same before, after,
and on a cluster.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.cluster import Cluster

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", README, re.M | re.S)
SQUARE = "def square(number):\n    return number * number\n\n"


class Program(NamedTuple):
    """A program before its swap, and the library that it needs."""

    name: str
    text: str
    prints: str
    library: str = "achilles"


# In the README's order.
PROGRAMS = (
    Program(
        "ProcessPoolExecutor",
        f"""\
from concurrent.futures import ProcessPoolExecutor
{SQUARE}
with ProcessPoolExecutor() as executor:
    print(list(executor.map(square, range(10))))
""",
        "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]\n",
    ),
    Program(
        "Pool",
        f"""\
from multiprocessing import Pool
{SQUARE}
with Pool(2) as pool:
    print(pool.map(square, range(10)))
""",
        "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]\n",
    ),
    Program(
        "joblib",
        f"""\
import joblib
{SQUARE}
with joblib.parallel_config(backend="loky", n_jobs=2):
    print(joblib.Parallel()(joblib.delayed(square)(n) for n in range(10)))
""",
        "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]\n",
        "joblib",
    ),
    Program(
        "asyncio",
        f"""\
import asyncio
from concurrent.futures import ProcessPoolExecutor as Executor
{SQUARE}
async def main():
    loop = asyncio.get_running_loop()
    with Executor() as executor:
        print(await loop.run_in_executor(executor, square, 7))

asyncio.run(main())
""",
        "49\n",
    ),
    Program(
        "scipy",
        """\
from scipy.optimize import differential_evolution, rosen
bounds = [(0, 2)] * 2

def main():
    found = differential_evolution(rosen, bounds, seed=1, updating="deferred", workers=-1)
    print(found.x.round(3).tolist())

if __name__ == "__main__":  # for the processes of `workers=-1`
    main()
""",
        "[1.0, 1.0]\n",
        "scipy",
    ),
)


def swap(program: str, diff: str) -> str:
    """The program after the diff, whose lines may be far apart there, but come in its order."""
    lines = program.splitlines()
    at = 0
    for line in diff.splitlines():
        sign, text = line[0], line[1:]
        if sign == "+":
            lines.insert(at, text)
            at += 1
        else:
            assert text in lines[at:], f"the program has no line {text!r} there"
            at = lines.index(text, at)
            if sign == "-":
                del lines[at]
            else:
                at += 1
    return "\n".join(lines) + "\n"


def test_there_are_five() -> None:
    assert len(DIFFS) == len(PROGRAMS) == 5


@pytest.mark.parametrize("diff", DIFFS, ids=[program.name for program in PROGRAMS])
def test_each_changes_two_lines(diff: str) -> None:
    signs = [line[0] for line in diff.splitlines()]
    assert signs.count("+") in (1, 2)
    assert signs.count("-") in (1, 2)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("state", ["before", "embedded", "cluster"])
@pytest.mark.parametrize(
    ("program", "diff"), [*zip(PROGRAMS, DIFFS)], ids=[program.name for program in PROGRAMS]
)
def test_it_prints_the_same(
    program: Program, diff: str, state: str, tmp_path: Path, cluster: Cluster
) -> None:
    if importlib.util.find_spec(program.library) is None:
        pytest.skip(f"{program.library} is not installed: this swap did not run")
    text = program.text if state == "before" else swap(program.text, diff)
    (tmp_path / "program.py").write_text(text, "utf-8")
    environ = {"ACHILLES_HOME": cluster.home, "ACHILLES_ADDRESS": cluster.address}
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path,
        env={**os.environ, **(environ if state == "cluster" else {})},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, program.prints, "")
