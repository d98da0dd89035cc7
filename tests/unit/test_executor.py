from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from achilles import backends as module
from achilles.errors import AchillesError, BrokerLostError, ConfigError
from achilles.executor import DistributedExecutor
from achilles.pool import Pool
from tests import tasks
from tests.unit.silent import Backend


def test_nothing_starts_before_the_first_task(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    (backend,) = backends
    assert backend.starts == 0
    executor.submit(tasks.add, 1)
    executor.submit(tasks.add, 2)
    assert backend.starts == 1
    assert repr(executor) == "<DistributedExecutor silent | 2 tasks>"
    executor.shutdown()
    assert repr(executor) == "<DistributedExecutor silent | shut down>"


@pytest.mark.parametrize("name", ["ACHILLES_ADDRESS", "ACHILLES_JOIN"])
@pytest.mark.parametrize("kind", [DistributedExecutor, Pool])
def test_one_can_be_embedded_whatever_the_settings_say(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch, name: str, kind: Any
) -> None:
    monkeypatch.setenv(name, "tcp://127.0.0.1:9")
    for unset in (None, ""):
        with pytest.raises(AchillesError):
            kind(2, address=unset)
    made = kind(2, address="embedded")
    assert len(backends) == 1
    made.__exit__(None, None, None)
    monkeypatch.setenv("ACHILLES_ADDRESS", "embedded")
    kind(2).__exit__(None, None, None)
    assert len(backends) == 2


def test_what_was_never_used_is_discarded_once(backends: list[Backend]) -> None:
    with DistributedExecutor(2) as executor:
        pass
    executor.shutdown()
    with DistributedExecutor(2) as used:
        used.submit(tasks.add, 1)
    assert [(backend.starts, backend.discards) for backend in backends] == [(0, 1), (1, 0)]


def test_a_task_that_was_taken_before_the_shutdown_still_starts_the_backend(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = DistributedExecutor(2)
    start = executor._start

    def shut_down_and_start() -> None:
        executor.shutdown(wait=False)
        start()

    monkeypatch.setattr(executor, "_start", shut_down_and_start)
    executor.submit(tasks.add, 1)
    (backend,) = backends
    assert (backend.starts, backend.discards) == (1, 0)


def test_a_function_of_a_module_has_a_number(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    for n in range(3):
        executor.submit(tasks.add, n)
    executor.map(tasks.add, [1])
    ids, _ = backends[0].drain()
    assert ids == [1, 2, 3, 4]
    assert {batch.group.fn for batch in backends[0].batches} == {1}


@pytest.mark.bad_input(68)
def test_arguments_are_of_the_moment_of_the_call(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    mutable = [1]
    executor.submit(len, mutable)
    mutable.append(2)
    executor.submit(len, mutable)
    backends[0].drain()
    first, second = backends[0].batches[0].payloads
    assert first != second


@pytest.mark.bad_input(31)
def test_after_shutdown(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    future = executor.submit(tasks.add, 1)
    executor.shutdown(wait=False, cancel_futures=True)
    assert future.cancelled()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(tasks.add, 1)
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.map(tasks.add, [1])
        executor.shutdown(wait=False)


@pytest.mark.bad_input(63)
def test_an_interrupt_cancels_what_an_error_waits_for(backends: list[Backend]) -> None:
    for error in (KeyboardInterrupt, LookupError):
        executor = DistributedExecutor(2)
        future = executor.submit(tasks.add, 1)
        with pytest.raises(error), executor:
            raise error
        assert future.cancelled() == (error is KeyboardInterrupt)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(tasks.add, 1)


@pytest.mark.bad_input(31)
def test_at_the_interpreters_end(backends: list[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    executor = DistributedExecutor(2)
    monkeypatch.setattr(module, "is_exiting", True)
    with pytest.raises(
        RuntimeError, match="cannot schedule new futures after interpreter shutdown"
    ):
        executor.submit(tasks.add, 1)


@pytest.mark.bad_input(31)
def test_a_broken_executor(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    assert "it went away" not in str(executor._broken)
    backends[0].mailbox.broken = BrokerLostError("it went away")
    assert executor._broken == "it went away"
    for _ in range(2):
        with pytest.raises(concurrent.futures.BrokenExecutor, match="it went away") as caught:
            executor.submit(tasks.add, 1)
        assert caught.value is not backends[0].mailbox.broken


def test_sizes(backends: list[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    assert DistributedExecutor(3).size == 3
    assert DistributedExecutor().size >= 1
    monkeypatch.setenv("ACHILLES_CLIENT_MAX_WORKERS", "5")
    assert DistributedExecutor()._max_workers == 5
    assert DistributedExecutor(2).size == 2


def test_settings_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        DistributedExecutor(config=tmp_path / "nowhere.toml")
    monkeypatch.setenv("ACHILLES_CLIENT_MAX_WORKERS", "many")
    with pytest.raises(ConfigError, match="ACHILLES_CLIENT_MAX_WORKERS"):
        DistributedExecutor()


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": 1.5}, TypeError, "max_workers must be an integer"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
        ({"max_tasks_per_child": "1"}, TypeError, "max_tasks_per_child must be an integer"),
        ({"initializer": 5}, TypeError, "initializer must be a callable"),
        ({"initializer": int, "initargs": 5}, TypeError, "int"),
        (
            {"initializer": int, "initargs": (multiprocessing.Lock(),)},
            *(RuntimeError, "through inheritance.*multiprocessing.Manager"),
        ),
    ],
)
def test_arguments_that_cannot_be(
    options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        DistributedExecutor(**options)


def test_none_is_made_where_the_program_is_only_imported(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match=r"bootstrapping phase.*__name__ == \"__main__\""):
        DistributedExecutor(1)
    assert backends == []
    monkeypatch.delattr(process, "_inheriting")
    DistributedExecutor(1)


def test_what_is_pickled_badly_does_not_start_anything(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    future = executor.submit(tasks.echo, tasks.Unpicklable())
    assert isinstance(future.exception(0), Exception)
    results = executor.map(tasks.echo, [tasks.Unpicklable()])
    with pytest.raises(Exception, match="argument 1"):
        next(results)
    assert backends[0].starts == 0
    assert backends[0].drain() == ([], [])
    executor.shutdown()


def test_it_is_no_pool_and_no_callable() -> None:
    """What other libraries look for; see research on clients:
    an int or a dict named so would mislead them.
    """
    assert not hasattr(DistributedExecutor, "_processes")
    assert not callable(DistributedExecutor(1))
    assert issubclass(DistributedExecutor, concurrent.futures.Executor)


def test_a_forked_child_does_not_wait_for_who_connected_in_its_parent() -> None:
    """That thread is not there, and would hold the lock for ever."""
    with module.connecting:
        pid = os.fork()
        if not pid:
            os._exit(not module.connecting.acquire(blocking=False))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
