"""Programs as users write them: functions of `__main__`, no guard, and every way to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import changing_program, tasks
from tests.modes import CLUSTER, EMBEDDED, OURS, PROCESSES, Maker, of_modes, wait_until

RUN_SECONDS = 30.0
IMPORTS = """import os, sys, time
from achilles import DistributedExecutor
NOTES = os.path.abspath("notes")
"""


def environ(make: Maker) -> dict[str, str]:
    variables = dict(os.environ)
    if make.mode == CLUSTER:
        assert make.cluster is not None
        variables["ACHILLES_ADDRESS"] = make.cluster.address
    return variables


def run(make: Maker, folder: Path, text: str, *, returncode: int = 0) -> tuple[str, str]:
    """What a program prints; it must end by itself, and in time."""
    program = folder / "program.py"
    imports = IMPORTS
    if make.mode == PROCESSES:
        imports = IMPORTS.replace("achilles", "concurrent.futures").replace(
            "DistributedExecutor", "ProcessPoolExecutor as DistributedExecutor"
        )
    program.write_text(imports + text)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=folder,
        env=environ(make),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == returncode, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.mark.bad_input(66, 67)
@of_modes(*OURS)
def test_without_a_main_guard(make: Maker, tmp_path: Path) -> None:
    text = """
base = 40

class Point:
    def __init__(self, x):
        self.x = x

def inner(n):
    return base + n

def work(n):
    return Point(inner(n))

print("started")
executor = DistributedExecutor(2)
print([point.x for point in executor.map(work, range(3))])
print(executor.submit(lambda point: point.x, Point(7)).result())
base = 50
print(executor.submit(inner, 1).result())
try:
    executor.submit(lambda: 1 / 0).result()
except ZeroDivisionError as error:
    print("program.py" in str(error.__cause__), "1 / 0" in str(error.__cause__))
"""
    out, err = run(make, tmp_path, text)
    assert out.splitlines()[:4] == ["started", "[40, 41, 42]", "7", "51"]
    assert out.splitlines()[4].startswith("True")
    assert err == ""


@of_modes(PROCESSES, *OURS)
def test_what_an_initializer_sets_is_there_in_tasks(make: Maker, tmp_path: Path) -> None:
    text = """
model, table, calls = None, {}, 0

class Settings:
    level = 0

def start(value):
    global model, fresh
    model = fresh = value
    table["key"] = value
    Settings.level = value
    work.hint = value

def helper():
    return model, fresh, table, Settings.level

def work(n):
    return helper(), work.hint

def count(n):
    global calls
    calls += 1
    return calls

def counted(n):
    return calls

if __name__ == "__main__":
    with DistributedExecutor(1, initializer=start, initargs=(7,)) as executor:
        print(executor.submit(work, 0).result(), *executor.map(work, range(2)))
        if not executor.__class__.__name__.startswith("Distributed") or executor._is_embedded:
            print(executor.submit(count, 0).result(), *executor.map(count, range(2)))
            print(executor.submit(counted, 0).result())
"""
    out, err = run(make, tmp_path, text)
    each = "((7, 7, {'key': 7}, 7), 7)"
    lines = [f"{each} {each} {each}", *([] if make.mode == CLUSTER else ["1 2 3", "3"])]
    assert (out.splitlines(), err) == (lines, "")


@of_modes(PROCESSES, *OURS)
def test_results_change_nothing_of_the_program(make: Maker, tmp_path: Path) -> None:
    text = """
import enum
import functools

base = 1

class Color(enum.Enum):
    RED = 1

class Point:
    __slots__ = ("__x", "y")
    made = 0
    def __init__(self, x):
        self.__x = x
    def plus_base(self):
        return self.__x + base

class Outer:
    class Inner:
        pass

class Lazy:
    @functools.cached_property
    def value(self):
        return 5

@functools.lru_cache
def cached(n):
    return n + 1

def work(point):
    Point.made += 1
    return point, Outer.Inner(), Color.RED, work, cached(1), Lazy().value, repr(Outer.Inner)

