"""At the end of each test of a core, nothing may be left in an outbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.core.bench import Bench


@pytest.fixture(autouse=True)
def _nothing_else_was_sent() -> Iterator[None]:
    Bench.made.clear()
    yield
    for bench in Bench.made:
        bench.check_outbox()
