"""A task that takes more memory than its worker allows fails by name, alone, and once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from achilles import DistributedExecutor
from achilles.errors import TaskMemoryError
from benchmarks.cluster import Cluster
from tests import tasks

LIMIT = "300MiB"
TOO_MUCH = 600 << 20


def take(path: str, size: int) -> int:
    """Note that it runs, then take memory and keep it."""
    tasks.note(path, "took")
    data = bytearray(b"x") * size
    time.sleep(30 if size == TOO_MUCH else 0.0)
    return len(data)


@pytest.mark.bad_input(19)
def test_a_task_that_takes_too_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    with Cluster(0) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        cluster.add_worker(1, "--memory-limit", LIMIT)
        with DistributedExecutor(address=cluster.address) as executor:
            future = executor.submit(take, str(path), TOO_MUCH)
            after = executor.submit(take, str(path), 1 << 20)
            with pytest.raises(
                TaskMemoryError, match=r"take\(\).*where 300.0 MiB are allowed.*worker"
            ):
                future.result(25)
            assert after.result(20) == 1 << 20
            assert tasks.notes(path) == ["took", "took"]  # it was not tried again
            retrying = executor.with_options(retries=1).submit(take, str(path), TOO_MUCH)
            with pytest.raises(TaskMemoryError, match="attempt 2"):
                retrying.result(25)
            assert len(tasks.notes(path)) == 4