if __name__ == "__main__":
    method = Point.plus_base
    with DistributedExecutor(1) as executor:
        point, inner, color, function, *rest = executor.submit(work, Point(2)).result()
    base = 40
    print(type(point) is Point, point.plus_base(), Point.made, Point.plus_base is method)
    print(type(inner) is Outer.Inner, color is Color.RED, function is work, rest)
"""
    out, err = run(make, tmp_path, text)
    assert out.splitlines() == [
        "True 42 0 True",
        "True True True [2, 5, \"<class '__main__.Outer.Inner'>\"]",
    ]
    assert err == ""


@of_modes(PROCESSES, *OURS)
def test_a_task_finds_its_own_functions_in_main(make: Maker, tmp_path: Path) -> None:
    text = """
import multiprocessing, pickle

def arguments():
    return sys.argv

def square(n):
    return n * n

def work(n):
    import __main__
    assert pickle.loads(pickle.dumps(square)) is square is __main__.square
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(square, range(n))

if __name__ == "__main__":
    with DistributedExecutor(1) as executor:
        print(executor.submit(work, 3).result())
        print(executor.submit(arguments).result() == sys.argv)
"""
    is_same = make.mode != CLUSTER  # a worker is a program of its own
    assert run(make, tmp_path, text) == (f"[0, 1, 4]\n{is_same}\n", "")


@of_modes(*OURS)
def test_stdin_and_command_line_programs(make: Maker, tmp_path: Path) -> None:
    text = IMPORTS + "f = lambda n: n * 2\nprint(list(DistributedExecutor(1).map(f, range(3))))\n"
    for arguments, given in ((["-"], text), (["-c", text], "")):
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=tmp_path,
            env=environ(make),
            input=given,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 2, 4]\n", "")


@pytest.mark.bad_input(64)
@of_modes(PROCESSES, *OURS)
@pytest.mark.parametrize("ending", ["", "executor.shutdown(wait=False)", "del executor, futures"])
def test_the_end_waits_for_what_was_submitted(make: Maker, tmp_path: Path, ending: str) -> None:
    text = f"""
def work(n):
    time.sleep(0.1)
    with open(NOTES, "a") as file:
        file.write(f"{{n}}\\n")

if __name__ == "__main__":
    executor = DistributedExecutor(1)
    futures = [executor.submit(work, n) for n in range(4)]
    {ending}
"""
    if make.mode == PROCESSES and ending:
        pytest.skip("ProcessPoolExecutor hangs here, or loses its queue, on some versions")
    _, err = run(make, tmp_path, text)
    assert tasks.notes(tmp_path / "notes") == list("0123")
    assert err == ""


@of_modes(PROCESSES, *OURS)
def test_the_end_waits_for_callbacks(make: Maker, tmp_path: Path) -> None:
    text = """
def slow(future):
    time.sleep(0.2)
    print("called", future.result())

if __name__ == "__main__":
    executor = DistributedExecutor(1)
    executor.submit(pow, 2, 3).add_done_callback(slow)
"""
    assert run(make, tmp_path, text) == ("called 8\n", "")


@of_modes(*OURS)
def test_a_forked_child_ends_by_itself(make: Maker, tmp_path: Path) -> None:
    text = """
import multiprocessing

def child():
    global executor
    del executor

if __name__ == "__main__":
    executor = DistributedExecutor(1)
    print(executor.submit(pow, 2, 3).result())
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    print(process.exitcode, executor.submit(pow, 2, 4).result())
"""
    text = text.replace(
        "process.start()", "import warnings; warnings.simplefilter('ignore'); process.start()"
    )
    assert run(make, tmp_path, text) == ("8\n0 16\n", "")


@of_modes(*OURS)
def test_the_end_with_an_error_of_the_program(make: Maker, tmp_path: Path) -> None:
    text = """
