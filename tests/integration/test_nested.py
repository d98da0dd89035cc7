"""Tasks that submit tasks to their own executor and wait for them,
on real processes in both modes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from achilles import DistributedExecutor
from achilles.errors import TaskCrashedError, TerminatedError
from benchmarks.cluster import Cluster
from tests import nested_tasks, tasks
from tests.modes import OURS, Maker, of_modes, wait_until

WAIT = 60


@pytest.fixture
def one_slot(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Cluster(workers=1, slots=1) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        yield cluster


@of_modes(*OURS)
@pytest.mark.parametrize("slots", [1, 2])
def test_fib(make: Maker, slots: int) -> None:
    """On a cluster the number is this client's limit, as its size is."""
    executor = make(slots)
    assert executor.submit(nested_tasks.fib, executor, 12).result(WAIT) == 144


def test_fib_where_there_is_one_slot_in_all(one_slot: Cluster) -> None:
    with DistributedExecutor(address=one_slot.address) as executor:
        assert executor.submit(nested_tasks.fib, executor, 10).result(WAIT) == 55
    status = one_slot.status()
    assert (status["queued"], status["running"], status["reassigned"]) == (0, 0, 0)


def test_tasks_that_make_executors_of_the_same_cluster_lend_their_slots(one_slot: Cluster) -> None:
    """By sessions of their own they would wait for the slots that they hold."""
    with DistributedExecutor(address=one_slot.address) as executor:
        futures = [
            executor.submit(nested_tasks.sum_by_its_own, one_slot.address, 20) for _ in range(4)
        ]
        assert [future.result(WAIT) for future in futures] == [210] * 4
    assert one_slot.status()["reassigned"] == 0


def test_an_initializer_of_its_own_takes_a_session_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task's client has another one, or none."""
    with Cluster(workers=1, slots=2) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        with DistributedExecutor(address=cluster.address) as executor:
            future = executor.submit(nested_tasks.pid_by_its_own, cluster.address)
            assert future.result(WAIT) != os.getpid()


@of_modes(*OURS)
def test_two_clients_at_once(make: Maker) -> None:
    one, two = make(2), make(2)
    futures = [executor.submit(nested_tasks.fib, executor, 9) for executor in (one, two)]
    assert [future.result(WAIT) for future in futures] == [34, 34]


def test_a_chain_of_thirty_on_one_slot_of_a_cluster(one_slot: Cluster) -> None:
    """Each link waits for the next; the runners that this takes end some seconds later."""
    with DistributedExecutor(address=one_slot.address) as executor:
        assert executor.submit(nested_tasks.chain, executor, 30).result(WAIT) == 30
        worker = psutil.Process(one_slot.workers[0].pid)
        assert len(worker.children()) > 25
        wait_until(lambda: len(worker.children()) == 1, "the surplus runners end", 30)
        assert executor.submit(nested_tasks.chain, executor, 2).result(WAIT) == 2


@pytest.mark.bad_input(36)
def test_a_chain_of_thirty_on_one_slot() -> None:
    with DistributedExecutor(1) as executor:
        assert executor.submit(nested_tasks.chain, executor, 30).result(WAIT) == 30


@of_modes(*OURS)
def test_map_wait_and_as_completed(make: Maker) -> None:
    executor = make(2)
    assert executor.submit(nested_tasks.sum_of_map, executor, 100).result(WAIT) == 5050
    assert executor.submit(nested_tasks.completed, executor, 8).result(WAIT) == list(range(8))
    assert list(executor.map(nested_tasks.sum_of_map, [executor] * 20, range(20))) == [
        n * (n + 1) // 2 for n in range(20)
    ]


@of_modes(*OURS)
def test_exceptions_come_with_all_their_tracebacks(make: Maker) -> None:
    executor = make(2)
    call = nested_tasks.call_child
    future = executor.submit(call, executor, call, executor, tasks.fail, "deep down")
    error = future.exception(WAIT)
    assert isinstance(error, ValueError)
    text = str(error.__cause__)
    assert "a comment that the traceback shows" in text
    assert text.count("in call_child") == 2
    swallowed = executor.submit(nested_tasks.swallow, executor, tasks.fail, "no more")
    assert swallowed.result(WAIT) == "ValueError: no more"


