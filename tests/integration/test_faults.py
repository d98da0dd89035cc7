"""What dies, stops or goes away costs at most what it was doing, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import achilles.net.client
from achilles import DistributedExecutor
from achilles.errors import BrokerLostError, BrokerUnreachableError, TaskCrashedError
from benchmarks.cluster import Cluster
from tests import tasks
from tests.modes import CLUSTER, OURS, Maker, of_modes, wait_until

QUICK = {
    "ACHILLES_BROKER_HEARTBEAT_INTERVAL": "0.1",
    "ACHILLES_BROKER_SUSPECT_AFTER": "0.4",
    "ACHILLES_BROKER_LOST_AFTER": "1",
    "ACHILLES_BROKER_GRACE": "0.2",
}


@contextlib.contextmanager
def own_cluster(
    monkeypatch: pytest.MonkeyPatch, workers: int = 2, slots: int = 2, **options: Any
) -> Iterator[Cluster]:
    """A cluster that may be damaged, which notices so soon."""
    options.setdefault("environ", QUICK)
    with Cluster(workers, slots, **options) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        yield cluster


def kill_broker(cluster: Cluster) -> None:
    assert cluster.broker is not None
    cluster.broker.kill()
    cluster.broker.wait()
    assert cluster.broker.stdout is not None
    cluster.broker.stdout.close()


def start_broker(cluster: Cluster) -> None:
    """Another broker where the last one was."""
    arguments = ["broker", "--bind", cluster.address, "--print-address"]
    if cluster._tcp:
        arguments.append("--no-ipc")
    cluster.broker = cluster._spawn(*arguments, stdout=subprocess.PIPE)
    assert cluster.broker.stdout is not None
    assert cluster.broker.stdout.readline().strip() == cluster.address


def runners_of(worker: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(worker.pid).children()


# --- Runners --------------------------------------------------------------------------------------


@of_modes(*OURS)
def test_a_killed_runner_costs_one_attempt(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    list(executor.map(tasks.pause, [0.05] * 4))
    futures = [executor.submit(tasks.die_once, str(tmp_path / str(n)), n) for n in range(4)]
    assert [future.result(20) for future in futures] == list(range(4))


@of_modes(*OURS)
def test_a_runner_killed_from_outside(make: Maker, tmp_path: Path) -> None:
    path, go = tmp_path / "notes", tmp_path / "go"
    executor = make(1)
    future = executor.submit(tasks.note_and_await, str(path), "began", str(go))
    wait_until(lambda: tasks.notes(path), "the task runs")
    first = int(tasks.notes(path)[0].split()[1])
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(tasks.notes(path)) == 2, "the task runs again")
    go.touch()
    assert future.result(10) == int(tasks.notes(path)[1].split()[1]) != first


@of_modes(*OURS)
def test_a_runner_that_ends_by_an_exception_does_not_wait_for_threads(make: Maker) -> None:
    """Of those that tasks have left: its host would wait for it,
    and with that host who waits for its tasks.
    """
    executor = make(1)
    first = executor.submit(tasks.leave_a_thread).result(20)
    os.kill(first, signal.SIGINT)
    wait_until(lambda: not psutil.pid_exists(first), "the runner has ended")
    assert executor.submit(tasks.pid).result(20) != first


@pytest.mark.bad_input(16, 17, 18)
@of_modes(*OURS)
@pytest.mark.parametrize(
    ("task", "sign"),
    [
        (tasks.die, "SIGKILL"),
        (tasks.segfault, "SIGSEGV"),
        (functools.partial(os._exit, 3), "exited with code 3"),
    ],
    ids=["SIGKILL", "SIGSEGV", "exit"],
)
def test_a_poisonous_task_fails_alone(make: Maker, task: Any, sign: str) -> None:
    executor = make(2)
    before = [executor.submit(tasks.add, n) for n in range(50)]
    poison = executor.submit(task)
    after = [executor.submit(tasks.add, n) for n in range(50)]
    with pytest.raises(TaskCrashedError) as caught:
        poison.result(20)
    text = str(caught.value)
    assert text.count(sign) == 3, text
    assert "attempt 3" in text
    name = {"SIGKILL": "die()", "SIGSEGV": "segfault()"}.get(sign, "")
    assert name in text
    assert ("local" if make.mode != CLUSTER else socket.gethostname()) in text
    assert [future.result(20) for future in before + after] == 2 * list(range(1, 51))
    assert executor.submit(tasks.add, 1).result(20) == 2


@of_modes(*OURS)
def test_a_poisonous_item_of_a_map(make: Maker) -> None:
    executor = make(2)
    list(executor.map(_die_at, range(100), [-1] * 100))
    results = executor.map(_die_at, range(100), [30] * 100, chunksize=20)
    assert [next(results) for _ in range(30)] == list(range(30))
    with pytest.raises(TaskCrashedError, match=r"_die_at.*item 30 .*SIGKILL"):
        next(results)


def _die_at(value: int, bad: int) -> int:
    if value == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


# --- Workers --------------------------------------------------------------------------------------


def test_a_killed_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        list(executor.map(tasks.pause, [0.05] * 8))
        futures = [executor.submit(tasks.pause, 0.05, n) for n in range(60)]
        wait_until(lambda: futures[10].done(), "some are done")
        cluster.workers[0].kill()
        assert [future.result(20) for future in futures] == list(range(60))
        status = executor.status()
        assert status["workers"] == 1
        assert status["reassigned"] >= 1
        assert status["failed"] == 0


@pytest.mark.bad_input(51)
def test_all_workers_killed_and_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        results = executor.map(tasks.pause, [0.02] * 60, range(60))
        assert next(results) == 0
        for worker in cluster.workers:
            worker.kill()
        cluster.add_worker(2)
        assert list(results) == list(range(1, 60))


def test_a_silent_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    with (
        own_cluster(monkeypatch, 1, 2) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        futures = [executor.submit(tasks.note_and_pause, str(path), n, 0.3) for n in range(4)]
        wait_until(lambda: len(tasks.notes(path)) == 2, "two tasks run")
        silent = cluster.workers[0]
        first = {int(line.split()[1]) for line in tasks.notes(path)}
        silent.send_signal(signal.SIGSTOP)
        try:
            cluster.add_worker(2)
            pids = [future.result(20) for future in futures]
            assert not first.intersection(pids)
            assert len(tasks.notes(path)) == 6  # two ran again
            status = executor.status()
            assert status["reassigned"] >= 2
            assert status["done"] == 4
        finally:
            silent.send_signal(signal.SIGCONT)
        wait_until(lambda: executor.status()["workers"] == 2, "it has joined again")
        assert executor.status()["done"] == 4  # late results changed nothing
        assert len(set(executor.map(tasks.pause_pid, [0.2] * 8))) == 4


def test_a_worker_that_is_drained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        futures = [executor.submit(tasks.note_and_pause, str(path), n, 0.1) for n in range(40)]
        wait_until(lambda: len(tasks.notes(path)) >= 4, "tasks run")
        cluster.workers[0].terminate()
        assert cluster.workers[0].wait(10) == 0
        for future in futures:
            future.result(20)
        noted = [int(line.split()[0]) for line in tasks.notes(path)]
        assert sorted(noted) == list(range(40))  # each ran once
        status = executor.status()
        assert status["workers"] == 1
        assert status["failed"] == 0


def test_a_second_signal_ends_a_draining_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        own_cluster(monkeypatch) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        path, go = tmp_path / "notes", tmp_path / "go"
        futures = [executor.submit(tasks.note_and_await, str(path), n, str(go)) for n in range(4)]
        wait_until(lambda: len(tasks.notes(path)) == 4, "all run")
        worker = cluster.workers[0]
        worker.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.2)
        worker.terminate()
        assert worker.wait(20) != 0  # work was lost here
        go.touch()
        for future in futures:
            future.result(20)
        assert len(tasks.notes(path)) == 6, tasks.notes(path)


def test_a_workers_runners_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        own_cluster(monkeypatch, 1) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        list(executor.map(tasks.pause, [0.1] * 2))
        executor.submit(tasks.pause, 30.0)
        wait_until(lambda: executor.status()["running"] == 1, "a task runs")
        runners = runners_of(cluster.workers[0])
        assert len(runners) == 2
        cluster.workers[0].kill()
        wait_until(lambda: not any(map(_is_alive, runners)), "its runners have ended", 5)
        executor.kill_workers()


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# --- The broker -----------------------------------------------------------------------------------


@pytest.mark.bad_input(53)
@pytest.mark.parametrize("tcp", [False, True], ids=["ipc", "tcp"])
def test_a_broker_that_is_killed_and_restarted(monkeypatch: pytest.MonkeyPatch, tcp: bool) -> None:
    with (
        own_cluster(monkeypatch, tcp=tcp) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        futures = [executor.submit(tasks.pause, 0.05, n) for n in range(60)]
        results = executor.map(tasks.pause, [0.02] * 30, range(30))
        wait_until(lambda: futures[5].done(), "some are done")
        kill_broker(cluster)
        late = executor.submit(tasks.add, 1)
        start_broker(cluster)
        assert late.result(20) == 2
        assert [future.result(20) for future in futures] == list(range(60))
        assert list(results) == list(range(30))
        wait_until(lambda: executor.status()["workers"] == 2, "all workers are back")


def test_an_idle_executor_outlives_its_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        own_cluster(monkeypatch, 1) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        assert executor.submit(tasks.add, 1).result(20) == 2
        kill_broker(cluster)
        time.sleep(0.3)
        start_broker(cluster)
        assert executor.submit(tasks.add, 2).result(20) == 3
        assert list(executor.map(tasks.add, range(10))) == list(range(1, 11))


@pytest.mark.bad_input(54)
def test_a_broker_that_is_gone_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACHILLES_CLIENT_BROKER_TIMEOUT", "1")
    with own_cluster(monkeypatch, 1) as cluster:
        executor = DistributedExecutor(address=cluster.address)
        futures = [executor.submit(tasks.pause, 30) for _ in range(3)]
        results = executor.map(tasks.pause, [30])
        wait_until(lambda: futures[0].running(), "a task runs")
        kill_broker(cluster)
        start = time.monotonic()
        errors = [future.exception(20) for future in futures]
        assert time.monotonic() - start > 0.5
        assert {type(error) for error in errors} == {BrokerLostError}
        assert len(set(map(id, errors))) == 3
        assert cluster.address in str(errors[0])
        with pytest.raises(BrokerLostError):
            next(results)
        with pytest.raises(BrokerLostError):
            executor.submit(tasks.add, 1)
        with pytest.raises((BrokerLostError, BrokerUnreachableError)):
            executor.status()
        executor.shutdown()
        cluster.workers[0].kill()  # which would finish its task


def test_a_broker_that_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_cluster(monkeypatch, 1) as cluster:
        executor = DistributedExecutor(address=cluster.address)
        future = executor.submit(tasks.pause, 30)
        wait_until(future.running, "the task runs")
        command = [sys.executable, "-m", "achilles", "shutdown", "--yes"]
        subprocess.run(command, env=cluster.environ, check=True, capture_output=True, timeout=20)
        with pytest.raises(BrokerLostError, match="shut down"):
            future.result(10)
        for process in [cluster.broker, *cluster.workers]:
            assert process is not None
            assert process.wait(10) in (0, 143)
        executor.shutdown()


# --- Nobody there ---------------------------------------------------------------------------------


def test_a_silent_broker_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And when it is back, nothing was lost."""
    monkeypatch.setattr(achilles.net.client, "SILENCE_SECONDS", 1.0)
    with (
        own_cluster(monkeypatch, 1) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        assert executor.submit(tasks.add, 1).result(20) == 2
        assert cluster.broker is not None
        (serving,) = psutil.Process(cluster.broker.pid).children()
        serving.suspend()
        try:
            future = executor.submit(tasks.add, 2)
            wait_until(lambda: caplog.records, "the warning")
        finally:
            serving.resume()
        text = caplog.records[0].getMessage()
        assert text.startswith(f"nothing was heard of the broker at {cluster.address} for ")
        assert text.endswith(
            "s; 1 task awaits its answer, and fails after 60 s (client.broker_timeout)"
        )
        assert future.result(20) == 3


# --- Clients --------------------------------------------------------------------------------------


def test_a_killed_client_frees_the_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    program = f"""
from achilles import DistributedExecutor
from tests import tasks
executor = DistributedExecutor(address={{address!r}})
futures = [executor.submit(tasks.note_and_pause, {str(path)!r}, n, 0.2) for n in range(500)]
futures[-1].result()
"""
    with (
        own_cluster(monkeypatch, 1) as cluster,
        DistributedExecutor(address=cluster.address) as other,
    ):
        client = subprocess.Popen(
            [sys.executable, "-c", program.format(address=cluster.address)],
            env={**cluster.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        wait_until(lambda: len(tasks.notes(path)) >= 2, "its tasks run")
        assert other.submit(tasks.add, 1).result(20) == 2  # slots are shared
        client.kill()
        client.wait()
        wait_until(lambda: other.status()["queued"] == 0, "its tasks are dropped", 10)
        wait_until(lambda: other.status()["running"] == 0, "those that ran are over", 5)
        assert len(tasks.notes(path)) < 100


# --- Traces ---------------------------------------------------------------------------------------


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with own_cluster(monkeypatch, 1) as cluster:
        for _ in range(3):
            with DistributedExecutor(address=cluster.address) as executor:
                assert len(executor.submit(tasks.zeros, 1 << 22).result(20)) == 1 << 22
            with DistributedExecutor(1) as executor:
                assert executor.submit(len, bytes(1 << 22)).result(20) == 1 << 22
        home = Path(cluster.home)
        for process in [*cluster.workers, cluster.broker]:
            assert process is not None
            process.terminate()
            assert process.wait(10) == 0
        sockets = [path for path in home.rglob("*") if path.is_socket() or path.suffix == ".join"]
        assert not sockets
    assert not home.exists()
    assert (set(shared.iterdir()) if shared.is_dir() else set()) <= before
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 8  # libzmq's context stays