executor = DistributedExecutor(1)
future = executor.submit(time.sleep, 0.1)
raise LookupError("of the program")
"""
    _, err = run(make, tmp_path, text, returncode=1)
    assert err.strip().endswith("LookupError: of the program")
    assert err.count("Traceback") == 1


@of_modes(PROCESSES, *OURS)
def test_submitting_at_the_end(make: Maker, tmp_path: Path) -> None:
    text = """
import atexit

def late():
    try:
        executor.submit(int)
    except RuntimeError as error:
        print(error)

if __name__ == "__main__":
    atexit.register(late)
    executor = DistributedExecutor(1)
    print(executor.submit(int).result())
"""
    out, err = run(make, tmp_path, text)
    assert out.splitlines()[0] == "0"
    assert "cannot schedule new futures after" in out
    assert err == ""


@pytest.mark.bad_input(64)
@of_modes(*OURS)
def test_submitting_from_another_thread_at_the_end(make: Maker, tmp_path: Path) -> None:
    text = """
import threading

executor = DistributedExecutor(1)

def submit():
    try:
        while True:
            executor.submit(int).result()
    except RuntimeError as error:
        print(error)

thread = threading.Thread(target=submit)
thread.start()
time.sleep(0.3)
"""
    out, err = run(make, tmp_path, text)
    assert "cannot schedule new futures after" in out
    assert err == ""


@pytest.mark.bad_input(63)
@of_modes(*OURS)
def test_an_interrupt_ends_the_program(make: Maker, tmp_path: Path) -> None:
    """Ctrl-C: the program's own KeyboardInterrupt, once, and no runner is left."""
    program = tmp_path / "program.py"
    program.write_text(
        IMPORTS
        + """
def work(n):
    with open(NOTES, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.5)

executor = DistributedExecutor(1)
futures = [executor.submit(work, n) for n in range(30)]
try:
    futures[-1].result()
except KeyboardInterrupt:
    executor.shutdown(wait=True, cancel_futures=True)
    print(sum(future.cancelled() for future in futures))
    raise
"""
    )
    process = subprocess.Popen(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environ(make),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: tasks.notes(tmp_path / "notes"), "a task runs")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert int(out) >= 29 - len(tasks.notes(tmp_path / "notes"))  # one may wait in the runner
    assert err.count("KeyboardInterrupt") == 1


@of_modes(EMBEDDED)
def test_a_killed_program_leaves_no_runner(make: Maker, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        IMPORTS
        + """
def work(n):
    while True:
        with open(NOTES, "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(0.05)

DistributedExecutor(1).submit(work, 0).result()
"""
    )
    process = subprocess.Popen([sys.executable, str(program)], cwd=tmp_path, env=environ(make))
    wait_until(lambda: tasks.notes(tmp_path / "notes"), "the task runs")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 25
    before = -1
    while before != (now := len(tasks.notes(tmp_path / "notes"))):
        assert time.monotonic() < deadline, "the task runs on"
        before = now
        time.sleep(0.3)


@of_modes(*OURS)
def test_tasks_see_the_program_as_it_was_when_they_were_submitted(
    make: Maker, tmp_path: Path
) -> None:
    """Through helpers, methods and defaults, in whatever order they run;
    and what tasks have set stays beside that.
    """
    text = """
scale, hits, table = 1, 0, [1]
def helper(): return scale
def through_helper(x): return x * helper()
class Scaled:
    def get(self): return helper(), scale
def default(seen=[]): return list(seen)
def large(x): return table[0], len(table)
def count():
    global hits
    hits += 1
    return scale, hits

with DistributedExecutor(max_workers=1) as executor:
    submit, kept = executor.submit, []
    for scale in (1, 2, 1, 3):
        default.__defaults__[0].append(scale)
        table = [scale] * 100_000
        kept += [
            submit(through_helper, 10), submit(Scaled().get), submit(helper), submit(default), submit(large, 0),
            submit(lambda: helper()),
        ]
    print([future.result() for future in kept])
    counts = []
    for scale in (1, 2, 2, 1):
        counts.append(submit(count).result())
    print(counts)
    print(list(executor.map(through_helper, range(3))))
"""
    out, _ = run(make, tmp_path, text)
    wanted: list[object] = []
    seen: list[int] = []
    for scale in (1, 2, 1, 3):
        seen.append(scale)
        wanted += [10 * scale, (scale, scale), scale, list(seen), (scale, 100_000), scale]
    lines = out.splitlines()
    assert lines[0] == str(wanted)
    if make.mode == EMBEDDED:  # a worker may have the next task run by another runner
        assert lines[1] == str([(1, 1), (2, 2), (2, 3), (1, 4)])
    assert lines[2] == "[0, 1, 2]"


