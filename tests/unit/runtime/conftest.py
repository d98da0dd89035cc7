"""A driver of one real runner, and a gate for its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.runtime.driver import Driver, Gate, driving


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        driver.spawn()
        yield driver


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()
