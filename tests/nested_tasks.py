"""Tasks that submit tasks: what runners are given to do in the tests of nested use."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from achilles import DistributedExecutor, as_completed
from tests import tasks

WAIT_SECONDS = 60


def fib(executor: Any, n: int) -> int:
    if n < 2:
        return n
    one, two = executor.submit(fib, executor, n - 1), executor.submit(fib, executor, n - 2)
    return one.result(WAIT_SECONDS) + two.result(WAIT_SECONDS)  # type: ignore[no-any-return]


def chain(executor: Any, depth: int) -> int:
    return 1 + executor.submit(chain, executor, depth - 1).result(WAIT_SECONDS) if depth else 0


def sum_of_map(executor: Any, count: int) -> int:
    return sum(executor.map(tasks.add, range(count), [1] * count, chunksize=3))


def sum_by_its_own(address: str, count: int) -> int:
    """With an executor that the task makes."""
    with DistributedExecutor(4, address=address) as executor:
        return sum_of_map(executor, count)


def pid_by_its_own(address: str) -> int:
    """Of a runner of a cluster that the task's own is not, perhaps,
    with an initializer of its own.
    """
    with DistributedExecutor(
        1, address=address, initializer=tasks.set_state, initargs=(7,)
    ) as executor:
        assert executor.submit(tasks.get_state).result(WAIT_SECONDS) == 7
        return executor.submit(tasks.pid).result(WAIT_SECONDS)


def completed(executor: Any, count: int) -> list[int]:
    """What `as_completed` and the standard `wait` say of tasks of a task."""
    futures = [executor.submit(tasks.pause, 0.01 * (n % 2), n) for n in range(count)]
    done, pending = concurrent.futures.wait(futures[: count // 2], timeout=WAIT_SECONDS)
    assert not pending
    assert len(done) == count // 2
    return sorted(future.result() for future in as_completed(futures, timeout=WAIT_SECONDS))


def call_child(executor: Any, fn: Any, *args: Any) -> Any:
    return executor.submit(fn, *args).result(WAIT_SECONDS)


def swallow(executor: Any, fn: Any, *args: Any) -> str:
    """The name and the text of what the child raises."""
    error = executor.submit(fn, *args).exception(WAIT_SECONDS)
    return f"{type(error).__name__}: {error}"


def child_that_waits(executor: Any, path: str) -> None:
    """Run a child that says where it is, and wait for it."""
    executor.submit(tasks.note_pid_and_pause, path, 600).result()


def die_after_children(executor: Any, path: str) -> int:
    """Kill the own process at the first attempt, when a child has begun; count at the second."""
    if not Path(path).exists():
        executor.submit(tasks.note_pid_and_pause, path, 600)
        deadline = time.monotonic() + WAIT_SECONDS
        while not Path(path).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    return executor.submit(tasks.add, 1).result(WAIT_SECONDS)  # type: ignore[no-any-return]


def leave_behind(executor: Any, path: str, count: int) -> str:
    """Submit, and wait for nothing."""
    for n in range(count):
        executor.submit(tasks.note, path, n)
    return "left"


def cancel_children(executor: Any) -> tuple[int, int]:
    futures = [executor.submit(tasks.pause, 0.05) for _ in range(40)]
    cancelled = sum(future.cancel() for future in futures)
    concurrent.futures.wait(futures, timeout=WAIT_SECONDS)
    return cancelled, sum(future.cancelled() for future in futures)


def use_and_shut_down(executor: Any) -> list[Any]:
    """A handle's shutdown is its own: it waits for what was submitted, and ends nothing else."""
    with executor as same:
        future = same.submit(tasks.pause, 0.05, "value")
    seen = [future.done(), future.result(0)]
    try:
        executor.submit(tasks.add, 1)
    except RuntimeError as error:
        seen.append(str(error))
    return seen


def kill_children(executor: Any) -> str:
    """End the tasks of this task, which goes on."""
    future = executor.submit(tasks.pause, 600)
    deadline = time.monotonic() + WAIT_SECONDS
    while not future.running():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    executor.kill_workers()
    return type(future.exception(WAIT_SECONDS)).__name__


def call_back(executor: Any) -> tuple[int, bool]:
    """A callback submits, in a thread of its own."""
    seen: list[Any] = []
    is_done = threading.Event()

    def submit_more(future: Any) -> None:
        seen.append(executor.submit(tasks.add, future.result()).result(WAIT_SECONDS))
        seen.append(threading.current_thread() is threading.main_thread())
        is_done.set()

    executor.submit(tasks.add, 1).add_done_callback(submit_more)
    assert is_done.wait(WAIT_SECONDS)
    return seen[0], seen[1]


def make_one(n: int) -> list[int]:
    """An executor of the task's own, embedded in its runner."""
    with DistributedExecutor(2) as executor:
        return list(executor.map(tasks.add, range(n)))


def size_and_status(executor: Any) -> tuple[int, int, str]:
    return executor.size, executor.status()["running"], repr(executor)


def options_of(executor: Any) -> Any:
    return executor._options


def state_of_child(executor: Any) -> tuple[Any, Any]:
    """What the initializer has set here and in a child."""
    return tasks.get_state(), executor.submit(tasks.get_state).result(WAIT_SECONDS)


def use_in_fork(executor: Any) -> str:
    """What a child that the task forks is told."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            executor.submit(tasks.add, 1)
        except Exception as error:
            os.write(write, type(error).__name__.encode())
        os._exit(0)
    os.wait()
    with os.fdopen(read, "rb") as pipe:
        os.close(write)
        return pipe.read().decode() + f" {executor.submit(tasks.add, 1).result(WAIT_SECONDS)}"


def count_threads() -> int:
    """Those that serve clients whose tasks have submitted tasks."""
    return sum(thread.name == "achilles-nested" for thread in threading.enumerate())


def write_nonsense() -> None:
    """What a task must not do; its runner does not survive that."""
    from achilles.runtime import context
    from achilles.runtime.side import NESTED

    assert context.side is not None
    context.side.send(NESTED, context.client, b"nonsense")
    time.sleep(WAIT_SECONDS)
