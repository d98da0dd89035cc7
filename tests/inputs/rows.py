"""What users, machines and peers get wrong, and what must become of it: the register of bad inputs.

A test says which rows it holds with ``@pytest.mark.bad_input(number, ...)``, wherever it lives;
``python -m tests.inputs`` prints the table. An error says what happened, to what,
why if that is known, and what to do.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]


class Row(NamedTuple):
    """One bad input. ``untested`` is why it is not run here, and is empty where it is."""

    what: str
    becomes: str
    untested: str = ""


ROWS: dict[int, Row] = {
    1: Row(
        "an argument that holds a lock",
        "ArgumentPickleError names argument, function, type and why",
    ),
    2: Row("a generator, a frame, on a cluster a socket as an argument", "the same"),
    3: Row("an open text file as an argument", "a warning: it is copied by content"),
    4: Row("a list that is nested 200,000 deep", "ArgumentPickleError: nested too deeply"),
    5: Row(
        "__reduce__ of an argument raises SystemExit or KeyboardInterrupt",
        "SystemExit fails the future; KeyboardInterrupt is Ctrl-C, and reaches the caller",
    ),
    6: Row(
        "an argument that a worker cannot unpickle (a module is missing)",
        "the error names module, worker and interpreter; the runner lives",
    ),
    7: Row("unpickling an argument exits or crashes", "that task fails alone"),
    8: Row(
        "a result that cannot be pickled",
        "ResultPickleError names function, type, a short repr and why",
    ),
    9: Row("pickling a result exits or crashes", "that task fails alone"),
    10: Row("a result that the client cannot unpickle", "ResultUnpickleError, with its cause"),
    11: Row("an exception with arguments of its own", "itself, or a RemoteError that says why"),
    12: Row(
        "an exception that holds a lock, in a group too", "the same; a group keeps its members"
    ),
    13: Row("an exception class of __main__", "it travels by value"),
    14: Row("an exception with causes, notes, a traceback", "all of them are shown"),
    15: Row(
        "a task raises SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration",
        "an outcome as any other; the runner lives",
    ),
    16: Row("a task calls os._exit", "TaskCrashedError: function, exit code, worker, attempts"),
    17: Row("a task gets SIGSEGV, SIGABRT, SIGILL, SIGBUS", "the same; the signal is named"),
    18: Row(
        "a task is killed (out of memory)", "the same; the out-of-memory killer is named as a cause"
    ),
    19: Row(
        "a task takes more memory than it may",
        "TaskMemoryError names the limit and what it took; it is not tried again unasked",
    ),
    20: Row("a task runs longer than with_options(timeout=)", "TaskTimeoutError; the slot is free"),
    21: Row("a task recurses without end", "RecursionError"),
    22: Row("a task closes every descriptor", "TaskCrashedError says that it closed the pipe"),
    23: Row("a task forks, and both return", "the parent's value, once"),
    24: Row("a task leaves threads and processes behind", "they end with their runner"),
    25: Row(
        "a task changes directory, environment, umask, signal handlers, recursion limit",
        "it stays for that runner's next tasks, as in ProcessPoolExecutor; nobody else sees it",
    ),
    26: Row("a task prints without end, or reads stdin", "it is cut, and says so; EOFError"),
    27: Row(
        "a task replaces stdout, calls logging.shutdown, registers atexit, starts multiprocessing",
        "it works; atexit runs at the runner's end",
    ),
    28: Row("the input of a map raises", "its exception, from map()"),
    29: Row(
        "a map of unequal or empty inputs, or of a chunksize that cannot be",
        "the shortest; nothing; ValueError and TypeError",
    ),
    30: Row("an endless input", "with buffersize it is read no further than a window ahead"),
    31: Row(
        "submit after shutdown, after a lost broker, at the interpreter's end",
        "RuntimeError in the standard's words; the broker's error",
    ),
    32: Row("submit of nothing, or of what is no callable", "TypeError names the type"),
    33: Row("a coroutine function", "TypeError names it"),
    34: Row("an executor in a forked child", "ExecutorForkedError, at once"),
    35: Row(
        "a future, or an embedded executor, is pickled",
        "TypeError says what to pass instead; an executor is a handle in its own tasks",
    ),
    36: Row("tasks wait for tasks with every slot taken", "they lend their slots, and end"),
    37: Row("a callback raises, or blocks", "it is logged, and holds up nobody"),
    38: Row(
        "cancel of a queued, running, finished task", "True; False, or the task is ended; False"
    ),
    39: Row(
        "an argument beyond a limit of bytes",
        "ArgumentTooLargeError names the limit, before anything is sent",
    ),
    40: Row(
        "a result beyond a limit of bytes",
        "ResultTooLargeError, on the worker; the runner lives",
    ),
    41: Row(
        "an argument of 2 GiB and a byte",
        "it works embedded; a broker takes 1 GiB, and row 39 is what is said of more",
    ),
    42: Row(
        "a max_workers, timeout or heartbeat that cannot be",
        "ValueError, TypeError or ConfigError names parameter and bound",
    ),
    43: Row("an endpoint that cannot be", "ConfigError names the part, and an example that works"),
    44: Row("a host name that does not resolve", "BrokerUnreachableError names it, in time"),
    45: Row(
        "a port that is taken; a broker that runs already; what a killed one left",
        "ConfigError names the holder; what is stale is replaced",
    ),
    46: Row(
        "no broker, another server, a silent one, one that hangs up",
        "BrokerUnreachableError says which, in time",
    ),
    47: Row(
        "a key that is damaged, loose, of another role, unknown, revoked",
        "KeyFileError or AuthenticationError names the file, the role, the remedy",
    ),
    48: Row("a bind beyond loopback without keys in order", "InsecureBindError, exit 2"),
    49: Row("a ZeroMQ without CURVE, or too old", "ConfigError with the command that helps"),
    50: Row("no worker connects", "one warning after 10 s: how many wait, what starts a worker"),
    51: Row("all workers are lost", "the same; their tasks wait, and run on a new one"),
    52: Row("a task is on five workers that vanish", "WorkerLostError names task and workers"),
    53: Row("the broker is away for a while", "nothing is lost"),
    54: Row("the broker is away for good", "BrokerLostError names address and silence"),
    55: Row("a worker's broker is away", "it finds the next one at the place"),
    56: Row(
        "another Python, or another version of the protocol",
        "refused, with both versions",
    ),
    57: Row("the wall clock jumps", "nothing: nobody looks at it"),
    58: Row("the machine sleeps", "nobody is given up for it"),
    59: Row("the disk is full", "an error names the file, and no half of one is left"),
    60: Row("no home, or one that cannot be", "ConfigError names it, and ACHILLES_HOME"),
    61: Row("no process, descriptor or memory for a runner", "the reason, and which limit it is"),
    62: Row("SIGTERM, SIGINT, SIGHUP, once and twice", "the end that each promises, and its code"),
    63: Row("Ctrl-C in a program", "KeyboardInterrupt once, soon, and nothing left"),
    64: Row("a program ends with work under way", "it is waited for, without noise"),
    65: Row("an executor is dropped without shutdown", "it cleans up after itself"),
    66: Row("an executor at import time, without a main guard", "it works: runners import no main"),
    67: Row("functions of __main__, closures, classes that change", "no stale code"),
    68: Row("an argument changes after submit", "its value at submit"),
    69: Row("a worker lacks the client's modules", "the error names interpreter and module (6)"),
    70: Row("a malformed message", "its sender's session ends, with the reason; others go on"),
    71: Row("two workers of a name; a name that cannot be", "told apart; refused with the rule"),
    72: Row(
        "status without a broker, of a busy or hung one, in the wrong role",
        "exit 69 with what to do; an answer in time; a refusal that names the role",
    ),
    73: Row("shutdown with work pending", "it says what is lost, and asks"),
    74: Row("a drain that takes too long", "a second signal ends it, and says what was given up"),
    75: Row(
        "an option, file, key or variable that cannot be",
        "one line, an exit code, the nearest valid name",
    ),
    76: Row("a system without /proc, pidfd, epoll", "it works, a little slower"),
    77: Row(
        "a free-threaded Python, a subinterpreter",
        "refused: ImportError says what to do; Python's own error of threads",
    ),
}


def covered() -> dict[int, list[str]]:
    """By row, the tests that are marked with it: ``file::name``."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.bad_input":
                    for number in map(ast.literal_eval, mark.args):
                        name = f"{path.relative_to(TESTS).as_posix()}::{node.name}"
                        found.setdefault(number, []).append(name)
    return found
