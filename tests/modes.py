"""Executors of every kind behind one name, so that the same statement can be tested of each."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from achilles import DistributedExecutor
from benchmarks.cluster import Cluster

THREADS, PROCESSES, EMBEDDED, CLUSTER = "threads", "processes", "embedded", "cluster"
OURS = (EMBEDDED, CLUSTER)
STANDARD = (PROCESSES, *OURS)
ALL = (THREADS, *STANDARD)

WAIT_SECONDS = 20.0


class Maker:
    """Makes executors of one mode; all of them are shut down in the end."""

    def __init__(self, mode: str, cluster: Cluster | None, stack: contextlib.ExitStack) -> None:
        self.mode = mode
        self.cluster = cluster
        self._stack = stack

    def __call__(self, max_workers: int | None = 2, **options: Any) -> Any:
        if self.mode == THREADS:
            executor: Any = concurrent.futures.ThreadPoolExecutor(max_workers, **options)
        elif self.mode == PROCESSES:
            executor = concurrent.futures.ProcessPoolExecutor(max_workers, **options)
        elif self.mode == EMBEDDED:
            executor = DistributedExecutor(max_workers, **options)
        else:
            assert self.cluster is not None
            executor = DistributedExecutor(max_workers, address=self.cluster.address, **options)
        self._stack.callback(executor.shutdown, cancel_futures=True)
        return executor

    @property
    def is_ours(self) -> bool:
        return self.mode in OURS

    def __repr__(self) -> str:
        return f"<Maker of {self.mode}>"


@contextlib.contextmanager
def maker(mode: str, cluster: Cluster | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    """A maker that finds the cluster's keys."""
    with contextlib.ExitStack() as stack:
        if cluster is not None:
            monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        yield Maker(mode, cluster, stack)


def wait_until(holds: Callable[[], object], what: str = "", seconds: float = WAIT_SECONDS) -> None:
    """Wait for a condition, with a bound."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or holds}"
        time.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[Cluster]:
    """A broker and two workers of two slots, shared by many tests.

    For all, so that it is there before a test looks which processes there were before.
    """
    with Cluster(workers=2, slots=2) as cluster:
        yield cluster


@pytest.fixture
def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> Iterator[Maker]:
    """What makes executors of the mode that the test is parametrised with, by `of_modes`."""
    mode = request.param
    with maker(mode, cluster if mode == CLUSTER else None, monkeypatch) as made:
        yield made


def of_modes(*modes: str) -> pytest.MarkDecorator:
    """The test runs once for each of these modes."""
    return pytest.mark.parametrize("make", modes, indirect=True)
