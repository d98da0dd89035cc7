"""What `achilles.Pool` promises beyond the standard's contract,
with real processes in both modes.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from achilles.errors import ExecutorForkedError, InitializerError, TaskCrashedError
from tests import tasks
from tests.modes import CLUSTER, OURS, PROCESSES, STANDARD, of_modes, wait_until
from tests.pools import PoolMaker, make

__all__ = ["make"]

BOUND = 20.0


def run(make: PoolMaker, folder: Path, text: str) -> str:
    """What a program prints; it must end by itself, in time and without a complaint."""
    home = "multiprocessing" if make.mode == PROCESSES else "achilles"
    program = folder / "program.py"
    program.write_text(f"import os, sys, time\nfrom {home} import Pool\n{text}")
    environ = dict(os.environ)
    if make.mode == CLUSTER:
        environ["ACHILLES_ADDRESS"] = make.cluster.address
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# --- Programs -------------------------------------------------------------------------------------


@of_modes(*STANDARD)
def test_a_program_of_the_standard_librarys_documentation(make: PoolMaker, tmp_path: Path) -> None:
    text = """
def f(x):
    return x*x

if __name__ == '__main__':
    with Pool(processes=4) as pool:
        print(pool.map(f, range(10)))
        print(sorted(pool.imap_unordered(f, range(10))))
        res = pool.apply_async(f, (20,))
        print(res.get(timeout=10))
        res = pool.apply_async(os.getpid, ())
        print(res.get(timeout=10) != os.getpid())
        multiple_results = [pool.apply_async(os.getpid, ()) for i in range(4)]
        print(len([res.get(timeout=10) for res in multiple_results]))
        res = pool.apply_async(time.sleep, (10,))
        try:
            print(res.get(timeout=0.1))
        except Exception as error:
            print(type(error))
"""
    squares = [n * n for n in range(10)]
    assert run(make, tmp_path, text).splitlines() == [
        str(squares),
        str(squares),
        "400",
        "True",
        "4",
        "<class 'multiprocessing.context.TimeoutError'>",
    ]


LEAVING = """
if __name__ == "__main__":
    pool = Pool(1)
    print(pool.apply(abs, (-1,)))
    results = [pool.apply_async(time.sleep, (60,)) for _ in range(3)]
    iterator = pool.imap(time.sleep, iter(lambda: 60, None))
