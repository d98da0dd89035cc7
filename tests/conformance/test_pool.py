"""What `multiprocessing.Pool` and `ThreadPool` do, and `achilles.Pool` in both modes."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.pool
import pickle
import threading
import time
from collections.abc import Iterator
from multiprocessing.pool import MaybeEncodingError, RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import pytest

from tests import tasks
from tests.modes import ALL, EMBEDDED, PROCESSES, STANDARD, of_modes, wait_until
from tests.pools import PoolMaker, make, pool

__all__ = ["make", "pool"]

BOUND = 20.0


# --- apply ----------------------------------------------------------------------------------------


def test_apply(pool: Any) -> None:
    assert pool.apply(tasks.add, (1,)) == 2
    assert pool.apply(tasks.add, [1, 5]) == 6
    assert pool.apply(tasks.add, (), {"a": 1, "b": 2}) == 3
    assert pool.apply(tasks.capture, (1,), {"callback": 2, "func": 3, "args": 4}) == (
        (1,),
        {"callback": 2, "func": 3, "args": 4},
    )
    with pytest.raises(ValueError, match="as wanted"):
        pool.apply(tasks.fail)


def test_a_result_that_is_not_ready(pool: Any) -> None:
    result = pool.apply_async(tasks.pause, (0.5, "value"))
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.01)
    assert result.wait(timeout=0.01) is None
    assert result.get(BOUND) == "value"
    assert result.ready()
    assert result.successful()
    assert result.get() == "value"
    assert result.get(0) == "value"


def test_a_result_that_failed(pool: Any) -> None:
    result = pool.apply_async(tasks.fail, ("badly",))
    result.wait(BOUND)
    assert result.ready()
    assert not result.successful()
    for _ in range(2):
        with pytest.raises(ValueError, match="badly"):
            result.get()


def test_callbacks(pool: Any) -> None:
    values: list[Any] = []
    errors: list[Any] = []
    calls = {"callback": values.append, "error_callback": errors.append}
    pool.apply_async(tasks.add, (1,), **calls).wait(BOUND)
    assert values == [2]  # it has run when the result is ready
    failed = pool.apply_async(tasks.fail, ("badly",), **calls)
    failed.wait(BOUND)
    assert [str(error) for error in errors] == ["badly"]
    with pytest.raises(ValueError, match="badly") as caught:
        failed.get()
    assert caught.value is errors[0]
    pool.map_async(tasks.add, range(3), **calls).wait(BOUND)
    assert values == [2, [1, 2, 3]]
    pool.map_async(tasks.fail, ["again"], **calls).wait(BOUND)
    assert [str(error) for error in errors] == ["badly", "again"]
    pool.starmap_async(tasks.add, [(1, 2)], **calls).wait(BOUND)
    assert values == [2, [1, 2, 3], [3]]


def test_a_callback_may_ask_for_more(pool: Any) -> None:
    results: list[Any] = []
    pool.apply_async(
        tasks.add,
        (1,),
        callback=lambda value: results.append(pool.apply_async(tasks.add, (value,))),
    ).wait(BOUND)
    assert results[0].get(BOUND) == 3


# --- map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [None, 1, 3, 40, 100])
def test_map(pool: Any, chunksize: int | None) -> None:
    assert pool.map(tasks.echo, range(40), chunksize) == list(range(40))
    assert pool.map(tasks.echo, (n for n in range(40)), chunksize=chunksize) == list(range(40))
    assert pool.starmap(tasks.add, zip(range(40), range(40)), chunksize) == list(range(0, 80, 2))
    assert pool.map_async(tasks.echo, range(40), chunksize).get(BOUND) == list(range(40))
    assert pool.starmap_async(pow, [(2, 3), [3, 2]], chunksize).get(BOUND) == [8, 9]


def test_map_of_odd_inputs(pool: Any) -> None:
    assert pool.map(tasks.echo, []) == []
    assert pool.map(tasks.echo, iter(())) == []
    assert pool.starmap(tasks.add, []) == []
    assert pool.map_async(tasks.echo, [], chunksize=1).get(BOUND) == []
    assert pool.map(tasks.echo, "abc") == ["a", "b", "c"]
    assert pool.map(tasks.echo, {"k": 1}) == ["k"]
    assert pool.map(tasks.echo, [(1, 2)]) == [(1, 2)]
    with pytest.raises(TypeError):
        pool.map(tasks.echo, 5)


def test_map_makes_all_calls_whatever_fails(pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    calls = functools.partial(tasks.note, str(path))
    results = pool.starmap_async(_note_or_fail, [(calls, n) for n in range(10)], 1)
    results.wait(BOUND)
    assert not results.successful()
    with pytest.raises(ValueError, match="bad"):
        results.get()
    assert sorted(map(int, tasks.notes(path))) == list(range(10))
    assert pool.map(tasks.echo, [1]) == [1]


def _note_or_fail(note: Any, n: int) -> None:
    note(n)
    if n % 4 == 2:
        raise ValueError(f"bad {n}")


def test_an_input_that_raises(pool: Any) -> None:
    with pytest.raises(LookupError, match="of the input"):
        pool.map(tasks.echo, _bad_input(3))
    results = pool.imap(tasks.echo, _bad_input(3))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="of the input") as caught:
        next(results)
    assert caught.value.__cause__ is None
    assert list(results) == []
    with pytest.raises(LookupError):
        list(pool.imap_unordered(tasks.echo, _bad_input(3)))
    with pytest.raises(TypeError):
        list(pool.imap(tasks.echo, 5))
    assert pool.apply(tasks.add, (1,)) == 2


def _bad_input(count: int) -> Iterator[int]:
    yield from range(count)
    raise LookupError("of the input")


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
@pytest.mark.parametrize("value", [0, -1])
def test_chunksize_that_cannot_be(pool: Any, method: str, value: int) -> None:
    with pytest.raises(ValueError, match=r"Chunksize must be 1\+"):
        getattr(pool, method)(tasks.echo, range(3), chunksize=value)


# --- imap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_imap(pool: Any, chunksize: int) -> None:
    results = pool.imap(tasks.echo, range(40), chunksize)
    assert iter(results) is results
    assert list(results) == list(range(40))
    assert list(results) == []
    assert list(pool.imap(tasks.echo, [], chunksize)) == []
    unordered = pool.imap_unordered(tasks.echo, iter(range(40)), chunksize=chunksize)
    assert sorted(unordered) == list(range(40))


def test_imap_with_a_timeout(pool: Any) -> None:
    results = pool.imap(tasks.pause, [0.5, 0])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0.01)
    assert results.next(timeout=BOUND) is None
    assert results.next(timeout=BOUND) is None
    with pytest.raises(StopIteration):
        results.next(timeout=BOUND)


def test_imap_goes_on_after_an_error(pool: Any) -> None:
    results = pool.imap(functools.partial(tasks.fail_at, bad=1), range(3))
    assert next(results) == 0
    with pytest.raises(ValueError, match="bad 1"):
        next(results)
    assert next(results) == 2
    with pytest.raises(StopIteration):
        next(results)


def test_imap_unordered_gives_what_is_ready(pool: Any, tmp_path: Path) -> None:
    task = functools.partial(tasks.await_file_at, slow=0, path=str(tmp_path / "go"))
    results = pool.imap_unordered(task, range(4))
    assert sorted(results.next(BOUND) for _ in range(3)) == [1, 2, 3]
    (tmp_path / "go").touch()
    assert results.next(BOUND) == 0


def test_imap_runs_all_even_if_nobody_takes_it(pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    pool.imap(functools.partial(tasks.note, str(path)), range(600))
    kept = pool.imap_unordered(functools.partial(tasks.note, str(path)), range(600))
    pool.close()
    pool.join()
    assert len(tasks.notes(path)) == 1200
    assert list(kept) == [None] * 600


def test_an_input_that_waits_for_results(pool: Any) -> None:
    """A usual way to bound what is under way; the input is read in a thread of its own."""
    tickets = threading.Semaphore(3)
    taken = []

    def inputs() -> Iterator[int]:
        for n in range(20):
            assert tickets.acquire(timeout=BOUND)
            yield n

    for value in pool.imap(tasks.echo, inputs()):
        taken.append(value)
        tickets.release()
    assert taken == list(range(20))


# --- close, terminate, join -----------------------------------------------------------------------


def test_close_and_join(pool: Any) -> None:
    with pytest.raises(ValueError, match="Pool is still running"):
        pool.join()
    values: list[int] = []
    results = [pool.apply_async(tasks.pause, (0.1, n), callback=values.append) for n in range(3)]
    mapped = pool.map_async(tasks.pause, [0.05] * 10)
    iterated = pool.imap(tasks.echo, range(5))
    pool.close()
    pool.close()
    _check_refusals(pool)
    pool.join()
    assert sorted(values) == [0, 1, 2]
    assert all(result.ready() for result in (*results, mapped))
    assert [result.get() for result in results] == [0, 1, 2]
    assert mapped.get() == [None] * 10
    assert list(iterated) == list(range(5))
    pool.terminate()
    pool.join()


def _check_refusals(pool: Any) -> None:
    for call in ("apply", "apply_async"):
        with pytest.raises(ValueError, match="Pool not running"):
            getattr(pool, call)(tasks.add, (1,))
    for call in ("map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered"):
        with pytest.raises(ValueError, match="Pool not running"):
            getattr(pool, call)(tasks.add, [(1,)])
    with pytest.raises(ValueError, match="Pool not running"), pool:
        pass


def test_the_context_terminates(pool: Any) -> None:
    with pool as entered:
        assert entered is pool
        assert pool.map(tasks.add, range(3)) == [1, 2, 3]
    _check_refusals(pool)
    pool.join()


def test_a_pool_that_is_used_by_many_threads(pool: Any) -> None:
    outcomes: list[list[int]] = []

    def use(start: int) -> None:
        outcomes.append(pool.map(tasks.echo, range(start, start + 50)))
        outcomes.append(list(pool.imap(tasks.echo, range(start, start + 50))))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert len(outcomes) == 8
    assert all(outcome == list(range(outcome[0], outcome[0] + 50)) for outcome in outcomes)


@of_modes(*STANDARD)
def test_terminate_ends_what_runs(make: PoolMaker) -> None:
    pool = make()
    results = pool.map_async(time.sleep, [60] * 1000, chunksize=1)
    pids = pool.imap_unordered(tasks.pause_pid, [60] * 10)
    with pytest.raises(multiprocessing.TimeoutError):
        pids.next(timeout=0.2)
    pool.terminate()
    pool.terminate()
    pool.join()  # or the test takes longer than it may
    assert pool._state == "TERMINATE"
    if make.mode != PROCESSES:  # where nobody ever hears of it
        with pytest.raises(Exception, match="terminated"):
            results.get(BOUND)
        with pytest.raises(Exception, match="terminated"):
            pids.next(BOUND)


@of_modes(*ALL)
def test_it_can_be_left_unused(make: PoolMaker) -> None:
    for end in ("terminate", "close"):
        pool = make()
        getattr(pool, end)()
        pool.join()


@of_modes(*ALL)
def test_one_that_is_not_closed_says_so(make: PoolMaker) -> None:
    pool = make.unguarded(1)
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        pool.__del__()
    pool.terminate()
    pool.__del__()


# --- Arguments ------------------------------------------------------------------------------------


@of_modes(*ALL)
def test_processes(make: PoolMaker) -> None:
    assert make(3)._processes == 3
    assert make(None)._processes >= 1
    for value in (0, -1):
        with pytest.raises(ValueError, match="Number of processes must be at least 1"):
            make(value)
    with pytest.raises(TypeError):
        make("2")


@of_modes(*ALL)
def test_initializer(make: PoolMaker) -> None:
    pool = make(2, tasks.set_state, ["set"])
    assert pool.map(tasks.get_state, range(6)) == ["set"] * 6
    with pytest.raises(TypeError, match="initializer must be a callable"):
        make(2, initializer=5)


@of_modes(PROCESSES, EMBEDDED)
def test_maxtasksperchild(make: PoolMaker) -> None:
    pool = make(1, maxtasksperchild=2)
    pids = [pool.apply(tasks.pid) for _ in range(6)]
    assert len(set(pids)) == 3
    pids = pool.map(tasks.pid, range(8), 4)  # two tasks
    assert len(set(pids)) == 1


@of_modes(*STANDARD)
@pytest.mark.parametrize("value", [0, -1, 0.5, "12"])
def test_maxtasksperchild_that_cannot_be(make: PoolMaker, value: Any) -> None:
    with pytest.raises(ValueError, match="maxtasksperchild must be a positive int or None"):
        make(1, maxtasksperchild=value)


@of_modes(*STANDARD)
def test_context(make: PoolMaker) -> None:
    context = multiprocessing.get_context()
    assert make(1, None, (), None, context).apply(tasks.add, (1,)) == 2


@of_modes(*ALL)
def test_it_stays_in_its_process(make: PoolMaker) -> None:
    pool = make(1)
    with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
        pickle.dumps(pool)
    kind = type(pool)
    assert repr(pool) == f"<{kind.__module__}.{kind.__qualname__} state=RUN pool_size=1>"
    pool.close()
    assert "state=CLOSE" in repr(pool)


# --- What crosses the border of a process ---------------------------------------------------------


@of_modes(*STANDARD)
def test_errors_tell_where_they_arose(make: PoolMaker) -> None:
    pool = make()
    for call in (
        lambda: pool.apply(tasks.fail_at, (0, 0)),
        lambda: pool.starmap(tasks.fail_at, [(n, 0) for n in range(3)], 3),
        lambda: list(pool.imap(functools.partial(tasks.fail_at, bad=0), range(3))),
    ):
        with pytest.raises(ValueError, match="bad 0") as caught:
            call()
        cause: Any = caught.value.__cause__
        assert type(cause) is RemoteTraceback
        assert "in fail_at" in cause.tb
        assert "achilles" not in cause.tb.replace(str(Path(__file__).parents[2]), "")


@of_modes(*STANDARD)
def test_what_cannot_be_pickled(make: PoolMaker) -> None:
    pool = make()
    with pytest.raises(TypeError, match="will not be pickled"):
        pool.apply(tasks.echo, (tasks.Unpicklable(),))
    with pytest.raises(TypeError, match="will not be pickled"):
        pool.map(tasks.echo, [tasks.Unpicklable()] * 10)
    results = pool.imap(tasks.echo, [1, tasks.Unpicklable(), 3])
    assert next(results) == 1
    with pytest.raises(TypeError, match="will not be pickled"):
        next(results)
    assert next(results) == 3
    errors: list[Any] = []
    result = pool.apply_async(tasks.return_unpicklable, error_callback=errors.append)
    with pytest.raises(MaybeEncodingError, match="will not be pickled"):
        result.get(BOUND)
    assert type(errors[0]) is MaybeEncodingError
    assert isinstance(errors[0].exc, str)
    assert isinstance(errors[0].value, str)
    assert pool.apply(tasks.add, (1,)) == 2


@of_modes(*STANDARD)
def test_exceptions_with_arguments_of_their_own(make: PoolMaker) -> None:
    pool = make()
    with pytest.raises(LookupError, match="the second"):
        pool.apply(tasks.raise_chained)
    mapped = pool.map_async(tasks.echo, itertools.repeat(b"x" * 100_000, 50))
    assert sum(map(len, mapped.get(BOUND))) == 5_000_000


@of_modes(*ALL)
def test_large_maps(make: PoolMaker) -> None:
    pool = make()
    assert pool.map(tasks.add, range(50_000)) == list(range(1, 50_001))
    assert sum(pool.imap(tasks.add, iter(range(5_000)), 50)) == sum(range(1, 5_001))
    wait_until(lambda: threading.active_count() < 20, "threads of iterators end")