@pytest.mark.parametrize("seed", range(3))
@of_modes(*OURS)
def test_tasks_see_what_a_changing_program_was(make: Maker, tmp_path: Path, seed: int) -> None:
    words = [sys.executable, "-m", "tests.changing_program", str(seed)]
    if make.mode == CLUSTER:
        assert make.cluster is not None
        words.append(make.cluster.address)
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=RUN_SECONDS, check=False, env=environ(make)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{changing_program.CALLS} calls\n"


@of_modes(*OURS)
def test_arrays_that_overlap_or_are_shared_between_executors(make: Maker, tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    text = """
import numpy as np
def at(array): return float(array[100_000])
with DistributedExecutor(max_workers=1) as one, DistributedExecutor(max_workers=1) as two:
    whole = np.ones(4 << 20)
    part = whole[: 3 << 20]
    found = []
    for value in range(1, 5):
        whole[100_000] = value
        for executor in (one, two):
            for array in (part, whole, part):
                found.append(executor.submit(at, array).result())
    print(found)
"""
    out, _ = run(make, tmp_path, text)
    assert out == f"{[float(value) for value in range(1, 5) for _ in range(6)]}\n"


@of_modes(EMBEDDED)
def test_a_connection_and_a_socket_reach_a_task(make: Maker, tmp_path: Path) -> None:
    text = """
import multiprocessing, socket
def say(to): to.send("hi")
def say_bytes(to): to.sendall(b"ho")
near, far = multiprocessing.Pipe()
left, right = socket.socketpair()
with DistributedExecutor(max_workers=1) as executor:
    executor.submit(say, far).result()
    executor.submit(say_bytes, right).result()
    print(near.recv(), left.recv(9))
"""
    assert run(make, tmp_path, text)[0] == "hi b'ho'\n"


@of_modes(CLUSTER)
def test_a_connection_is_not_for_workers(make: Maker, tmp_path: Path) -> None:
    """A plain pickle of it names a descriptor by its number, which there is anything,
    the runner's own included.
    """
    text = """
import multiprocessing
near, far = multiprocessing.Pipe()
with DistributedExecutor(max_workers=1) as executor:
    print(executor.submit(type, far).exception())
    print(executor.submit(abs, -1).result())
"""
    out, _ = run(make, tmp_path, text)
    assert (
        "cannot be pickled: a Connection is of the machine and the program" in out.splitlines()[0]
    )
    assert out.splitlines()[1] == "1"


@of_modes(EMBEDDED)
def test_modules_are_found_where_the_program_looks_when_it_submits(
    make: Maker, tmp_path: Path
) -> None:
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "late_module.py").write_text("def answer(): return 42\n")
    text = """
executor = DistributedExecutor(max_workers=1)
sys.path.insert(0, os.path.abspath("later"))
import late_module
with executor:
    print(executor.submit(late_module.answer).result())
"""
    assert run(make, tmp_path, text)[0] == "42\n"


@of_modes(*OURS)
def test_print_and_logging_of_a_task_do_no_harm(make: Maker, tmp_path: Path) -> None:
    text = """
import logging

def work(n):
    print("from a task", n, flush=True)
    print("and an error", file=sys.stderr)
    logging.getLogger("user").warning("a warning")
    return n

print(list(DistributedExecutor(1).map(work, range(3))))
"""
    out, _ = run(make, tmp_path, text)
    assert "[0, 1, 2]" in out
