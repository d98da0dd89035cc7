"""`with_options`: timeouts, retries, at most once, priorities and tags,
on real processes in both modes.
"""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import pytest

from achilles import DistributedExecutor
from achilles.errors import TaskCrashedError, TaskTimeoutError, TerminatedError
from benchmarks.cluster import Cluster
from tests import tasks
from tests.modes import CLUSTER, OURS, Maker, of_modes, wait_until


@of_modes(*OURS)
def test_keywords_are_the_functions(make: Maker) -> None:
    """Options live in the view: a keyword of the same name reaches the function."""
    executor = make(2)
    view = executor.with_options(timeout=30, retries=1)
    assert isinstance(view, DistributedExecutor)
    given = {"timeout": 3, "retries": 4, "priority": 5, "tags": 6}
    assert view.submit(tasks.capture, **given).result(20) == ((), given)
    assert list(view.map(tasks.add, range(5))) == [1, 2, 3, 4, 5]


@pytest.mark.bad_input(20)
@of_modes(*OURS)
def test_a_task_that_takes_too_long_fails_alone(make: Maker) -> None:
    executor = make(2)
    slow = executor.with_options(timeout=0.3).submit(tasks.pause, 60)
    others = [executor.submit(tasks.add, n) for n in range(50)]
    with pytest.raises(TaskTimeoutError, match=r"pause.*ran for more than its 0.3 s on worker"):
        slow.result(20)
    assert isinstance(slow.exception(), concurrent.futures.TimeoutError)
    assert [future.result(20) for future in others] == [n + 1 for n in range(50)]
    assert executor.submit(tasks.add, 1).result(20) == 2


@of_modes(*OURS)
def test_a_timeout_in_a_map_spares_its_neighbours(make: Maker) -> None:
    """Items share chunks; the one that is too slow is ended by itself,
    those around it have their results.
    """
    executor = make(2).with_options(timeout=1.0)
    results = executor.map(tasks.pause_on, range(30), [17] * 30, [60] * 30)
    assert [next(results) for _ in range(17)] == list(range(17))
    with pytest.raises(TaskTimeoutError, match="item 17"):
        next(results)
    values = [executor.submit(tasks.pause_on, n, 17, 60) for n in range(30) if n != 17]
    assert [future.result(20) for future in values] == [n for n in range(30) if n != 17]


@of_modes(*OURS)
def test_retries(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    twice = executor.with_options(retries=2)
    (tmp_path / "a").mkdir()
    assert twice.submit(tasks.fail_until, str(tmp_path / "a"), 3).result(20) == 3
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="attempt 3"):
        twice.submit(tasks.fail_until, str(tmp_path / "b"), 9).result(20)
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="attempt 1"):
        executor.submit(tasks.fail_until, str(tmp_path / "c"), 2).result(20)


@of_modes(*OURS)
def test_retries_of_what_takes_too_long(make: Maker, tmp_path: Path) -> None:
    executor = make(2).with_options(timeout=0.2, retries=1)
    future = executor.submit(tasks.note_and_pause, str(tmp_path / "log"), "x", 60)
    with pytest.raises(TaskTimeoutError, match=r"attempt 1: .*attempt 2: "):
        future.result(20)
    assert len((tmp_path / "log").read_text().splitlines()) == 2


@of_modes(*OURS)
def test_at_most_once_is_not_run_again(make: Maker, tmp_path: Path) -> None:
    executor = make(2).with_options(at_most_once=True)
    future = executor.submit(tasks.note_and_die, str(tmp_path / "log"))
    with pytest.raises(TaskCrashedError, match=r"SIGKILL.*at most once"):
        future.result(20)
    assert len((tmp_path / "log").read_text().splitlines()) == 1


@of_modes(*OURS)
def test_the_highest_priority_goes_first(make: Maker, tmp_path: Path) -> None:
    executor = make(1)
    gate = tmp_path / "gate"
    log = str(tmp_path / "log")
    first = executor.submit(tasks.await_file, str(gate))
    wait_until(first.running)
    futures = []
    for name, priority in [("low", -1), ("normal", 0), ("high", 5), ("higher", 7)]:
        view = executor.with_options(priority=priority)
        futures.append(view.submit(tasks.note, log, name))
    executor.status()  # by now all are queued
    gate.touch()
    concurrent.futures.wait(futures, timeout=20)
    # One may have been sent ahead before the others came.
    names = tasks.notes(tmp_path / "log")
    assert [name for name in names if name != "low"] == ["higher", "high", "normal"]


def test_tags_choose_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(workers=1, slots=1) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        with DistributedExecutor(address=cluster.address) as executor:
            plain = executor.submit(tasks.parent_pid).result(20)
            gpu = executor.with_options(tags=["gpu"])
            waiting = gpu.submit(tasks.parent_pid)
            assert executor.submit(tasks.parent_pid).result(20) == plain  # it holds nobody up
            assert not waiting.done()
            tagged = cluster.add_worker(1, "--tag", "gpu", "--tag", "big")
            assert waiting.result(20) == tagged.pid
            both = executor.with_options(tags=("big", "gpu"))
            assert both.submit(tasks.parent_pid).result(20) == tagged.pid


@of_modes(*OURS)
def test_a_view_and_its_executor_are_one(make: Maker) -> None:
    executor = make(2)
    view = executor.with_options(priority=1)
    view.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(tasks.add, 1)


def test_a_view_keeps_its_executor() -> None:
    view = DistributedExecutor(1).with_options(retries=1)
    assert view.submit(tasks.add, 1).result(20) == 2
    view.shutdown()


@pytest.mark.bad_input(38)
@of_modes(CLUSTER)
def test_terminated_tasks_end_where_they_run(make: Maker, tmp_path: Path) -> None:
    """`kill_workers` ends this client's running tasks, and nothing else."""
    other, executor = make(1), make(1)
    stays = other.submit(tasks.await_file, str(tmp_path / "gate"))
    started = tmp_path / "pid"
    future = executor.submit(tasks.note_pid_and_pause, str(started), 60)
    wait_until(lambda: started.exists() and started.read_text())
    executor.kill_workers()
    with pytest.raises(TerminatedError, match="killed before the task was done"):
        future.result(20)
    runner = int(started.read_text().split()[0])
    wait_until(lambda: not _is_alive(runner), "the runner ends")
    (tmp_path / "gate").touch()
    stays.result(20)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
