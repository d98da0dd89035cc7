"""Tasks whose values are known beforehand, which leave a line for each of their executions.

A line is ``number attempt pid time sign``: "+" where it begins and "-" where it has ended, in one
write, so that lines of several processes do not mix.
`oracle` says what a task with that number may give.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import signal
import sys
import time
from typing import Any, NoReturn

from achilles import current_attempt

MASK = (1 << 64) - 1
HOG_BYTES = 1 << 30  # what a hog asks for, beyond its limit
HOG_LIMIT = 256 << 20  # what it may have, beyond what it has
PAST_TIMEOUT = 30.0  # seconds: how long a task runs that is to be stopped

_descriptors: dict[str, int] = {}


def mix(number: int) -> int:
    """The value of a task: a function of its number that nobody guesses."""
    number = (number * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & MASK
    number ^= number >> 29
    return (number * 0xBF58476D1CE4E5B9) & MASK


def digest(number: int, size: int) -> str:
    """What the bytes of a fat value are recognised by."""
    return hashlib.blake2b(blob(number, size), digest_size=12).hexdigest()


def blob(number: int, size: int) -> bytes:
    """Bytes that only this number gives."""
    return mix(number).to_bytes(8, "little") * (size // 8)


def note(log: str, number: int, sign: str) -> None:
    """Leave a line."""
    fd = _descriptors.get(log)
    if fd is None:
        fd = _descriptors[log] = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    line = f"{number} {current_attempt()} {os.getpid()} {time.monotonic():.6f} {sign}\n".encode()
    try:
        os.write(fd, line)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        _write_all_the_same(fd, line)


def _write_all_the_same(fd: int, line: bytes) -> None:
    """Write in a process that may not: its disk is full, as far as achilles can tell."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
    try:
        os.write(fd, line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tiny(number: int, log: str) -> int:
    """The smallest task; one line, because lines cost more than it does."""
    note(log, number, "+")
    return mix(number)


def sleep(number: int, log: str, seconds: float) -> int:
    note(log, number, "+")
    time.sleep(seconds)
    note(log, number, "-")
    return mix(number)


def hold_gil(number: int, log: str, seconds: float) -> int:
    """A long call into C that does not let go of the interpreter."""
    note(log, number, "+")
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    note(log, number, "-")
    return mix(number)


def fat(number: int, log: str, data: bytes, size: int) -> bytes:
    """Takes and gives large values.

    Raises:
        ValueError: the argument is not what was sent.
    """
    note(log, number, "+")
    if data != blob(number, len(data)):
        raise ValueError(f"the argument of task {number} was changed on its way")
    note(log, number, "-")
    return blob(number + 1, size)


# --- Awkward ones ---------------------------------------------------------------------------------


class Odd:
    """What pickles badly, or loads badly."""

    def __init__(self, *, loads: bool) -> None:
        self.loads = loads

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.loads:
            raise TypeError("will not be pickled")
        return (_refuse, ())


def _refuse() -> NoReturn:
    raise ValueError("will not be loaded")


def _overflow(depth: int) -> int:
    return 1 + _overflow(depth + 1)


def _hog() -> int:
    """Ask for more memory than there is; the limit is the process's own, and goes with the task."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + HOG_LIMIT, before[1]))
    try:
        return len(bytearray(HOG_BYTES))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def awkward(number: int, log: str, kind: str) -> Any:
    """One of the bad tasks, by name; `AWKWARD` has what must become of it."""
    note(log, number, "+")
    match kind:
        case "raises":
            raise KeyError(number)
        case "exits":
            sys.exit(3)
        case "interrupts":
            raise KeyboardInterrupt
        case "segfaults":
            ctypes.string_at(0)
        case "ends its process":
            os._exit(5)
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "is killed once":
            if current_attempt() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        case "recurses":
            return _overflow(0)
        case "returns the unpicklable":
            return Odd(loads=False)
        case "returns the unloadable":
            return Odd(loads=True)
        case "hogs memory":
            return _hog()
        case "runs too long":
            time.sleep(PAST_TIMEOUT)
        case "prints":
            print("x" * 200_000)
        case "goes elsewhere":
            os.chdir("/")
        case _:
            raise AssertionError(kind)
    note(log, number, "-")
    return mix(number)


# Kind of task: the names of errors that it may end with; None where it has its value.
AWKWARD: dict[str, str | None] = {
    "raises": "KeyError",
    "exits": "SystemExit",
    "interrupts": "KeyboardInterrupt",
    "segfaults": "TaskCrashedError",
    "ends its process": "TaskCrashedError",
    "is killed": "TaskCrashedError",
    "is killed once": None,
    "recurses": "RecursionError",
    "returns the unpicklable": "ResultPickleError",
    "returns the unloadable": "ResultUnpickleError",
    "hogs memory": "MemoryError",
    "runs too long": "TaskTimeoutError",
    "prints": None,
    "goes elsewhere": None,
}
