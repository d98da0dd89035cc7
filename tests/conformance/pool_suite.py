"""CPython's own tests of `multiprocessing.Pool`, run with `achilles.Pool` in its place.

    python pool_suite.py REPORT.json [NAME ...]

As `cpython_suite`, whose report it writes. The project's root is to be in the ``$PYTHONPATH`` of
this program and of workers: some tests call methods of their own classes there,
so that these are to be found by name.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import unittest
from typing import Any

from achilles import Pool
from tests.conformance.cpython_suite import Recorder, leave_path, write_report

GROUPS = ("TestPool", "TestPoolWorkerErrors", "TestPoolWorkerLifetime")
FROM_STANDARD = "from multiprocessing import Pool"


class OurMixin:
    """What the tests take from the standard's `ProcessesMixin`, with our pool."""

    TYPE = "processes"
    Pool = staticmethod(Pool)


def __getattr__(name: str) -> Any:
    """A test class made for our pool, when this program or a runner first asks for it."""
    if name not in GROUPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module("test._test_multiprocessing")
    bases = (OurMixin, getattr(found, f"_{name}"), unittest.TestCase)
    kind = globals()[name] = type(name, bases, {"__module__": __name__})
    return kind


def _let_children_find_us(helper: Any) -> None:
    run = helper.assert_python_ok

    def assert_python_ok(*arguments: str, **environ: str) -> Any:
        ours = "from achilles import Pool"
        return run(*(text.replace(FROM_STANDARD, ours) for text in arguments), **environ)

    helper.assert_python_ok = assert_python_ok


def main(report: str, *only: str) -> None:
    leave_path()
    multiprocessing.Pool = Pool  # type: ignore[assignment] # some tests name it so
    _let_children_find_us(importlib.import_module("test.support.script_helper"))
    recorder = Recorder()
    suite = unittest.TestSuite()
    for group in GROUPS:
        kind = __getattr__(group)
        cases = [kind(name) for name in unittest.TestLoader().getTestCaseNames(kind)]
        suite.addTests(
            case for case in cases if not only or any(part in case.id() for part in only)
        )
    suite.run(recorder)
    write_report(report, recorder)


if __name__ == "__main__":
    from tests.conformance import pool_suite

    pool_suite.main(*sys.argv[1:])
