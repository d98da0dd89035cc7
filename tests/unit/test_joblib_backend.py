from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import psutil
import pytest
from joblib import Parallel, delayed

import achilles
from achilles import joblib_backend
from achilles.joblib_backend import AchillesBackend, close_idle
from achilles.net.keys import join_path
from tests import tasks
from tests.brokers import RunningBroker, raw_peer
from tests.modes import wait_until

LONG_SECONDS = 100.0


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    achilles.register_joblib()
    yield
    close_idle()
    joblib.parallel.BACKENDS.pop("achilles")


def pids(**options: Any) -> set[int]:
    with joblib.parallel_config(backend="achilles", **options):
        return set(Parallel(2, batch_size=1)(delayed(tasks.pause_pid)(0.1) for _ in range(4)))


# --- How many jobs --------------------------------------------------------------------------------


def test_numbers_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AchillesBackend()
    cores = joblib.cpu_count()
    assert backend.effective_n_jobs(3) == 3
    assert backend.effective_n_jobs(None) == backend.effective_n_jobs(-1) == cores
    assert backend.effective_n_jobs(-cores) == backend.effective_n_jobs(-cores - 5) == 1
    with pytest.raises(ValueError, match="n_jobs == 0"):
        backend.effective_n_jobs(0)
    monkeypatch.setenv("ACHILLES_CLIENT_MAX_WORKERS", "7")
    assert backend.effective_n_jobs(-1) == 7


def test_the_join_file_that_is_named_is_for_the_backend_too(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every executor: its cluster's slots are what there is."""
    with RunningBroker(achilles_home) as broker, raw_peer(broker, "worker") as worker:
        worker.hello("worker", slots=37)
        monkeypatch.setenv("ACHILLES_JOIN", str(join_path(achilles_home, "client")))
        backend = AchillesBackend()
        assert backend.effective_n_jobs(-1) == 37
        assert not backend.supports_inner_max_num_threads
        close_idle()
        backend = AchillesBackend(address="embedded")
        assert backend.effective_n_jobs(-1) == joblib.cpu_count()
        assert backend.supports_inner_max_num_threads
        monkeypatch.setenv("ACHILLES_ADDRESS", "embedded")
        assert AchillesBackend().effective_n_jobs(-1) == joblib.cpu_count()


def test_who_names_the_backend_need_not_name_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACHILLES_CLIENT_MAX_WORKERS", "2")
    with joblib.parallel_config(backend="achilles"):
        results = Parallel(batch_size=1)(delayed(tasks.pause_pid)(0.1) for _ in range(4))
    assert len(set(results)) == 2
    assert os.getpid() not in results


def test_one_job_runs_here() -> None:
    assert Parallel(n_jobs=1, backend="achilles")([delayed(os.getpid)()]) == [os.getpid()]


# --- Runners ----------------------------------------------------------------------------------------


def test_the_next_call_finds_warm_runners() -> None:
    first = pids()
    assert len(first) == 2
    assert pids() == first


def test_a_call_of_another_kind_ends_idle_runners() -> None:
    first = pids()
    other = pids(initializer=os.getpid)
    assert not first & other
    wait_until(lambda: not any(map(psutil.pid_exists, first)), "the first runners end")


def test_idle_runners_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib_backend, "IDLE_SECONDS", 0.01)
    used = pids()
    wait_until(lambda: not any(map(psutil.pid_exists, used)), "idle runners end")
    assert pids()


def test_calls_at_the_same_time() -> None:
    """One object of the backend, and a first call that is not over."""
    with joblib.parallel_config(backend="achilles", n_jobs=2):
        first = Parallel(return_as="generator")(delayed(tasks.add)(n) for n in range(20))
        second = Parallel(return_as="generator")(delayed(tasks.add)(n) for n in range(20, 30))
        assert list(second) == list(range(21, 31))
        assert list(first) == list(range(1, 21))


def test_an_executor_of_ones_own_is_used_and_left_alone() -> None:
    with achilles.DistributedExecutor(2) as executor:
        own = set(executor.map(tasks.pause_pid, [0.1] * 4))
        for _ in range(2):
            assert AchillesBackend(executor=executor).effective_n_jobs(-1) == 2
            assert pids(executor=executor) == own
        with pytest.raises(ValueError, match="as wanted"):
            Parallel(n_jobs=2, backend="achilles", executor=executor)(
                [delayed(tasks.fail)(), delayed(tasks.pause)(0.2)]
            )
        assert executor.submit(tasks.add, 1).result() == 2


