"""Pools of every kind behind one name, so that the same statement can be tested of each."""

from __future__ import annotations

import contextlib
import multiprocessing.pool
from collections.abc import Iterator
from typing import Any

import pytest

from achilles import Pool
from benchmarks.cluster import Cluster
from tests.modes import ALL, CLUSTER, PROCESSES, THREADS


class PoolMaker:
    """Makes pools of one mode; all of them are terminated in the end."""

    def __init__(self, mode: str, cluster: Cluster, stack: contextlib.ExitStack) -> None:
        self.mode = mode
        self.cluster = cluster
        self._stack = stack

    def __call__(self, processes: Any = 2, *args: Any, **options: Any) -> Any:
        pool = self.unguarded(processes, *args, **options)
        self._stack.callback(pool.terminate)
        return pool

    def unguarded(self, processes: Any = 2, *args: Any, **options: Any) -> Any:
        """One that nothing else holds."""
        if self.mode == THREADS:
            return multiprocessing.pool.ThreadPool(processes, *args, **options)
        if self.mode == PROCESSES:
            return multiprocessing.pool.Pool(processes, *args, **options)
        if self.mode == CLUSTER:
            options["address"] = self.cluster.address
        return Pool(processes, *args, **options)

    def __repr__(self) -> str:
        return f"<PoolMaker of {self.mode}>"


@pytest.fixture
def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> Iterator[PoolMaker]:
    """What makes pools of the mode that the test is parametrised with, by `of_modes`."""
    with contextlib.ExitStack() as stack:
        if request.param == CLUSTER:
            monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        yield PoolMaker(request.param, cluster, stack)


@pytest.fixture(params=ALL)
def pool(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> Iterator[Any]:
    """A pool of two, of each mode."""
    with contextlib.ExitStack() as stack:
        if request.param == CLUSTER:
            monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        yield PoolMaker(request.param, cluster, stack)()
