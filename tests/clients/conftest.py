"""Programs that take an executor, each run on ours and compared with what it does by itself.

Not part of a plain test run, as it installs a gigabyte of other people's work: ``make clients``
runs it. A library that is missing there is a failure.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.modes import cluster, make

__all__ = ["cluster", "make"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What other projects warn their own users of is no error of ours,
    except for what is left open.
    """
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error::ResourceWarning"), append=False)
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
