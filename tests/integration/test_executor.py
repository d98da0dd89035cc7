"""What `DistributedExecutor` promises beyond the standard's contract,
with real processes in both modes.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import itertools
import os
import socket
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

from achilles import DistributedExecutor, as_completed
from achilles.errors import (
    ArgumentPickleError,
    BrokerUnreachableError,
    ExecutorForkedError,
    RemoteError,
    ResultPickleError,
    ResultUnpickleError,
)
from tests import tasks
from tests.modes import CLUSTER, EMBEDDED, OURS, Maker, of_modes, wait_until

MIB = 1 << 20


# --- Values and errors ----------------------------------------------------------------------------


@of_modes(*OURS)
def test_ten_thousand_tasks_of_mixed_functions(make: Maker) -> None:
    executor = make(2)
    offset = 3
    calls: list[Any] = [
        tasks.add,
        lambda n: n + offset,
        functools.partial(tasks.add, 2),
        tasks.Adder(1),
        str,
    ]
    failed = executor.status()["failed"]  # of other tests on the same cluster
    futures = [executor.submit(calls[n % len(calls)], n) for n in range(10_000)]
    for n, future in enumerate(futures):
        expected = [n + 1, n + 3, n + 2, n + 1, str(n)][n % len(calls)]
        assert future.result(30) == expected
    assert executor.status()["failed"] == failed


@of_modes(*OURS)
def test_long_maps(make: Maker) -> None:
    executor = make(2)
    count = 20_000
    assert sum(executor.map(tasks.echo, range(count))) == sum(range(count))
    assert sum(executor.map(tasks.echo, range(count), chunksize=500)) == sum(range(count))
    endless = executor.map(tasks.echo, itertools.count(), buffersize=1000)
    assert sum(itertools.islice(endless, count)) == sum(range(count))
    endless.close()


@of_modes(*OURS)
def test_large_arguments_and_results(make: Maker) -> None:
    executor = make(2)
    data = os.urandom(8 * MIB)
    assert executor.submit(tasks.repeat, data).result(30) == data[::-1]
    assert [len(value) for value in executor.map(tasks.zeros, [8 * MIB] * 4)] == [8 * MIB] * 4
    assert list(executor.map(len, [data] * 4)) == [8 * MIB] * 4


@of_modes(*OURS)
def test_large_arrays(make: Maker) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(MIB, dtype="f8")
    result = make(1).submit(tasks.echo, array).result(30)
    assert (result == array).all()
    result[0] = 5  # it is ours alone
    assert array[0] == 0


@pytest.mark.bad_input(11, 12)
@of_modes(*OURS)
def test_exceptions_that_pickle_badly(make: Maker) -> None:
    executor = make(1)
    error = executor.submit(tasks.raise_custom).exception()
    assert "7: seven" in str(error)
    assert "raise Custom" in str(error.__cause__)
    error = executor.submit(tasks.raise_keyword_only).exception()
    assert "7" in str(error)
    error = executor.submit(tasks.raise_holding).exception()
    assert isinstance(error, RemoteError)
    assert "Holding: holds a lambda" in str(error)
    assert "raise Holding" in str(error.__cause__)
    assert executor.submit(tasks.add, 1).result() == 2


@pytest.mark.bad_input(1, 8, 10)
@of_modes(*OURS)
def test_pickling_errors_name_what_and_where(make: Maker) -> None:
    executor = make(1)
    lock = threading.Lock()
    with pytest.raises(ArgumentPickleError, match=r"argument 2 .*'b'.* of add\(\).*lock"):
        executor.submit(tasks.add, 1, lock).result()
    with pytest.raises(ArgumentPickleError, match=r"argument 'b'.* of add\(\).*lock"):
        executor.submit(tasks.add, 1, b=lock).result()
    with pytest.raises(ArgumentPickleError, match="cannot be pickled"):
        executor.submit(lambda: lock).result()
    with pytest.raises(ResultPickleError, match=r"return_unpicklable\(\).*<Unpicklable>"):
        executor.submit(tasks.return_unpicklable).result()
    with pytest.raises(ResultUnpickleError, match="will not be loaded") as caught:
        executor.submit(tasks.return_bad_to_load).result()
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="will not be loaded"):
        executor.submit(tasks.echo, tasks.BadToLoad()).result()
    assert executor.submit(tasks.add, 1).result() == 2


@of_modes(*OURS)
def test_map_of_what_cannot_be_pickled(make: Maker) -> None:
    executor = make(1)
    lock = threading.Lock()
    results = executor.map(lambda n: (n, lock), range(3))
    with pytest.raises(ArgumentPickleError):
        next(results)
    assert list(results) == []
    assert list(executor.map(tasks.add, [1])) == [2]


@pytest.mark.bad_input(33)
@of_modes(*OURS)
def test_coroutine_functions_are_refused(make: Maker) -> None:
    async def coroutine() -> None: ...

    executor = make(1)
    with pytest.raises(TypeError, match="coroutine function"):
        executor.submit(coroutine).result()
    with pytest.raises(TypeError, match="coroutine function"):
        list(executor.map(coroutine, [1]))


# --- Threads, callbacks, generators ---------------------------------------------------------------


@of_modes(*OURS)
def test_executors_in_threads(make: Maker) -> None:
    """An executor in each thread, used while others start and end."""

    def use(number: int) -> int:
        with make(1) as executor:
            return sum(executor.map(tasks.add, range(number, number + 50)))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(use, range(4))) == [sum(range(n + 1, n + 51)) for n in range(4)]


@of_modes(*OURS)
def test_as_completed_takes_a_generator(make: Maker) -> None:
    executor = make(2)
    futures = (executor.submit(tasks.add, n) for n in range(20))
    assert sorted(future.result() for future in as_completed(futures)) == list(range(1, 21))
    with pytest.raises(concurrent.futures.TimeoutError):
        list(executor.as_completed([executor.submit(tasks.pause, 0.3)], timeout=0.01))


@of_modes(*OURS)
def test_dropped_futures_do_not_stop_their_tasks(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    with make(1) as executor:
        for n in range(5):
            executor.submit(tasks.note, str(path), n)
        gc.collect()
    assert tasks.notes(path) == list("01234")


@of_modes(*OURS)
def test_map_iterator_keeps_its_executor(make: Maker) -> None:
    results = make(1).map(tasks.pause, [0.02] * 10, range(10), buffersize=2)
    make._stack.pop_all()
    gc.collect()
    assert list(results) == list(range(10))


@of_modes(*OURS)
def test_short_tasks_do_not_wait_behind_a_long_one(make: Maker, tmp_path: Path) -> None:
    """DESIGN: no queued task waits behind a long-running one while a slot idles,
    for more than 50 ms.
    """
    executor = make(2)
    list(executor.map(tasks.echo, range(200)))  # an estimate that says "short", and two processes
    list(executor.map(tasks.pause, [0.05] * 2))
    go = tmp_path / "go"
    results = executor.map(tasks.await_file_at, range(100), [5] * 100, [str(go)] * 100)
    assert [next(results) for _ in range(5)] == list(range(5))
    others = [executor.submit(tasks.await_file_at, n, 5, str(go)) for n in range(100) if n != 5]
    assert [other.result(20) for other in others] == [n for n in range(100) if n != 5]
    go.touch()
    assert list(results) == list(range(5, 100))


# --- Options and state ----------------------------------------------------------------------------


@of_modes(EMBEDDED)
def test_max_tasks_per_child(make: Maker) -> None:
    executor = make(1, max_tasks_per_child=3)
    pids = [executor.submit(tasks.pid).result() for _ in range(7)]
    assert [len(set(pids[at : at + 3])) for at in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3
    wait_until(lambda: not any(map(psutil.pid_exists, pids[:6])), "the replaced ones have ended")
    counts = [list(executor.map(tasks.pid, range(20))).count(pid) for pid in set(pids)]
    assert max(counts) <= 3


@of_modes(EMBEDDED)
def test_max_tasks_per_child_with_an_initializer(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(2, max_tasks_per_child=2, initializer=tasks.note_state, initargs=(str(path),))
    assert list(executor.map(tasks.get_state, range(9))) == ["noted"] * 9
    assert len(set(tasks.notes(path))) >= 5


@of_modes(*OURS)
def test_max_workers_bounds_what_runs_at_once(make: Maker) -> None:
    executor = make(1)
    assert len(set(executor.map(tasks.pause_pid, [0.02] * 6))) == 1 or make.mode == CLUSTER
    start = time.monotonic()
    list(executor.map(tasks.pause, [0.1] * 4))
    assert time.monotonic() - start >= 0.4
    assert executor.size == executor._max_workers == 1


@of_modes(*OURS)
def test_status_and_repr(make: Maker) -> None:
    executor = make(2)
    list(executor.map(tasks.add, range(10)))
    status = executor.status()
    assert status["done"] >= 10
    assert status["workers"] >= 1
    assert "0 tasks" in repr(executor)
    executor.shutdown()
    assert "shut down" in repr(executor)


@of_modes(*OURS)
@pytest.mark.parametrize("method", ["terminate_workers", "kill_workers"])
def test_ending_the_workers(make: Maker, method: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(1)
    running = executor.submit(tasks.note_and_pause, str(path), "ran", 60)
    waiting = [executor.submit(tasks.pause, 1.0) for _ in range(5)]
    results = executor.map(tasks.pause, [1.0] * 5)
    wait_until(lambda: tasks.notes(path) and running.running(), "the first task runs")
    getattr(executor, method)()
    with pytest.raises(BrokenProcessPool):
        running.result(5)
    for future in waiting:
        with pytest.raises((BrokenProcessPool, concurrent.futures.CancelledError)):
            future.result(5)
    with pytest.raises((BrokenProcessPool, concurrent.futures.CancelledError)):
        list(results)
    with pytest.raises(RuntimeError):
        executor.submit(tasks.add, 1)
    executor.shutdown()
    getattr(executor, method)()


@of_modes(EMBEDDED)
def test_ending_the_workers_ends_their_processes(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(1)
    executor.submit(tasks.note_and_pause, str(path), "pid", 30.0)
    wait_until(lambda: tasks.notes(path), "the task runs")
    pid = int(tasks.notes(path)[0].split()[1])
    executor.kill_workers()
    wait_until(lambda: not psutil.pid_exists(pid), "its process has ended", 5)


# --- The end, and other processes -----------------------------------------------------------------


@pytest.mark.bad_input(65)
@of_modes(*OURS)
def test_a_collected_executor_finishes_what_it_has(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(1)
    make._stack.pop_all()
    for n in range(3):
        executor.submit(tasks.note_and_pause, str(path), n, 0.05)
    reference = weakref.ref(executor)
    del executor
    gc.collect()
    assert reference() is None
    wait_until(lambda: len(tasks.notes(path)) == 3, "all tasks ran")
    wait_until(
        lambda: "achilles-io" not in {t.name for t in threading.enumerate()}, "its thread ended"
    )


@of_modes(*OURS)
def test_threads_end_with_the_executor(make: Maker) -> None:
    executor = make(1)
    executor.submit(tasks.add, 1).add_done_callback(lambda _: None)
    executor.shutdown()
    wait_until(
        lambda: not any(t.name.startswith("achilles") for t in threading.enumerate()),
        "no thread is left",
    )


@of_modes(*OURS)
def test_a_forked_child_gets_a_clear_error(make: Maker) -> None:
    executor = make(1)
    assert executor.submit(tasks.add, 1).result() == 2
    ours, childs = socket.socketpair()
    pid = os.fork()
    if not pid:
        try:
            executor.submit(tasks.add, 1)
        except ExecutorForkedError as error:
            childs.send(str(error).encode())
        except BaseException as error:
            childs.send(repr(error).encode())
        finally:
            executor.shutdown()  # which is the parent's affair
            os._exit(0)
    ours.settimeout(10)
    text = ours.recv(1000).decode()
    os.waitpid(pid, 0)
    ours.close()
    childs.close()
    assert "create one after the fork" in text
    assert executor.submit(tasks.add, 2).result() == 3


def test_no_broker(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnreachableError, match="achilles broker"):
        DistributedExecutor(address="auto")
    with pytest.raises(BrokerUnreachableError):
        DistributedExecutor(address="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    "address", ["http://host:5555", "tcp://host:99999", "tcp://host", "host", "tcp://:0"]
)
def test_address_that_cannot_be(address: str) -> None:
    with pytest.raises(Exception, match=address) as caught:
        DistributedExecutor(address=address)
    assert type(caught.value).__name__ in ("ConfigError", "BrokerUnreachableError")


@of_modes(CLUSTER)
def test_address_by_the_environment(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make.cluster is not None
    monkeypatch.setenv("ACHILLES_ADDRESS", make.cluster.address)
    with DistributedExecutor(1) as executor:
        assert executor.submit(tasks.parent_pid).result() != os.getpid()
    monkeypatch.setenv("ACHILLES_ADDRESS", "auto")
    with DistributedExecutor() as executor:
        assert executor.submit(tasks.add, 1).result() == 2
        assert executor.size == 4
