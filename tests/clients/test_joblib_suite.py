"""joblib's own tests of `Parallel` pass with our backend,
but for what ``docs/conformance.md`` lists, which must fail.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster
from tests.modes import CLUSTER, EMBEDDED

ROOT = Path(__file__).parents[2]
SUITE_SECONDS = 150
TEST_SECONDS = 60
SLOTS = 4
SECTION = "## joblib's own tests"
ROW = re.compile(r"^\| `(test_\w+)(\[[^`]+\])?` \| ([\w, ]+) \| (.+) \|$", re.M)
LEAST = {EMBEDDED: 140, CLUSTER: 130}  # that pass: fewer, and the tests were not found

Outcomes = dict[str, str]

pytestmark = pytest.mark.timeout(SUITE_SECONDS + 30)


def deviations(mode: str) -> dict[tuple[str, str], str]:
    """The tests that fail, and why, as documented: by name and parameters ("" for all)."""
    text = (ROOT / "docs" / "conformance.md").read_text("utf-8").partition(SECTION)[2]
    rows = ROW.findall(text.partition("\n## ")[0])
    return {
        (test, parameters): reason
        for test, parameters, modes, reason in rows
        if mode in modes.split(", ")
    }


def is_listed(name: str, listed: dict[tuple[str, str], str]) -> bool:
    test, bracket, parameters = name.partition("[")
    return (test, "") in listed or (test, bracket + parameters) in listed


@pytest.fixture(scope="module")
def reports() -> Iterator[dict[str, Outcomes]]:
    """What the tests' outcomes were, by mode; both run at once,
    as these tests sleep most of the time.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ach-") as name,
        Cluster(workers=1, slots=SLOTS) as cluster,
    ):
        folder = Path(name)
        homes = {
            EMBEDDED: {"ACHILLES_HOME": str(folder / "home")},
            CLUSTER: {"ACHILLES_HOME": cluster.home, "ACHILLES_ADDRESS": cluster.address},
        }
        runs: dict[str, subprocess.Popen[str]] = {}
        try:
            for mode, home in homes.items():
                runs[mode] = start(folder, mode, home)
            yield {mode: outcomes(folder, mode, run) for mode, run in runs.items()}
        finally:
            for run in runs.values():
                run.kill()
                run.wait()


def start(folder: Path, mode: str, home: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "--pyargs", "joblib.test.test_parallel", "-q"),
            *("-p", "tests.clients.joblib_suite", "--report", str(folder / f"{mode}.json")),
            *("--noconftest", "-c", os.devnull, "--rootdir", str(folder), "-W", "default"),
            *("-p", "no:cacheprovider", "--timeout", str(TEST_SECONDS)),
        ],
        cwd=ROOT,
        env={**os.environ, **home, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(folder: Path, mode: str, run: subprocess.Popen[str]) -> Outcomes:
    output, _ = run.communicate(timeout=SUITE_SECONDS)
    print(output)
    assert run.returncode in (0, 1), f"it did not run to its end: {output[-2000:]}"  # 1: some fail
    report: Outcomes = json.loads((folder / f"{mode}.json").read_text())
    return report


@pytest.mark.parametrize("mode", [EMBEDDED, CLUSTER])
def test_suite(reports: dict[str, Outcomes], mode: str) -> None:
    """Each test passes, or is listed with its reason."""
    report, listed = reports[mode], deviations(mode)
    failed = {test: outcome for test, outcome in report.items() if outcome.startswith("failed")}
    assert len(report) - len(failed) >= LEAST[mode]
    unlisted = {test: outcome for test, outcome in failed.items() if not is_listed(test, listed)}
    assert not unlisted, "these differ from joblib's own, and are not in docs/conformance.md"
    outdated = [
        test + parameters
        for test, parameters in listed
        if not any(is_listed(name, {(test, parameters): ""}) for name in failed)
    ]
    assert not outdated, "docs/conformance.md says that these fail, but they pass"
