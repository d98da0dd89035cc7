"""Task functions for tests: importable by runners, which find them by name,
and quick to import there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NoReturn

from achilles import current_attempt


def add(a: int, b: int = 1) -> int:
    return a + b


def echo(value: Any) -> Any:
    return value


def put(mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    mapping[key] = value


def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def second(_: object, value: Any) -> Any:
    return value


def first_plus(array: Any, value: float) -> float:
    return float(array[0]) + value


def add_one(array: Any) -> float:
    """Write to the array; the sum of what is in it then."""
    array += 1
    return float(array.sum())


class Holder:
    """A callable that holds an array."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __call__(self, value: float) -> float:
        return first_plus(self.array, value)

    def add_one(self, _: object = None) -> float:
        return add_one(self.array)


def write_and_return(array: Any, gate: str = "") -> Any:
    """Write to all of it; then, when the file ``gate`` is there, the first of its numbers.

    Whose process holds what was written stands in a file beside the gate, ``.pid``.
    """
    array[:] = 1
    if gate:
        note(f"{gate}.pid", os.getpid())
        await_file(gate)
    return array[:1].reshape(())


def fail(text: str = "as wanted") -> NoReturn:
    raise ValueError(text)  # a comment that the traceback shows


def fail_at(value: int, bad: int) -> int:
    if value == bad:
        raise ValueError(f"bad {value}")
    return value


def pause(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def pause_on(value: int, slow: int, seconds: float) -> int:
    if value == slow:
        time.sleep(seconds)
    return value


def fail_until(directory: str, attempt: int) -> int:
    """Fail on all attempts before this one; which attempt it was,
    as the task is told and as it counts.
    """
    marks = Path(directory)
    count = len(list(marks.iterdir())) + 1
    (marks / str(count)).touch()
    assert current_attempt() == count
    if count < attempt:
        raise ValueError(f"attempt {count}")
    return count


def pid(_: object = None) -> int:
    return os.getpid()


def parent_pid(_: object = None) -> int:
    return os.getppid()


def pause_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def repeat(data: bytes) -> bytes:
    return data[::-1]


def zeros(size: int) -> bytes:
    return bytes(size)


def exit_with(code: int) -> NoReturn:
    sys.exit(code)


def interrupt() -> NoReturn:
    raise KeyboardInterrupt("by the task itself")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def segfault() -> None:
    ctypes.string_at(0)


def note(path: str, line: object) -> None:
    """Append a line to a file, in one write."""
    with open(path, "a") as file:
        file.write(f"{line}\n")


def note_and_pause(path: str, line: object, seconds: float) -> int:
    """Append to a file, then sleep: tells a test that this attempt has started, and where."""
    note(path, f"{line} {os.getpid()}")
    time.sleep(seconds)
    return os.getpid()


def note_pid_and_pause(path: str, seconds: float) -> None:
    note(path, os.getpid())
    time.sleep(seconds)


def note_and_die(path: str) -> None:
    note(path, "begun")
    die()


def note_unless_there(log: str, go: str) -> int:
    """Note that it has begun, wait for the file ``go``; how often it has begun."""
    note(log, os.getpid())
    await_file(go)
    return len(notes(Path(log)))


def print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def print_and_die(text: str) -> None:
    print(text)
    die()


def flood(size: int) -> int:
    line = "x" * 99 + "\n"
    for _ in range(size // 100):
        sys.stdout.write(line)
    return size


def print_lines(count: int, text: str) -> None:
    for _ in range(count):
        print(text)


def print_nested(executor: Any, text: str) -> None:
    executor.submit(print, text).result()


def await_file(path: str) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def await_file_at(value: int, slow: int, path: str) -> int:
    """The value; the slow one's not before the file is there."""
    if value == slow:
        await_file(path)
    return value


def note_and_await(path: str, line: object, go: str) -> int:
    """Append to a file, then wait for another: tells a test that this attempt has started,
    and where.
    """
    note(path, f"{line} {os.getpid()}")
    await_file(go)
    return os.getpid()


def note_both_ends(path: str, go: str) -> None:
    """Note when it begins, and when it ends, which it does as soon as ``go`` is there."""
    note(path, "begun")
    await_file(go)
    note(path, "ended")


def meet(path: str, count: int) -> None:
    """Wait until so many of these have begun."""
    note(path, os.getpid())
    deadline = time.monotonic() + 60
    while len(notes(Path(path))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def die_once(path: str, value: Any) -> Any:
    """Kill the own process at the first attempt, return the value at the second."""
    if not Path(path).exists():
        Path(path).touch()
        die()
    return value


def notes(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class Custom(Exception):
    """Needs two arguments, so that its default pickle cannot be loaded again."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code


def raise_custom() -> NoReturn:
    raise Custom(7, "seven")


def raise_keyword_only() -> NoReturn:
    raise KeywordOnly(code=7)


class Holding(Exception):
    """Holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lambda")
        self.held = lambda: None


def raise_holding() -> NoReturn:
    raise Holding


def raise_chained() -> NoReturn:
    try:
        fail("the first")
    except ValueError as error:
        raise KeyError("the second") from error


class Unpicklable:
    def __reduce__(self) -> NoReturn:
        raise TypeError("will not be pickled")

    def __repr__(self) -> str:
        return "<Unpicklable>"


def return_unpicklable() -> Unpicklable:
    return Unpicklable()


class BadToLoad:
    """Pickles well, and raises when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (fail, ("will not be loaded",))


def return_bad_to_load() -> BadToLoad:
    return BadToLoad()


class Adder:
    """A callable with a state that a call changes."""

    def __init__(self, total: int = 0) -> None:
        self.total = total

    def __call__(self, value: int) -> int:
        self.total += value
        return self.total

    def method(self, value: int) -> int:
        return self.total + value


_state: Any = None


def set_state(value: Any) -> None:
    global _state
    _state = value


def get_state(_: object = None) -> Any:
    return _state


def note_state(path: str) -> None:
    """An initializer that leaves one line for each runner."""
    set_state("noted")
    note(path, os.getpid())


def fail_to_start() -> NoReturn:
    raise RuntimeError("the initializer has failed")


def surroundings() -> tuple[list[str], list[str], list[str]]:
    """What this process inherited: its environment, its arguments,
    and what its descriptors lead to.
    """
    environ = Path("/proc/self/environ").read_bytes().decode("utf-8", "replace").split("\0")
    arguments = Path("/proc/self/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing
            descriptors.append(os.readlink(f"/proc/self/fd/{name}"))
    return [*environ, *os.environ.values()], [*arguments, *sys.argv], descriptors


def leave_a_stubborn_child() -> int:
    """A child that ignores signals, and holds on to all that it inherited."""
    pid = os.fork()
    if not pid:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for _ in range(600):
            time.sleep(0.1)
        os._exit(0)
    return pid


def leave_a_thread() -> int:
    """A thread that Python waits for at its end, and that never ends; the process's number."""
    threading.Thread(target=threading.Event().wait, name="left behind").start()
    return os.getpid()


def close_all() -> None:
    os.closerange(3, 256)


class MakesFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def return_maker(path: str) -> MakesFolder:
    return MakesFolder(path)


class OwnError(Exception):
    pass


def raise_own(value: object) -> NoReturn:
    raise OwnError(value)
