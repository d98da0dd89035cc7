"""`python -m tests.reliability.crashes`: one task of many thousand ends its process,
in every way there is (R7).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import sys
import threading
import time

from achilles.task_errors import TaskCrashedError
from tests.chaos import work
from tests.reliability import measure

SIGNALS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTERM", "SIGHUP")
ATTEMPTS_MAX = 3


class ExitsWhenPickled:
    def __reduce__(self) -> str:
        os._exit(5)


class ExitsWhenLoaded:
    """Here it is harmless; on the worker its argument ends the process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __reduce__(self) -> tuple[object, ...]:
        return (_exit_elsewhere, (self.pid,))


def _exit_elsewhere(pid: int) -> None:
    if os.getpid() != pid:
        os._exit(6)


def _overflow_stack() -> None:
    sys.setrecursionlimit(1 << 30)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    deep: list[object] = []
    for _ in range(1_000_000):
        deep = [deep]
    repr(deep)
    ctypes.string_at(0)  # where the interpreter bears it


def _exit_in_thread() -> None:
    threading.Thread(target=os._exit, args=(7,)).start()
    time.sleep(60)


def die(number: int, log: str, how: str, _: object = None) -> object:
    """End the process that runs it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work.note(log, number, "+")
    if how in SIGNALS:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(60)
    elif how == "exit":
        os._exit(0)
    elif how == "exit code":
        os._exit(3)
    elif how == "abort":
        os.abort()
    elif how == "null pointer":
        ctypes.string_at(0)
    elif how == "thread":
        _exit_in_thread()
    elif how == "stack":
        _overflow_stack()
    elif how == "pickled":
        return ExitsWhenPickled()
    return None


HOWS = (
    *SIGNALS,
    *("exit", "exit code", "abort", "null pointer", "thread", "stack", "pickled", "loaded"),
)


def main() -> int:
    """Run each; 1 if a neighbour suffered."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.crashes")
    parser.add_argument("--tasks", type=int, default=10_000, help="for each way to die")
    options = parser.parse_args()
    failures: list[str] = []
    again_max = attempts_max = 0
    began = 1
    with measure.rig(2, 2) as rig, measure.executor(rig) as executor:
        log = str(rig.log)
        for how in HOWS:
            numbers = range(began, began + options.tasks)
            began += options.tasks
            bad = numbers[len(numbers) // 3]
            argument = ExitsWhenLoaded(os.getpid()) if how == "loaded" else None
            futures = {
                n: executor.submit(die, n, log, how, argument)
                if n == bad
                else executor.submit(work.tiny, n, log)
                for n in numbers
            }
            error = futures.pop(bad).exception(measure.WAIT_SECONDS)
            if not isinstance(error, TaskCrashedError):
                failures.append(f"{how}: the task gave {error!r}")
            wrong = sum(f.result(measure.WAIT_SECONDS) != work.mix(n) for n, f in futures.items())
            if wrong:
                failures.append(f"{how}: {wrong} others are wrong")
            runs = measure.runs_of(rig)
            begins = {n: sum(run.is_begin for run in runs.get(n, [])) for n in numbers}
            attempts_max = max(attempts_max, begins.pop(bad))
            again_max = max(again_max, max(begins.values()) - 1)
    if attempts_max > ATTEMPTS_MAX or again_max > 1:
        failures.append(
            f"{attempts_max} attempts of a bad task, {again_max} repetitions of a good one"
        )
    return measure.finish(
        f"{len(HOWS)} ways to die in {options.tasks} tasks each: {attempts_max} attempts at most, innocent ones run again "
        f"{again_max} times at most, {len(failures)} broken",
        failures,
    )


if __name__ == "__main__":
    sys.exit(main())
