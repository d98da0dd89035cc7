"""What runners are given to do in these tests. Imported by them, so it imports next to nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, NoReturn


def add(x: int, y: int = 0) -> int:
    return x + y


def identity(value: object) -> object:
    return value


def note(path: str, text: str) -> str:
    """Append to a file, so that a test sees what ran, and in which order."""
    with open(path, "a") as file:
        file.write(text)
    return text


def note_sized(path: str, text: str, data: bytes) -> bytes:
    """The same, with a result as large as the argument."""
    note(path, text)
    return data


def wait_at(gate: str) -> str:
    """Block until the test writes to the named pipe; what it wrote."""
    with open(gate) as file:
        return file.read()


def spin() -> NoReturn:
    while True:
        pass


def spin_noted(path: str) -> NoReturn:
    note(path, "started")
    spin()


def exit_hard(code: int) -> NoReturn:
    os._exit(code)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(30)  # until the signal is there


def print_lines(count: int, text: str, gate: str = os.devnull) -> None:
    """Print a line so often, and wait until the gate is open."""
    sys.stdout.write(f"{text}\n" * count)
    sys.stdout.flush()
    wait_at(gate)


def print_lines_later(count: int, text: str, gate: str) -> None:
    """When the gate is open, but the task is done."""
    from threading import Thread

    def work() -> None:
        wait_at(gate)
        print_lines(count, text)

    Thread(target=work, daemon=True).start()


def print_lines_and_exit_hard(count: int, text: str) -> NoReturn:
    print_lines(count, text)
    os._exit(1)


def print_and_exit_hard(text: str) -> NoReturn:
    print(text)
    os._exit(1)


def close_everything() -> str:
    os.closerange(3, 256)
    return "done"


def close_everything_and_spin() -> NoReturn:
    os.closerange(3, 256)
    spin()


def raise_it(error: BaseException) -> NoReturn:
    raise error


def recurse() -> None:
    recurse()


def fork_and_return() -> str:
    return "child" if os.fork() == 0 else "parent"


def leave_a_process(path: str) -> int:
    """Fork a child, by a way that tells Python nothing,
    that keeps all descriptors and does not end.
    """
    import ctypes

    pid: int = ctypes.PyDLL(None).fork()
    if pid == 0:
        while True:
            time.sleep(30)
    return pid


def say(text: str) -> None:
    print(text)


def replace_stdout(file: Any = None) -> None:
    sys.stdout = file


def where() -> tuple[str, list[str]]:
    return os.getcwd(), sys.path


def read_stdin() -> str:
    return sys.stdin.read()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def imported(names: list[str]) -> list[str]:
    return [name for name in names if name in sys.modules]


def double_in_place(array: Any) -> Any:
    array *= 2
    return array


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


class Counter:
    """Callable, with state."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


_calls = 0


def count_calls() -> int:
    global _calls
    _calls += 1
    return _calls


def calls() -> int:
    return _calls


def calls_and_client() -> tuple[int, int]:
    from achilles.runtime import context

    return _calls, context.client


def fail_to_initialize(text: str) -> None:
    count_calls()
    raise ValueError(text)


class Unpicklable:
    """Says so, loudly or by ending what pickles it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or TypeError("cannot be pickled, by design")

    def __reduce__(self) -> NoReturn:
        raise self.error


def make_unpicklable(error: BaseException | None = None) -> Unpicklable:
    return Unpicklable(error)


class Buffer:
    """Something with one large buffer, as an array has, and without NumPy."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        from pickle import PickleBuffer

        return Buffer, (PickleBuffer(self.data),)


def fill(buffer: Buffer, value: int) -> Buffer:
    view = memoryview(buffer.data)
    view[:] = bytes([value]) * len(view)
    return buffer


class Makes:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)
