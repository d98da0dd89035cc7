"""CPython's own tests of `concurrent.futures`, run with `DistributedExecutor` as the executor.

    python cpython_suite.py REPORT.json

The tests are those of the running interpreter. Where it comes without them, ``$CPYTHON_TESTS`` may
name a directory that holds a package ``test`` with them, which is in the ``$PYTHONPATH`` of this
program and of workers. Where the broker is, if there is one, ``$ACHILLES_ADDRESS`` says. The report
maps each test to its outcome: "passed", "skipped: …", or "failed:
…" with the last line of the traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
import unittest
from typing import Any

from achilles import DistributedExecutor

# What each test class adds to a mixin of CPython's,
# and the module of it where the tests are a package.
GROUPS = {
    "ExecutorTest": "executor",
    "WaitTests": "test_wait",
    "AsCompletedTests": "test_as_completed",
    "ExecutorShutdownTest": "test_shutdown",
    "InitializerMixin": "test_init",
    "FailingInitializerMixin": "test_init",
    "ProcessPoolExecutorTest": "test_process_pool",
    "ExecutorDeadlockTest": "test_deadlock",
}
# Those of ProcessPoolExecutorTest that are of the contract, and not of its `_processes`.
OF_PROCESSES = (
    "test_map_chunksize",
    "test_traceback",
    "test_max_tasks_per_child",
    "test_max_tasks_early_shutdown",
)
HERE = os.path.dirname(os.path.abspath(__file__))
FROM_STANDARD = "from concurrent.futures import DistributedExecutor"


class OurMixin:
    """The standard's `ThreadPoolMixin`, with our executor; no start method is passed."""

    executor_type = DistributedExecutor
    worker_count = 5

    def get_context(self) -> Any:
        """A start method that is not fork, which is all that some tests ask."""
        return _Spawn()


class _Spawn:
    def get_start_method(self, allow_none: bool = False) -> str:
        return "spawn"


class Recorder(unittest.TestResult):
    """Outcomes by test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.outcomes.setdefault(_name(test), "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.outcomes[_name(test)] = f"skipped: {reason}"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        text = self._exc_info_to_string(err, test)  # type: ignore[attr-defined]
        print(f"{_name(test)}\n{text}", file=sys.stderr)
        self.outcomes[_name(test)] = f"failed: {text.strip().splitlines()[-1]}"

    addError = addFailure


def _name(test: unittest.TestCase) -> str:
    kind, _, method = test.id().rpartition(".")
    return f"{kind.rpartition('.')[2]}.{method}"


def leave_path() -> None:
    """Take our folder, which is a script's first place to look, out of the search for modules."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]


def find() -> types.ModuleType | None:
    """CPython's test module or package; None if it is not there."""
    leave_path()
    try:
        return importlib.import_module("test.test_concurrent_futures")
    except ModuleNotFoundError:
        return None


def cases(found: types.ModuleType) -> list[unittest.TestCase]:
    """All the tests, of classes made for our executor."""
    made: list[unittest.TestCase] = []
    for group, part in GROUPS.items():
        is_package = hasattr(found, "__path__")
        module = importlib.import_module(f"{found.__name__}.{part}") if is_package else found
        _let_children_find_us(module)
        base = module.BaseTestCase if hasattr(module, "BaseTestCase") else _base(found)
        standard = (
            importlib.import_module(f"{found.__name__}.util") if is_package else found
        ).ThreadPoolMixin
        # An executor without a start method, as the mixins take the thread pool's to be.
        kind = type(
            group, (getattr(module, group), OurMixin, standard, base), {"__module__": __name__}
        )
        globals()[group] = kind
        for name in unittest.TestLoader().getTestCaseNames(kind):
            if group == "ProcessPoolExecutorTest" and name not in OF_PROCESSES:
                continue
            made.append(kind(name))
    return made


def _base(found: types.ModuleType) -> Any:
    return importlib.import_module(f"{found.__name__}.util").BaseTestCase


def _let_children_find_us(module: Any) -> None:
    """Some tests run a program that imports the executor by its name from the standard library."""
    run = getattr(module, "assert_python_ok", None)
    if run is None or hasattr(run, "is_ours"):
        return

    def assert_python_ok(*arguments: str, **environ: str) -> Any:
        extra = os.environ.get("CPYTHON_TESTS")
        prefix = f"import sys; sys.path.insert(0, {extra!r})\n" if extra else ""
        changed = [
            text.replace(FROM_STANDARD, "from achilles import DistributedExecutor")
            for text in arguments
        ]
        changed = [prefix + text if text.startswith("if ") else text for text in changed]
        return run(*changed, **environ)

    assert_python_ok.is_ours = True  # type: ignore[attr-defined]
    module.assert_python_ok = assert_python_ok


def main(report: str) -> None:
    recorder = Recorder()
    found = find()
    if found is not None:
        only = sys.argv[2:]
        chosen = [
            case for case in cases(found) if not only or any(name in case.id() for name in only)
        ]
        unittest.TestSuite(chosen).run(recorder)
    write_report(report, recorder)


def write_report(report: str, recorder: Recorder) -> None:
    """For whoever started this program."""
    with open(report, "w") as file:
        json.dump({"python": sys.version.split()[0], "outcomes": recorder.outcomes}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