@of_modes(*OURS)
def test_a_child_that_crashes_too_often_fails_and_its_parent_with_it(make: Maker) -> None:
    executor = make(2)
    future = executor.submit(nested_tasks.call_child, executor, tasks.die)
    with pytest.raises(TaskCrashedError, match=r"die.*ended the process that ran it too often"):
        future.result(WAIT)
    assert executor.submit(tasks.add, 1).result(WAIT) == 2


@of_modes(*OURS)
def test_when_a_parent_is_ended_its_children_are(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    path = tmp_path / "pid"
    future = executor.submit(nested_tasks.child_that_waits, executor, str(path))
    wait_until(lambda: path.exists() and path.read_text())
    executor.kill_workers()
    with pytest.raises(TerminatedError):
        future.result(WAIT)
    child = int(path.read_text())
    wait_until(lambda: not psutil.pid_exists(child), "the child ends")


@of_modes(*OURS)
def test_a_parent_that_dies_runs_again_without_its_children(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    path = tmp_path / "pid"
    future = executor.submit(nested_tasks.die_after_children, executor, str(path))
    assert future.result(WAIT) == 2
    child = int(path.read_text().split()[0])
    wait_until(lambda: not psutil.pid_exists(child), "the child ends")
    wait_until(lambda: executor.status()["running"] == 0)


@of_modes(*OURS)
def test_a_timeout_ends_the_children_too(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    path = tmp_path / "pid"
    view = executor.with_options(timeout=1.0)
    future = view.submit(nested_tasks.child_that_waits, executor, str(path))
    assert "ran for more than its 1 s" in str(future.exception(WAIT))
    wait_until(lambda: executor.status()["running"] == executor.status()["queued"] == 0)


@of_modes(*OURS)
def test_what_is_left_behind_runs(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    path = tmp_path / "notes"
    future = executor.submit(nested_tasks.leave_behind, executor, str(path), 100)
    assert future.result(WAIT) == "left"
    wait_until(lambda: len(tasks.notes(path)) == 100)
    assert sorted(map(int, tasks.notes(path))) == list(range(100))


@of_modes(*OURS)
def test_cancel_in_a_task(make: Maker) -> None:
    executor = make(2)
    cancelled, seen = executor.submit(nested_tasks.cancel_children, executor).result(WAIT)
    assert cancelled == seen > 20


@of_modes(*OURS)
def test_a_handle_is_shut_down_alone(make: Maker) -> None:
    executor = make(2)
    for _ in range(2):
        done, value, text = executor.submit(nested_tasks.use_and_shut_down, executor).result(WAIT)
        assert (done, value, text) == (True, "value", "cannot schedule new futures after shutdown")
    assert executor.submit(nested_tasks.kill_children, executor).result(WAIT) == "TerminatedError"


@of_modes(*OURS)
def test_callbacks_in_a_task(make: Maker) -> None:
    executor = make(2)
    assert executor.submit(nested_tasks.call_back, executor).result(WAIT) == (3, False)


@of_modes(*OURS)
def test_an_executor_in_a_closure_an_argument_a_partial_and_a_global(make: Maker) -> None:
    executor = make(2)

    def in_closure(n: int) -> int:
        return executor.submit(in_closure, n - 1).result(WAIT) + 1 if n else 0

    namespace = {"executor": executor, "__name__": "__main__"}
    exec(
        "def in_global(n): return executor.submit(in_global, n - 1).result() + 1 if n else 0",
        namespace,
    )
    in_global: Any = namespace["in_global"]
    assert executor.submit(in_closure, 4).result(WAIT) == 4
    assert executor.submit(in_global, 4).result(WAIT) == 4
    assert executor.submit(nested_tasks.chain, executor=executor, depth=2).result(WAIT) == 2
    assert list(executor.map(in_closure, [3] * 5)) == [3] * 5


@of_modes(*OURS)
def test_options_and_the_initializer_hold_in_tasks(make: Maker) -> None:
    executor = make(2, initializer=tasks.set_state, initargs=("set",))
    view = executor.with_options(priority=3, retries=2)
    assert view.submit(nested_tasks.options_of, view).result(WAIT) == view._options
    assert executor.submit(nested_tasks.state_of_child, executor).result(WAIT) == ("set", "set")
    size, running, text = executor.submit(nested_tasks.size_and_status, executor).result(WAIT)
    assert (size, running, text) == (2, 1, "<DistributedExecutor in a task | 0 tasks>")


@of_modes(*OURS)
def test_large_arguments_and_results(make: Maker) -> None:
    executor = make(2)
    data = os.urandom(8 << 20)
    call = nested_tasks.call_child
    assert executor.submit(call, executor, tasks.repeat, data).result(WAIT) == data[::-1]


@of_modes(*OURS)
def test_a_fork_in_a_task_has_no_executor(make: Maker) -> None:
    executor = make(2)
    told = executor.submit(nested_tasks.use_in_fork, executor).result(WAIT)
    assert told == "ExecutorForkedError 2"


@of_modes(*OURS)
def test_a_task_may_make_an_executor_of_its_own(make: Maker) -> None:
    executor = make(2)
    assert executor.submit(nested_tasks.make_one, 5).result(WAIT) == [1, 2, 3, 4, 5]


def test_an_executor_of_a_cluster_in_a_task_on_this_machine(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is what it is, wherever it is used: the one has its broker,
    the other only its own runners.
    """
    monkeypatch.setenv("ACHILLES_HOME", cluster.home)
    call = nested_tasks.call_child
    with DistributedExecutor(1) as here, DistributedExecutor(address=cluster.address) as there:
        parent = here.submit(call, there, tasks.parent_pid).result(WAIT)
        assert parent in [worker.pid for worker in cluster.workers]
        with pytest.raises(RuntimeError, match="children of another process"):
            there.submit(call, here, tasks.pid).result(WAIT)


def test_threads_of_clients_that_left_do_not_pile_up(one_slot: Cluster) -> None:
    """Not even where tasks bring their functions along."""
    for _ in range(4):
        with DistributedExecutor(address=one_slot.address) as executor:
            assert executor.submit(nested_tasks.chain, executor, 1).result(WAIT) == 1
    with DistributedExecutor(address=one_slot.address) as executor:
        executor.submit(tasks.add, 1).result(WAIT)
        assert executor.submit(nested_tasks.count_threads).result(WAIT) <= 1


@of_modes(*OURS)
def test_a_task_that_writes_nonsense_fails_alone(make: Maker) -> None:
    executor = make(2)
    future = executor.submit(nested_tasks.write_nonsense)
    with pytest.raises(TaskCrashedError, match="wrote to the worker's side channel"):
        future.result(WAIT)
    assert executor.submit(nested_tasks.fib, executor, 4).result(WAIT) == 3


def test_a_worker_that_is_killed_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks run again elsewhere, and submit anew what they had submitted."""
    with Cluster(workers=2, slots=2, environ={"ACHILLES_BROKER_GRACE": "0.2"}) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        with DistributedExecutor(address=cluster.address) as executor:
            future = executor.submit(nested_tasks.fib, executor, 10)
            wait_until(lambda: executor.status()["done"] > 30)
            cluster.workers[0].send_signal(signal.SIGKILL)
            assert future.result(WAIT) == 55
            wait_until(lambda: executor.status()["workers"] == 1)
            assert executor.submit(nested_tasks.fib, executor, 8).result(WAIT) == 21


@of_modes(*OURS)
def test_many_threads_and_tasks(make: Maker) -> None:
    """Short tasks, parents and children, from several threads at once."""
    executor = make(2)
    found: list[Any] = []

    def use() -> None:
        parents = [executor.submit(nested_tasks.sum_of_map, executor, n) for n in range(10)]
        shorts = [executor.submit(tasks.add, n) for n in range(200)]
        found.append(sum(one.result(WAIT) for one in parents + shorts))

    start = time.monotonic()
    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert found == [sum(n * (n + 1) // 2 for n in range(10)) + 20100] * 3
    assert time.monotonic() - start < WAIT


def _through(executor: Any) -> int:
    pid: int = executor.submit(os.getpid).result(30)
    return pid


def test_another_embedded_executor_is_not_taken_for_the_tasks_own() -> None:
    with DistributedExecutor(1) as one, DistributedExecutor(1) as other:
        assert one.submit(_through, one).result(30)
        with pytest.raises(RuntimeError, match="runners are children of another process"):
            one.submit(_through, other).result(30)