"""


@of_modes(*STANDARD)
@pytest.mark.parametrize("ending", ["", "    pool.close()"])
def test_a_program_does_not_wait_for_what_it_left(
    make: PoolMaker, tmp_path: Path, ending: str
) -> None:
    start = time.monotonic()
    assert run(make, tmp_path, LEAVING + ending) == "1\n"
    assert time.monotonic() - start < 30


@of_modes(*OURS)  # the standard's complains of a closed file
@pytest.mark.parametrize("more", ["", "    del iterator"])
def test_a_program_does_not_wait_for_what_it_dropped(
    make: PoolMaker, tmp_path: Path, more: str
) -> None:
    program = LEAVING if more else LEAVING.replace("    iterator = ", "    # ")
    start = time.monotonic()
    assert run(make, tmp_path, f"{program}    del pool, results\n{more}") == "1\n"
    assert time.monotonic() - start < 30


# --- What the standard's pool cannot do -----------------------------------------------------------


@of_modes(*OURS)
def test_a_process_that_dies(make: PoolMaker, tmp_path: Path) -> None:
    pool = make()
    assert pool.apply(tasks.die_once, (str(tmp_path / "died"), 5)) == 5
    result = pool.apply_async(tasks.die)
    with pytest.raises(TaskCrashedError, match="die"):
        result.get(BOUND)
    with pytest.raises(BrokenProcessPool, match="die_with"):
        pool.map_async(die_with, range(20)).get(BOUND)
    with pytest.raises(SystemExit):
        pool.apply_async(tasks.exit_with, (3,)).get(BOUND)
    assert pool.map(tasks.add, range(3)) == [1, 2, 3]


def die_with(n: int) -> None:
    if n == 7:
        tasks.die()


@of_modes(*OURS)
def test_an_initializer_that_raises(make: PoolMaker) -> None:
    pool = make(1, tasks.fail_to_start)
    for result in (
        pool.apply_async(tasks.add, (1,)),
        pool.map_async(tasks.add, range(10)),
        pool.map_async(tasks.add, range(10)),
    ):
        with pytest.raises(InitializerError):
            result.get(BOUND)
    with pytest.raises(InitializerError):
        pool.imap(tasks.add, range(3)).next(BOUND)
    pool.close()
    pool.join()


@of_modes(*OURS)
def test_functions_that_others_cannot_send(make: PoolMaker) -> None:
    pool = make()
    offset = 5
    assert pool.map(lambda n: n + offset, range(100)) == list(range(5, 105))
    assert list(pool.imap(lambda n: n + offset, range(10), 3)) == list(range(5, 15))
    assert pool.apply(lambda: lambda: offset)() == 5


@of_modes(*OURS)
def test_long_calls_do_not_wait_for_each_other(make: PoolMaker) -> None:
    """The first eight are one chunk, as the standard's pool cuts,
    but are not run by one process.
    """
    pids = make(2).map(tasks.pause_pid, [0.1] * 8 + [0.0] * 56)
    assert len(set(pids[:8])) > 1


@of_modes(*OURS)
def test_endless_inputs(make: PoolMaker) -> None:
    pool = make()
    counter = itertools.count()
    results = pool.imap(tasks.echo, counter)
    assert list(itertools.islice(results, 1000)) == list(range(1000))
    assert next(counter) < 2000
    unordered = pool.imap_unordered(tasks.echo, itertools.count(), 10)
    assert len(list(itertools.islice(unordered, 1000))) == 1000


@of_modes(*OURS)
def test_errors_within_chunks(make: PoolMaker) -> None:
    pool = make()
    calls = ((n, 3) for n in range(10))
    with pytest.raises(ValueError, match="bad 3"):
        pool.starmap(tasks.fail_at, calls, 5)
    results = pool.imap(fail_at_three, range(10), 5)
    outcomes: list[Any] = []
    for _ in range(10):
        try:
            outcomes.append(next(results))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes == [0, 1, 2, "bad 3", 4, 5, 6, 7, 8, 9]


def fail_at_three(n: int) -> int:
    return tasks.fail_at(n, 3)


@of_modes(*OURS)
def test_callbacks_that_raise_or_wait(make: PoolMaker) -> None:
    pool = make()
    seen: list[Any] = []

    def bad(value: Any) -> None:
        seen.append(value)
        raise RuntimeError("in a callback")

    def wait(value: Any) -> None:
        seen.append(pool.apply(tasks.add, (value,)))

    results = [pool.apply_async(tasks.add, (n,), callback=bad) for n in range(3)]
    results.append(pool.apply_async(tasks.add, (10,), callback=wait))
    assert [result.get(BOUND) for result in results] == [1, 2, 3, 11]
    assert sorted(seen) == [1, 2, 3, 12]


# --- Ends -----------------------------------------------------------------------------------------


@of_modes(*OURS)
def test_nothing_is_left_of_a_closed_pool(make: PoolMaker) -> None:
    pool = make(1)
    pool.apply_async(tasks.add, (1,), callback=lambda _: None)
    assert list(pool.imap(tasks.add, range(3))) == [1, 2, 3]
    pool.close()
    pool.join()
    wait_until(
        lambda: not any(t.name.startswith("achilles") for t in threading.enumerate()),
        "no thread is left",
    )


@of_modes(*OURS)
def test_a_dropped_pool_does_what_it_has(make: PoolMaker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    pools = [make.unguarded(1)]
    results = pools[0].map_async(tasks.pause, [0.05] * 8)
    pools[0].imap(tasks.note_state, [str(path)] * 300)
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        pools.clear()
    assert results.get(BOUND) == [None] * 8
    del results
    wait_until(lambda: len(tasks.notes(path)) == 300, "the rest was run, too")
    wait_until(
        lambda: not any(t.name.startswith("achilles") for t in threading.enumerate()),
        "no thread is left",
    )


@of_modes(*OURS)
def test_a_forked_child_gets_a_clear_error(make: PoolMaker) -> None:
    pool = make(1)
    assert pool.apply(tasks.add, (1,)) == 2
    mapped = pool.map_async(tasks.pause, [0.2] * 4)
    iterated = pool.imap(tasks.pause, [0.2] * 4)
    single = pool.apply_async(tasks.pause, (0.5,))
    ours, childs = socket.socketpair()
    pid = os.fork()
    if not pid:
        count = 0
        try:
            for call in (
                lambda: pool.apply(tasks.add, (1,)),
                lambda: pool.map(tasks.add, [1]),
                lambda: pool.imap(tasks.add, [1]),
                mapped.get,
                iterated.next,
                single.get,
            ):
                try:
                    call()
                except ExecutorForkedError:
                    count += 1
            pool.terminate()  # which is the parent's affair
            pool.join()
            del iterated
        finally:
            childs.send(bytes([count]))
            os._exit(0)
    ours.settimeout(BOUND)
    count = ours.recv(1)[0]
    os.waitpid(pid, 0)
    ours.close()
    childs.close()
    assert count == 6
    assert mapped.get(BOUND) == list(iterated) == [None] * 4
