"""A value that takes longer to cross than a worker may be silent."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from achilles import DistributedExecutor
from tests.chaos import work
from tests.chaos.history import by_number, executions
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


def test_a_drain_lasts_until_its_large_value_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker closed its socket when it had said all, with most of the value in it;
    the task had to run again.
    """
    log = tmp_path / "rig" / "executions"
    with Rig(tmp_path / "rig", workers=2, slots=1, timings=QUICK) as rig:
        monkeypatch.setenv("ACHILLES_HOME", str(rig.home))
        with DistributedExecutor(address="auto") as executor:
            list(executor.map(work.tiny, (1, 2), [str(log)] * 2))
            for worker in rig.workers:
                worker.proxy.up.rate = 2 * RATE
            once = executor.with_options(at_most_once=True)
            future = once.submit(work.fat, 3, str(log), b"", SIZE)
            rig.wait_until(lambda: len(by_number(executions(log)).get(3, [])) == 2, "it has run")
            runner = by_number(executions(log))[3][0].pid
            (worker,) = (w for w in rig.workers if runner in children(w.process.pid))
            rig.wait_until(lambda: worker.proxy.count("delayed"), "its value is under way")
            worker.process.terminate()
            assert worker.process.wait(50) == 0
            assert future.result(10) == work.blob(4, SIZE)


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}
