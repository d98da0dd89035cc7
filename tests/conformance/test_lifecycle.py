"""How executors are made, shut down, and what initializers do, with every kind of executor."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import multiprocessing
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests import tasks
from tests.descriptors import open_descriptors, wait_until_closed
from tests.modes import ALL, EMBEDDED, OURS, STANDARD, Maker, of_modes, wait_until


@pytest.mark.bad_input(42)
@of_modes(*ALL)
@pytest.mark.parametrize("count", [0, -1])
def test_max_workers_that_cannot_be(make: Maker, count: int) -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        make(count)


@pytest.mark.bad_input(42)
@of_modes(*STANDARD)
def test_max_workers_of_a_wrong_type(make: Maker) -> None:
    with pytest.raises(TypeError):
        make("2")  # type: ignore[arg-type]


@of_modes(*OURS)
def test_executors_that_were_never_used_hold_no_descriptors(make: Maker) -> None:
    assert make(1).submit(tasks.add, 1).result(20) == 2  # what is made once for all
    before = open_descriptors()
    for _ in range(20):
        make(1).shutdown()
    wait_until_closed(before, more=2)


@of_modes(*ALL)
def test_max_workers_may_be_any_integer(make: Maker) -> None:
    numpy = pytest.importorskip("numpy")
    executor = make(numpy.int64(2))
    assert executor._max_workers == 2
    assert list(executor.map(tasks.add, range(3), chunksize=numpy.int64(2))) == [1, 2, 3]


@of_modes(*ALL)
def test_default_max_workers(make: Maker) -> None:
    executor = make(None)
    assert isinstance(executor._max_workers, int)
    assert executor._max_workers >= 1
    assert executor.submit(tasks.add, 1).result() == 2


@of_modes(*ALL)
def test_initializer_that_is_none(make: Maker) -> None:
    with pytest.raises(TypeError, match="initializer must be a callable"):
        make(1, initializer=5)


@of_modes(*STANDARD)
@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (-3, ValueError), ("3", TypeError), (1.5, TypeError)]
)
def test_max_tasks_per_child_that_cannot_be(make: Maker, value: Any, kind: type[Exception]) -> None:
    if make.mode not in OURS:
        if sys.version_info < (3, 11):
            pytest.skip("max_tasks_per_child came with Python 3.11")
    text = "must be an integer" if kind is TypeError else "must be >= 1"
    with pytest.raises(kind, match=f"max_tasks_per_child {text}"):
        make(1, max_tasks_per_child=value)


@of_modes(*OURS)
def test_mp_context_is_accepted(make: Maker) -> None:
    executor = make(1, mp_context=multiprocessing.get_context("spawn"))
    assert executor.submit(tasks.add, 1).result() == 2


@of_modes(*ALL)
def test_initializer(make: Maker) -> None:
    executor = make(2, initializer=tasks.set_state, initargs=("set",))
    assert list(executor.map(tasks.get_state, range(6))) == ["set"] * 6
    assert [executor.submit(tasks.get_state).result() for _ in range(3)] == ["set"] * 3


@of_modes(*STANDARD)
def test_initializer_runs_once_a_process(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    executor = make(2, initializer=tasks.note_state, initargs=(str(path),))
    pids = set(executor.map(tasks.pause_pid, [0.05] * 12))
    assert list(executor.map(tasks.get_state, range(2))) == ["noted"] * 2
    noted = tasks.notes(path)
    assert len(noted) == len(set(noted))
    assert pids <= {int(line) for line in noted}


@of_modes(*ALL)
def test_failing_initializer(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("concurrent.futures").propagate = True
    executor = make(2, initializer=tasks.fail_to_start)
    futures = []
    try:
        futures = [executor.submit(tasks.add, n) for n in range(5)]
    except concurrent.futures.BrokenExecutor:
        pass  # it may be broken by then
    for future in futures:
        with pytest.raises(concurrent.futures.BrokenExecutor):
            future.result(10)
    wait_until(lambda: executor._broken, "the executor is broken")
    with pytest.raises(concurrent.futures.BrokenExecutor):
        executor.submit(tasks.add, 1)
    with pytest.raises(concurrent.futures.BrokenExecutor):
        executor.map(tasks.add, [1])
    if make.mode != "processes":  # whose children log for themselves
        assert "Exception in initializer:" in caplog.text
        assert "the initializer has failed" in caplog.text
    executor.shutdown()


@of_modes(*OURS)
def test_errors_of_a_broken_executor_are_not_shared(make: Maker) -> None:
    executor = make(1, initializer=tasks.fail_to_start)
    errors = [executor.submit(tasks.add, n) for n in range(2)]
    first, second = (future.exception(10) for future in errors)
    assert first is not second
    assert isinstance(first, concurrent.futures.process.BrokenProcessPool)
    assert "the initializer has failed" in str(first)


@of_modes(*ALL)
def test_shutdown(make: Maker) -> None:
    executor = make()
    futures = [executor.submit(tasks.pause, 0.05, n) for n in range(10)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert [future.result() for future in futures] == list(range(10))
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(tasks.add, 1)


@of_modes(*ALL)
def test_shutdown_of_an_unused_executor(make: Maker) -> None:
    with make() as executor:
        pass
    executor.shutdown()


@of_modes(*ALL)
def test_with(make: Maker) -> None:
    with make() as executor:
        future = executor.submit(tasks.pause, 0.1, "value")
    assert future.done()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(tasks.add, 1)
    with pytest.raises(LookupError), make() as executor:  # noqa: PT012
        future = executor.submit(tasks.pause, 0.1, "value")
        raise LookupError
    assert future.result(0) == "value"


@of_modes(*ALL)
def test_what_runs_of_an_abandoned_map_comes_to_its_end(make: Maker, tmp_path: Path) -> None:
    """Or what an item writes would be half written because another one failed."""
    executor, log, go = make(2), tmp_path / "log", tmp_path / "go"
    results = executor.map(tasks.note_both_ends, [str(log)] * 40, [str(go)] * 40, timeout=0)
    wait_until(lambda: len(tasks.notes(log)) == 2)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    shutdown = threading.Thread(target=executor.shutdown)
    shutdown.start()
    go.touch()
    shutdown.join(20)
    assert not shutdown.is_alive()
    noted = tasks.notes(log)
    assert noted.count("begun") == noted.count("ended") >= 2
    assert len(noted) < 40


@of_modes(*OURS)
def test_what_runs_though_it_was_cancelled_is_ended_on_demand(make: Maker, tmp_path: Path) -> None:
    executor, log = make(2), tmp_path / "log"
    future = executor.submit(tasks.note_both_ends, str(log), str(tmp_path / "never"))
    wait_until(log.exists)
    future.cancel()
    executor.shutdown(wait=False)
    executor.terminate_workers()
    assert tasks.notes(log) == ["begun"]


@of_modes(*ALL)
def test_shutdown_without_waiting(make: Maker, tmp_path: Path) -> None:
    executor, go = make(1), tmp_path / "go"
    futures = [executor.submit(tasks.await_file_at, n, n, str(go)) for n in range(3)]
    executor.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    go.touch()
    assert [future.result(20) for future in futures] == [0, 1, 2]


@of_modes(*ALL)
@pytest.mark.parametrize("wait", [True, False])
def test_shutdown_that_cancels(make: Maker, wait: bool) -> None:
    executor = make(2)
    futures = [executor.submit(tasks.pause, 0.1) for _ in range(30)]
    wait_until(futures[0].running, "the first task runs")
    executor.shutdown(wait=wait, cancel_futures=True)
    # Not `wait`: the standard executors tell nobody who waits for a future that they cancel.
    wait_until(lambda: all(future.done() for future in futures), "all are done")
    cancelled = [future for future in futures if future.cancelled()]
    assert len(cancelled) > 20
    others = [future.result(0) for future in futures if not future.cancelled()]
    assert others
    assert set(others) == {None}


@of_modes(*ALL)
def test_shutdown_that_cancels_a_map(make: Maker) -> None:
    executor = make(2)
    list(executor.map(tasks.pause, [0.1] * 2))
    results = executor.map(tasks.pause, [0.1] * 30, range(30))
    assert next(results) == 0
    executor.shutdown(cancel_futures=True)
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)
    assert list(results) == []


@of_modes(*ALL)
def test_shutdown_does_not_cancel_the_items_that_run(make: Maker) -> None:
    executor = make(2)
    list(executor.map(tasks.pause, [0.1] * 2))
    results = executor.map(tasks.pause, [0.3] * 2, range(2))
    time.sleep(0.1)
    executor.shutdown(cancel_futures=True)
    assert list(results) == [0, 1]


@of_modes(*ALL)
def test_cancel_just_before_shutdown(make: Maker) -> None:
    executor = make(1)
    executor.submit(tasks.add, 1).result()
    executor.submit(tasks.add, 1).cancel()
    executor.shutdown()


@of_modes(*ALL)
def test_collected_without_shutdown(make: Maker) -> None:
    before = set(threading.enumerate())
    executor = make(1)
    make._stack.pop_all()  # which would keep it
    future = executor.submit(tasks.pause, 0.1, "value")
    reference = weakref.ref(executor)
    del executor
    gc.collect()
    assert reference() is None
    assert future.result(10) == "value"
    wait_until(lambda: set(threading.enumerate()) <= before, "its threads have ended")


@of_modes(*ALL)
def test_submitting_while_another_thread_shuts_down(make: Maker) -> None:
    executor = make(2)
    futures: list[concurrent.futures.Future[int]] = []
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            while True:
                futures.append(executor.submit(tasks.add, 1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    executor.shutdown(cancel_futures=True)
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [RuntimeError] * 2
    wait_until(lambda: all(future.done() for future in futures), "all are done")


@of_modes(EMBEDDED)
def test_a_signal_to_the_group_is_for_the_program(make: Maker) -> None:
    """Ctrl-C in a terminal must not kill runners: the program decides."""
    runner = make(1).submit(tasks.pid).result()
    assert os.getpgid(runner) != os.getpgid(0)
