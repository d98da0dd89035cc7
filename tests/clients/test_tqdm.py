"""tqdm, around `map` and `as_completed`."""

from __future__ import annotations

import concurrent.futures
import io

import pytest
from tqdm import tqdm

import achilles
from tests import tasks
from tests.modes import OURS, Maker, of_modes


@of_modes(*OURS)
def test_around_map(make: Maker) -> None:
    shown = io.StringIO()
    results = list(tqdm(make().map(tasks.add, range(300)), total=300, file=shown))
    assert results == list(range(1, 301))
    assert "300/300" in shown.getvalue()


@of_modes(*OURS)
@pytest.mark.parametrize("as_completed", [concurrent.futures.as_completed, achilles.as_completed])
def test_around_as_completed(make: Maker, as_completed: object) -> None:
    executor, shown = make(), io.StringIO()
    futures = [executor.submit(tasks.add, n) for n in range(300)]
    done = [
        future.result()
        for future in tqdm(as_completed(futures), total=300, file=shown)  # type: ignore[operator]
    ]
    assert sorted(done) == list(range(1, 301))
    assert "300/300" in shown.getvalue()
