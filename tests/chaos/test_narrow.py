"""A value that takes longer to cross than a worker may be silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from achilles import DistributedExecutor
from tests.chaos import work
from tests.chaos.rig import QUICK, Rig

SIZE = 16 << 20
RATE = 4e6  # bytes a second: twice as long as the silence after which a worker is lost
TIMINGS = {**QUICK, "ACHILLES_BROKER_LOST_AFTER": "2"}


def test_a_large_value_crosses_a_narrow_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed after five attempts, each given up as lost while its value was under way."""
    with Rig(tmp_path / "rig", workers=1, slots=1, timings=TIMINGS) as rig:
        monkeypatch.setenv("ACHILLES_HOME", str(rig.home))
        with DistributedExecutor(address="auto") as executor:
            assert executor.submit(work.tiny, 1, str(rig.log)).result(30) == work.mix(1)
            rig.workers[0].proxy.up.rate = RATE
            value = executor.submit(work.fat, 2, str(rig.log), b"", SIZE).result(50)
            assert value == work.blob(3, SIZE)
