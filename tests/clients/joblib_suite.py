"""A pytest plugin that runs joblib's own tests of `Parallel` with the backend "achilles" among the
others.

    python -m pytest -p tests.clients.joblib_suite --report REPORT.json --noconftest --pyargs
    joblib.test.test_parallel

Run is what takes a backend as a parameter, and gets ours. The report maps each such test to its
outcome: "passed", "skipped: …" or "failed: …". Where the broker is,
if there is one, ``$ACHILLES_ADDRESS`` says.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

import achilles

OURS = "achilles"
LIKE = "loky"  # the backend whose parameters ours gets
IMPORT = "from joblib import Parallel, delayed"
REGISTER = f"import achilles; achilles.register_joblib()\n{IMPORT}"

# Before the tests are imported: most of them ask joblib which backends there are
achilles.register_joblib()

_outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our backend beside the like of it, where the tests have a list of their own."""
    _register_in_scripts(metafunc.module)
    for marker in metafunc.definition.iter_markers("parametrize"):
        values = marker.args[1]
        if not isinstance(values, list):
            continue
        if LIKE in values and OURS not in values:
            values.append(OURS)
        # Executors are ended only by the calls that use them,
        # so what makes an error with loky makes none here.
        if (LIKE, True) in values and (OURS, False) not in values:
            values.append((OURS, False))
        if (LIKE, LIKE, False) in values and (OURS, OURS, False) not in values:
            values.append((OURS, OURS, False))


def _register_in_scripts(module: Any) -> None:
    """Some tests write a program, which has to register the backend by itself."""
    for name, text in list(vars(module).items()):
        if isinstance(text, str) and IMPORT in text and REGISTER not in text:
            setattr(module, name, text.replace(IMPORT, REGISTER))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _is_about_us(item)]


def _is_about_us(item: pytest.Item) -> bool:
    from achilles.joblib_backend import AchillesBackend

    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(
        isinstance(value, AchillesBackend) or (isinstance(value, str) and value == OURS)
        for value in values
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if report.failed:
        _outcomes[name] = f"failed: {report.longreprtext}"
    elif report.skipped:
        _outcomes[name] = f"skipped: {report.longrepr}"
    elif report.when == "call":
        _outcomes[name] = "passed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    from achilles.joblib_backend import close_idle

    close_idle()
    path = session.config.getoption("--report")
    if path:
        with open(path, "w") as file:
            json.dump(_outcomes, file, indent=1)
