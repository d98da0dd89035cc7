"""CPython's own tests of executors and pools pass,
but for what ``docs/conformance.md`` lists, which must fail.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.cluster import Cluster
from tests.conformance import cpython_suite, pool_suite
from tests.modes import CLUSTER, EMBEDDED

ROOT = Path(__file__).parents[2]
SUITE_SECONDS = 240  # on a busy machine
ROW = re.compile(r"^\| `(\w+\.\w+)` \| ([\w, ]+) \| (.+) \|$", re.M)
VERSION = sys.version.split()[0]

Outcomes = dict[str, str]


class Suite(NamedTuple):
    """A program that runs CPython's tests of one kind."""

    program: str
    module: str  # where the tests are
    groups: tuple[str, ...]


EXECUTORS = Suite(
    cpython_suite.__file__, "test.test_concurrent_futures", tuple(cpython_suite.GROUPS)
)
POOLS = Suite(pool_suite.__file__, "test._test_multiprocessing", pool_suite.GROUPS)

pytestmark = pytest.mark.timeout(SUITE_SECONDS + 30)


def deviations(mode: str) -> dict[str, str]:
    """The tests that fail, and why, as documented."""
    table = (ROOT / "docs" / "conformance.md").read_text("utf-8")
    return {test: reason for test, modes, reason in ROW.findall(table) if mode in modes.split(", ")}


def installed_tests(module: str) -> str | None:
    """ "" if this interpreter has its tests, or a directory with them by a package `test`;
     None if there are none.

    Debian's libpython3.X-testsuite has those of the system's own Python,
    which are those of this version, too.
    """
    if find_spec("test") is not None and find_spec(module) is not None:
        return ""
    for extra in (
        os.environ.get("CPYTHON_TESTS", ""),
        f"/usr/lib/python{VERSION.rpartition('.')[0]}/test",
    ):
        if extra and Path(extra, f"{module.partition('.')[2]}.py").exists():
            return extra
    return None


@pytest.fixture(scope="module")
def executor_reports() -> Iterator[dict[str, Outcomes]]:
    """What the tests' outcomes were, by mode; both modes run at once,
    as the tests sleep most of the time.
    """
    yield from _reports(EXECUTORS)


@pytest.fixture(scope="module")
def pool_reports() -> Iterator[dict[str, Outcomes]]:
    yield from _reports(POOLS)


def _reports(suite: Suite) -> Iterator[dict[str, Outcomes]]:
    found = installed_tests(suite.module)
    if found is None:
        pytest.skip(
            f"Python {VERSION} is installed without {suite.module}, so none of its tests of this group "
            "ran (Debian has them in libpython3.11-testsuite; $CPYTHON_TESTS may name their directory)"
        )
    with tempfile.TemporaryDirectory(prefix="ach-") as folder:
        paths = [str(ROOT)]
        environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if found:  # a package `test` of these and of what the interpreter has
            package = Path(folder, "test")
            package.mkdir()
            parts = [found, str(Path(sysconfig.get_path("stdlib"), "test"))]
            Path(package, "__init__.py").write_text(f"__path__ += {parts!r}\n")
            paths.insert(0, folder)
            environ["CPYTHON_TESTS"] = folder
        environ["PYTHONPATH"] = os.pathsep.join(paths)
        yield _run(suite, Path(folder), environ)


def _run(suite: Suite, folder: Path, environ: dict[str, str]) -> dict[str, Outcomes]:
    processes: dict[str, subprocess.Popen[str]] = {}
    with Cluster(workers=1, slots=5, environ=environ) as cluster:
        homes = {
            EMBEDDED: {"ACHILLES_HOME": str(folder / "home")},
            CLUSTER: {"ACHILLES_HOME": cluster.home, "ACHILLES_ADDRESS": cluster.address},
        }
        try:
            for mode, home in homes.items():
                processes[mode] = subprocess.Popen(
                    [sys.executable, suite.program, str(folder / f"{mode}.json")],
                    cwd=folder,
                    env={**environ, **home},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            return {mode: _outcomes(folder, mode, process) for mode, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def _outcomes(folder: Path, mode: str, process: subprocess.Popen[str]) -> Outcomes:
    _, errors = process.communicate(timeout=SUITE_SECONDS)
    print(errors)
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads((folder / f"{mode}.json").read_text())
    assert report["python"] == VERSION
    outcomes: Outcomes = report["outcomes"]
    return outcomes


@pytest.mark.parametrize("mode", [EMBEDDED, CLUSTER])
@pytest.mark.parametrize("group", EXECUTORS.groups)
def test_executor_group(executor_reports: dict[str, Outcomes], group: str, mode: str) -> None:
    """Each test of the group passes, or is listed with its reason."""
    _check(executor_reports[mode], group, mode)


@pytest.mark.parametrize("mode", [EMBEDDED, CLUSTER])
@pytest.mark.parametrize("group", POOLS.groups)
def test_pool_group(pool_reports: dict[str, Outcomes], group: str, mode: str) -> None:
    _check(pool_reports[mode], group, mode)


def _check(found: Outcomes, group: str, mode: str) -> None:
    outcomes = {test: outcome for test, outcome in found.items() if test.startswith(f"{group}.")}
    assert outcomes, "no test of this group was found"
    failed = {test: outcome for test, outcome in outcomes.items() if outcome != "passed"}
    listed = deviations(mode)
    unlisted = {test: outcome for test, outcome in failed.items() if test not in listed}
    assert not unlisted, (
        "these differ from the standard library, and are not in docs/conformance.md"
    )
    outdated = [test for test in listed if outcomes.get(test) == "passed"]
    assert not outdated, "docs/conformance.md says that these fail, but they pass"


@pytest.mark.parametrize("suite", [EXECUTORS, POOLS])
def test_deviations_name_tests_that_exist(suite: Suite) -> None:
    for mode in (EMBEDDED, CLUSTER):
        groups = {test.partition(".")[0] for test in deviations(mode)}
        assert groups <= {*EXECUTORS.groups, *POOLS.groups}
        assert groups & {*suite.groups}