def test_initializer_and_threads_of_numeric_libraries(tmp_path: Path) -> None:
    with joblib.parallel_config(backend="achilles", n_jobs=2, inner_max_num_threads=3):
        call = Parallel(initializer=os.chdir, initargs=(tmp_path,))
        found = call([delayed(os.getenv)("OMP_NUM_THREADS"), delayed(os.getcwd)()])
    assert found == ["3", str(tmp_path)]


def test_options_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="takes no 'adress'"):
        joblib.parallel_config(backend="achilles", adress="auto")
    with pytest.raises(AssertionError, match="inner_max_num_threads"):
        joblib.parallel_config(backend="achilles", address="auto", inner_max_num_threads=1)


# --- What goes wrong ------------------------------------------------------------------------------


def test_an_aborted_call_leaves_nothing_running() -> None:
    call = Parallel(n_jobs=2, backend="achilles", batch_size=1, timeout=0.5)
    before = set(psutil.Process().children())
    with pytest.raises(multiprocessing.TimeoutError):
        call(delayed(tasks.pause)(LONG_SECONDS) for _ in range(4))
    wait_until(lambda: set(psutil.Process().children()) <= before, "the runners end")
    call.timeout = None
    after = Parallel(n_jobs=2, backend="achilles", batch_size=1, timeout=LONG_SECONDS / 2)
    assert after(delayed(tasks.add)(n) for n in range(3)) == [1, 2, 3]


def test_after_an_error_a_managed_call_goes_on() -> None:
    with Parallel(n_jobs=2, backend="achilles", batch_size=1) as call:
        with pytest.raises(ValueError, match="as wanted"):
            call([delayed(tasks.fail)(), delayed(tasks.pause)(LONG_SECONDS)])
        assert call(delayed(tasks.add)(n) for n in range(3)) == [1, 2, 3]


def test_a_generator_that_is_dropped() -> None:
    results = Parallel(n_jobs=2, backend="achilles", batch_size=1, return_as="generator")(
        delayed(tasks.pause)(LONG_SECONDS * (n > 0), n) for n in range(100)
    )
    assert next(results) == 0
    with pytest.warns(UserWarning, match="have been cancelled"):
        del results


def test_a_program_that_leaves_a_generator_behind_ends() -> None:
    program = """
import achilles, joblib, time
achilles.register_joblib()
call = joblib.Parallel(n_jobs=2, backend="achilles", batch_size=1, return_as="generator")
results = call(joblib.delayed(time.sleep)(0.1) for _ in range(10_000))
next(results)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert "Traceback" not in done.stderr


def test_an_executor_that_takes_no_more_is_the_calls_error() -> None:
    executor = achilles.DistributedExecutor(2)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        Parallel(n_jobs=2, backend="achilles", executor=executor)([delayed(tasks.add)(1)])


# --- Nested calls ---------------------------------------------------------------------------------


def nested(n_jobs: int | None) -> tuple[int, set[int], int]:
    """The process of the task, those of a call inside it that names the backend,
    and how many jobs that would have.
    """
    with joblib.parallel_config(backend="achilles", n_jobs=n_jobs):
        jobs = joblib.effective_n_jobs(None)
        return os.getpid(), set(Parallel()(delayed(os.getpid)() for _ in range(4))), jobs


@pytest.mark.parametrize(("n_jobs", "expected"), [(None, 1), (2, 2)])
def test_inside_a_task_calls_stay_in_its_process(n_jobs: int | None, expected: int) -> None:
    results = Parallel(n_jobs=2, backend="achilles")(delayed(nested)(n_jobs) for _ in range(2))
    for own, inner, jobs in results:
        assert own != os.getpid()
        assert inner == {own}
        assert jobs == expected


def in_fork() -> None:
    if (pid := os.fork()) == 0:
        os._exit(len(joblib_backend._idle))
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_no_idle_executors() -> None:
    pids()
    in_fork()
    assert len(joblib_backend._idle) == 1
