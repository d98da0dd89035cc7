"""The process that serves is killed under load: what workers hold goes on where it is,
and nothing is lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from achilles import DistributedExecutor, current_attempt
from benchmarks.cluster import Cluster
from tests import tasks
from tests.modes import wait_until

HELD_SECONDS = 1.5
MARGIN = 0.05  # what ended so soon after the kill may have been reported before


@contextlib.contextmanager
def own_cluster(
    monkeypatch: pytest.MonkeyPatch, workers: int = 2, slots: int = 2, **options: Any
) -> Iterator[Cluster]:
    """A cluster whose broker may be killed often."""
    with Cluster(workers, slots, environ={"ACHILLES_BROKER_RESTARTS": "50"}, **options) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        yield cluster


def serving(cluster: Cluster) -> psutil.Process:
    """The process that serves."""
    assert cluster.broker is not None
    (process,) = psutil.Process(cluster.broker.pid).children()
    return process


def kill_serving(cluster: Cluster) -> float:
    """Kill it; when that was."""
    process = serving(cluster)
    process.kill()
    killed_at = time.monotonic()
    psutil.wait_procs([process], 10)
    return killed_at


def are_done(futures: list[Any], count: int) -> bool:
    """Whether so many are."""
    return sum(bool(future.done()) for future in futures) >= count


def timed(path: str, number: int, seconds: float) -> tuple[int, int]:
    """Note when it began and when it ended, on the clock that all processes of this machine
    share.
    """
    began = time.monotonic()
    time.sleep(seconds)
    tasks.note(path, f"{number} {began!r} {time.monotonic()!r}")
    return number * number, current_attempt()


@pytest.mark.parametrize("tcp", [False, True], ids=["ipc", "tcp"])
def test_what_runs_and_what_waits_runs_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tcp: bool
) -> None:
    """The workers hold what runs, and what was sent ahead; the client has the rest."""
    path = tmp_path / "notes"
    with (
        own_cluster(monkeypatch, tcp=tcp) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        futures = [
            executor.submit(tasks.note_and_pause, str(path), n, HELD_SECONDS) for n in range(6)
        ]
        wait_until(lambda: len(tasks.notes(path)) == 4, "four tasks run")
        first = {int(line.split()[0]): int(line.split()[1]) for line in tasks.notes(path)}
        before = executor.status()
        kill_serving(cluster)
        pids = [future.result(20) for future in futures]
        assert [pids[n] for n in first] == list(first.values())  # where they began
        assert sorted(int(line.split()[0]) for line in tasks.notes(path)) == list(range(6))
        status = executor.status()
        assert status["workers"] == before["workers"] == 2
        assert status["failed"] == status["reassigned"] == 0


def test_a_broker_killed_again_and_again_under_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All values are right; what ran when it was killed ran once;
    new results come soon after each kill.
    """
    path = tmp_path / "notes"
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        address = cluster.address
        futures = [executor.submit(timed, str(path), n, 0.03 * (n % 5 + 1)) for n in range(240)]
        kills = []
        for done in (20, 80, 140):
            wait_until(functools.partial(are_done, futures, done), "some are done")
            kills.append(kill_serving(cluster))
        results = [future.result(30) for future in futures]
        assert [value for value, _ in results] == [n * n for n in range(240)]
        assert {attempt for _, attempt in results} == {1}
        assert executor.status()["failed"] == 0
        assert cluster.status()["address"] == address
    runs = [
        (int(n), float(began), float(ended))
        for n, began, ended in map(str.split, tasks.notes(path))
    ]
    counts = Counter(number for number, _, _ in runs)
    assert counts.keys() == set(range(240))
    held = {
        number
        for number, began, ended in runs
        for killed_at in kills
        if began < killed_at and ended > killed_at + MARGIN
    }
    assert held, "nothing ran when the broker was killed"
    assert {number: counts[number] for number in held} == dict.fromkeys(held, 1)


def test_a_client_that_comes_back_late_finds_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tasks ended while it was stopped, and the new broker keeps what they gave."""
    path = tmp_path / "notes"
    with own_cluster(monkeypatch, 1) as cluster:
        program = (
            "import sys\n"
            "from achilles import DistributedExecutor\n"
            "from tests import tasks\n"
            f"with DistributedExecutor(address={cluster.address!r}) as executor:\n"
            f"    print(len(list(executor.map(tasks.note_and_pause, [{str(path)!r}] * 2, range(2), [1.0] * 2))))\n"
        )
        with tasks_client(program, cluster) as client:
            wait_until(lambda: len(tasks.notes(path)) == 2, "its tasks run")
            client.send_signal(signal.SIGSTOP)
            kill_serving(cluster)
            time.sleep(1.5)  # its tasks end meanwhile
            wait_until(lambda: cluster.status()["workers"] == 1, "the worker is back")
            client.send_signal(signal.SIGCONT)
            assert client.wait(20) == 0
        assert len(tasks.notes(path)) == 2


@contextlib.contextmanager
def tasks_client(program: str, cluster: Cluster) -> Iterator[psutil.Popen]:
    """A client in a process of its own."""
    environ = {**cluster.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    client = psutil.Popen([sys.executable, "-c", program], env=environ)
    try:
        yield client
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()


def test_all_workers_are_replaced_under_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One after the other, by SIGTERM: each task runs once, and nothing is charged."""
    path = tmp_path / "notes"
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        futures = [executor.submit(timed, str(path), n, 0.05) for n in range(160)]
        for old in list(cluster.workers):
            enough = sum(future.done() for future in futures) + 10
            wait_until(functools.partial(are_done, futures, enough), "some are done")
            cluster.add_worker(2)
            old.terminate()
            assert old.wait(20) == 0
        assert [future.result(30) for future in futures] == [(n * n, 1) for n in range(160)]
        status = executor.status()
        assert status["failed"] == status["reassigned"] == status["late"] == 0
    assert sorted(int(line.split()[0]) for line in tasks.notes(path)) == list(range(160))


def test_a_worker_that_ends_every_runner_takes_few_tasks_and_fails_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        list(executor.map(tasks.pause, [0.01] * 8))
        cluster.environ["TEST_BLACK_HOLE"] = "1"
        cluster.add_worker(1, "--name", "hole")
        wait_until(lambda: executor.status()["workers"] == 3, "the third has joined")
        futures = [executor.submit(die_in_a_hole, str(path), n) for n in range(400)]
        assert [future.result(40) for future in futures] == list(range(400))
        assert 0 < len(tasks.notes(path)) <= 20
        assert executor.status()["failed"] == 0


def die_in_a_hole(path: str, number: int) -> int:
    """End the runner, on one worker."""
    if "TEST_BLACK_HOLE" in os.environ:
        tasks.note(path, number)
        os._exit(3)
    time.sleep(0.01)
    return number
