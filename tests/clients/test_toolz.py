"""toolz: `fold` takes a map."""

from __future__ import annotations

import operator

from toolz.sandbox.parallel import fold

from tests import tasks
from tests.modes import OURS, Maker, of_modes


@of_modes(*OURS)
def test_fold(make: Maker) -> None:
    numbers = range(1000)
    expected = sum(numbers)
    executor = make()
    assert fold(operator.add, numbers, 0, map=executor.map, chunksize=50) == expected
    assert fold(tasks.add, numbers, map=executor.map, chunksize=7) == expected
