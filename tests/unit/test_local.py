from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from achilles import DistributedExecutor
from achilles.core import dispatch
from achilles.errors import BrokerLostError
from achilles.local import LocalCluster
from achilles.runtime import loop
from achilles.runtime.loop import PatientThread
from achilles.runtime.serialize import dumps, dumps_call
from tests import tasks
from tests.descriptors import open_descriptors, wait_until_closed
from tests.modes import wait_until


@contextlib.contextmanager
def running(slots: int) -> Iterator[LocalCluster]:
    cluster = LocalCluster(slots)
    cluster.start()
    yield cluster
    cluster.mailbox.finish()
    end(cluster)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with running(2) as cluster:
        yield cluster


@pytest.fixture
def narrow() -> Iterator[LocalCluster]:
    with running(1) as cluster:
        yield cluster


def end(cluster: LocalCluster) -> None:
    assert cluster.thread is not None
    cluster.thread.join(10)
    assert not cluster.thread.is_alive()


def submit(cluster: LocalCluster, fn: Any, *args: Any, number: int = 1) -> Any:
    mailbox, payload = cluster.mailbox, dumps_call(args, {})
    assert isinstance(payload, bytes)
    return mailbox.submit(mailbox.group(number, 0, 0), dumps(fn), payload, fn.__name__)


def test_tasks_go_through_all_three_cores(cluster: LocalCluster) -> None:
    assert [submit(cluster, tasks.add, n).result(10) for n in range(20)] == list(range(1, 21))
    status = cluster.status()
    assert status.done == 20
    assert status.workers[0].slots == 2
    assert status.workers[0].name == "local"


def test_who_waits_awake_for_one_task_hears_of_others(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The thread looks for the result of the only task, and for all else."""
    monkeypatch.setattr(loop, "HOT_SECONDS", 60.0)
    assert submit(cluster, tasks.add, 1).result(10) == 2
    assert cluster._loop._is_hot
    gate = tmp_path / "gate"
    first = submit(cluster, tasks.await_file, str(gate), number=2)
    wait_until(first.running)
    assert submit(cluster, tasks.add, 2).result(10) == 3
    assert cluster.status().running == 1
    gate.touch()
    assert first.result(10) is None
    assert cluster._loop._is_hot


def test_runners_start_on_demand(cluster: LocalCluster) -> None:
    assert cluster.pids() == {}
    pid = submit(cluster, tasks.pid, number=2).result(10)
    assert list(cluster.pids().values()) == [pid]
    assert pid != os.getpid()


def test_what_was_not_done_is_let_go() -> None:
    cluster = LocalCluster(1)
    cluster.start()
    waiting = [submit(cluster, tasks.pause, 60.0, "value") for _ in range(10)]
    wait_until(waiting[0].running)
    seen = weakref.ref(cluster._scheduler._clients["client"])
    cluster.kill(lambda: BrokerLostError("killed"))
    cluster.mailbox.finish()
    end(cluster)
    assert all(future.done() for future in waiting)
    del cluster
    gc.collect()
    assert seen() is None


def test_it_ends_with_its_last_task() -> None:
    cluster = LocalCluster(1)
    cluster.start()
    future = submit(cluster, tasks.pause, 0.1, "value")
    cluster.mailbox.finish()
    end(cluster)
    assert future.result(0) == "value"
    assert cluster.pids() == {}
    assert cluster.status().done == 1


def test_it_may_end_before_it_began() -> None:
    cluster = LocalCluster(1)
    cluster.mailbox.finish()
    cluster.start()
    end(cluster)


def test_one_that_was_never_started_holds_nothing_when_discarded() -> None:
    before = open_descriptors()
    cluster = LocalCluster(1)
    assert open_descriptors() - before
    cluster.mailbox.finish()
    cluster.discard()
    wait_until_closed(before)


def test_cancel_lets_run_what_can_start_at_once(cluster: LocalCluster) -> None:
    futures = [submit(cluster, tasks.pause, 0.2) for _ in range(20)]
    cluster.cancel_pending()
    wait_until(lambda: all(future.done() for future in futures))
    assert 2 <= sum(not future.cancelled() for future in futures) <= 5


def test_cancel_takes_back_what_waits_behind_a_task_that_runs(
    narrow: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where so many were short before that all the rest travels in one chunk."""
    monkeypatch.setattr(dispatch, "ANNOUNCE_CHUNK_SECONDS", 60.0)  # not before the cancel
    notes, gate = tmp_path / "notes", tmp_path / "gate"

    def run(line: str, go: Path | str = os.devnull) -> Any:
        return submit(narrow, tasks.note_and_await, str(notes), line, str(go))

    for future in [run("short") for _ in range(300)]:
        future.result(30)
    futures = [run("long", gate), *[run("short") for _ in range(200)]]
    wait_until(lambda: "long" in notes.read_text())
    narrow.cancel_pending()
    try:
        wait_until(lambda: all(future.done() for future in futures[1:]))
        assert all(future.cancelled() for future in futures[1:])
    finally:
        gate.touch()
    futures[0].result(30)
    run("after").result(30)
    assert [line.split()[0] for line in notes.read_text().splitlines()][300:] == ["long", "after"]


def test_kill_ends_the_runners(cluster: LocalCluster) -> None:
    future = submit(cluster, tasks.pause, 30)
    wait_until(future.running)
    cluster.kill(lambda: BrokerLostError("killed"))
    assert isinstance(future.exception(10), BrokerLostError)
    wait_until(lambda: not cluster.pids())
    assert submit(cluster, tasks.add, 1, number=3).result(10) == 2


def test_a_bug_of_ours_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = LocalCluster(1)

    def broken(now: float) -> None:
        raise ArithmeticError("a bug")

    monkeypatch.setattr(cluster, "_pump", broken)
    future = submit(cluster, tasks.add, 1)
    cluster.start()
    with pytest.raises(RuntimeError, match="internal error of achilles: ArithmeticError"):
        future.result(10)
    end(cluster)
    assert "ended unexpectedly" in caplog.text
    assert "embedded" in repr(cluster)


def test_tasks_of_many_threads(cluster: LocalCluster) -> None:
    found: list[int] = []

    def use(start: int) -> None:
        futures = [submit(cluster, tasks.add, start, n) for n in range(50)]
        found.append(sum(future.result(10) for future in futures))

    threads = [threading.Thread(target=use, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [50 * start + 1225 for start in range(4)]


def test_ctrl_c_while_its_thread_starts_leaves_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program goes on, as an interactive one does."""
    start = PatientThread.start

    def interrupted(thread: PatientThread) -> None:
        monkeypatch.undo()
        start(thread)
        raise KeyboardInterrupt

    with DistributedExecutor(1) as executor:
        monkeypatch.setattr(PatientThread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(pow, 2, 3)
        assert executor.submit(pow, 2, 5).result(20) == 32
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("achilles-io") == 1
    assert "achilles-io" not in [thread.name for thread in threading.enumerate()]
