"""What `map` does, with every kind of executor."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import inspect
import itertools
import math
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tasks
from tests.modes import ALL, OURS, PROCESSES, STANDARD, Maker, of_modes, wait_until


@of_modes(*ALL)
def test_results_come_in_order(make: Maker) -> None:
    executor = make()
    delays = [0.2, 0.0, 0.1, 0.0]
    assert list(executor.map(tasks.pause, delays, range(4))) == [0, 1, 2, 3]
    assert list(executor.map(pow, range(50), itertools.repeat(2))) == [n * n for n in range(50)]


@pytest.mark.bad_input(29)
@of_modes(*ALL)
def test_inputs_of_odd_lengths(make: Maker) -> None:
    executor = make(1)
    assert list(executor.map(tasks.add, [1, 2, 3], [10, 20])) == [11, 22]
    assert list(executor.map(tasks.add, [])) == []
    assert list(executor.map(tasks.add)) == []
    assert list(executor.map(tasks.add, range(5), ())) == []
    assert list(executor.map(tasks.echo, "abc")) == ["a", "b", "c"]
    assert list(executor.map(tasks.echo, {"k": 1})) == ["k"]


@of_modes(*ALL)
@pytest.mark.parametrize("chunksize", [1, 3, 40, 50])
def test_chunksize(make: Maker, chunksize: int) -> None:
    assert list(make().map(tasks.echo, range(40), chunksize=chunksize)) == list(range(40))


@pytest.mark.bad_input(29)
@of_modes(*STANDARD)
@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunksize_that_cannot_be(make: Maker, chunksize: int) -> None:
    with pytest.raises(ValueError, match=r"chunksize must be >= 1\."):
        make().map(tasks.echo, range(3), chunksize=chunksize)


@pytest.mark.bad_input(29)
@of_modes(*STANDARD)
def test_chunksize_of_a_wrong_type(make: Maker) -> None:
    with pytest.raises(TypeError):
        list(make().map(tasks.echo, range(3), chunksize=None))
    with pytest.raises(TypeError):
        list(make().map(tasks.echo, range(3), chunksize="3"))


@of_modes(*ALL)
def test_inputs_are_consumed_at_the_call(make: Maker) -> None:
    seen: list[int] = []

    def inputs() -> Iterator[int]:
        for n in range(10):
            seen.append(n)
            yield n

    results = make().map(tasks.echo, inputs())
    assert seen == list(range(10))
    assert list(results) == seen


@of_modes(*ALL)
def test_tasks_start_without_iteration(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    results = make(1).map(functools.partial(tasks.note, str(path)), range(3))
    wait_until(lambda: len(tasks.notes(path)) == 3, "the tasks ran")
    assert list(results) == [None] * 3


@of_modes(*ALL)
def test_it_is_a_generator(make: Maker) -> None:
    results = make().map(tasks.echo, [1, 2])
    assert inspect.isgenerator(results)
    assert next(results) == 1
    results.close()
    assert list(results) == []


@of_modes(*ALL)
def test_an_error_ends_it(make: Maker) -> None:
    results = make().map(functools.partial(tasks.fail_at, bad=2), range(5))
    assert next(results) == 0
    assert next(results) == 1
    with pytest.raises(ValueError, match="bad 2"):
        next(results)
    assert list(results) == []


@of_modes(*STANDARD)
def test_an_error_has_the_remote_traceback(make: Maker) -> None:
    with pytest.raises(ValueError, match="bad 0") as caught:
        list(make().map(functools.partial(tasks.fail_at, bad=0), range(3), chunksize=2))
    assert "in fail_at" in str(caught.value.__cause__)


@pytest.mark.bad_input(28)
@of_modes(*ALL)
def test_an_error_of_the_input(make: Maker) -> None:
    def inputs() -> Iterator[int]:
        yield 1
        raise LookupError("of the input")

    executor = make()
    with pytest.raises(LookupError, match="of the input"):
        executor.map(tasks.echo, inputs())
    assert executor.submit(tasks.add, 1).result() == 2
    with pytest.raises(TypeError):
        executor.map(tasks.echo, 5)


@of_modes(*STANDARD)
def test_what_cannot_be_pickled_fails_in_its_turn(make: Maker) -> None:
    executor = make()
    results = executor.map(tasks.echo, [1, tasks.Unpicklable(), 3])
    assert next(results) == 1
    with pytest.raises(Exception, match="pickle"):
        next(results)
    assert list(executor.map(tasks.add, [1])) == [2]


@of_modes(*ALL)
def test_timeout(make: Maker, tmp_path: Path) -> None:
    executor, go = make(), tmp_path / "go"
    list(executor.map(tasks.pause, [0.05] * 2))
    start = time.monotonic()
    results = executor.map(tasks.await_file_at, range(3), [2] * 3, [str(go)] * 3, timeout=1.5)
    assert next(results) == 0
    assert next(results) == 1
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    assert time.monotonic() - start > 1.4
    assert list(results) == []
    go.touch()


@pytest.mark.bad_input(42)
@of_modes(*ALL)
def test_a_timeout_that_is_no_number_is_over_at_once(make: Maker) -> None:
    results = make(1).map(tasks.pause, [1.0], timeout=math.nan)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)


@of_modes(*ALL)
def test_timeout_does_not_touch_what_is_there(make: Maker) -> None:
    executor = make()
    results = executor.map(tasks.add, range(3), timeout=0.5)
    last = executor.submit(tasks.add, 1)
    last.result()
    time.sleep(0.6)
    assert list(results) == [1, 2, 3]


@of_modes(*ALL)
def test_timeout_counts_from_the_call(make: Maker) -> None:
    results = make(1).map(tasks.pause, [3.0], timeout=2.5)
    time.sleep(2)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)  # counted from here, the task would be done in time


@of_modes(*ALL)
def test_iterating_after_shutdown(make: Maker) -> None:
    executor = make()
    results = executor.map(tasks.pause, [0.05] * 4, range(4))
    executor.shutdown()
    assert list(results) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.map(tasks.echo, [1])
    assert list(executor.map(tasks.echo, [])) == []  # nothing to do can be done


@of_modes(*ALL)
@pytest.mark.parametrize("is_started", [True, False])
def test_dropping_the_iterator(make: Maker, tmp_path: Path, is_started: bool) -> None:
    """What was started is cancelled with it; an iterator that nobody began changes nothing."""
    path = tmp_path / "notes"
    executor = make(1)
    count = 30
    results = executor.map(
        tasks.note_and_pause, itertools.repeat(str(path), count), range(count), [0.02] * count
    )
    if is_started:
        next(results)
    del results
    gc.collect()
    executor.submit(tasks.add, 1).result()
    executor.shutdown()
    if is_started:
        assert len(tasks.notes(path)) < count // 2
    else:
        assert len(tasks.notes(path)) == count


@of_modes(*ALL)
def test_results_are_not_kept(make: Maker) -> None:
    for value in make().map(tasks.Adder, range(5)):
        reference = weakref.ref(value)
        del value
        assert reference() is None


@of_modes(*ALL)
def test_two_maps_at_once(make: Maker) -> None:
    executor = make()
    first, second = executor.map(tasks.echo, range(100)), executor.map(tasks.add, range(100))
    for n in range(100):
        assert (next(first), next(second)) == (n, n + 1)


@of_modes(*STANDARD)
def test_tasks_of_a_chunk_have_outcomes_of_their_own(make: Maker) -> None:
    results = make(1).map(functools.partial(tasks.fail_at, bad=2), range(3), chunksize=3)
    with pytest.raises(ValueError, match="bad 2"):  # noqa: PT012
        values = [next(results)]
        assert make.mode != PROCESSES  # which loses all of the chunk
        values.append(next(results))
        assert values == [0, 1]
        next(results)


# --- `buffersize`, of Python 3.14 -----------------------------------------------------------------


@of_modes(*OURS)
@pytest.mark.parametrize(
    ("value", "kind"), [("5", TypeError), (2.0, TypeError), (0, ValueError), (-1, ValueError)]
)
def test_buffersize_that_cannot_be(make: Maker, value: Any, kind: type[Exception]) -> None:
    text = (
        "buffersize must be an integer or None"
        if kind is TypeError
        else "buffersize must be None or > 0"
    )
    with pytest.raises(kind, match=text):
        make().map(tasks.echo, range(3), buffersize=value)


@of_modes(*OURS)
@pytest.mark.parametrize("buffersize", [1, 2, 5, 10, 20, None])
def test_buffersize(make: Maker, buffersize: int | None) -> None:
    results = make().map(tasks.add, range(10), buffersize=buffersize)
    assert list(results) == list(range(1, 11))


@pytest.mark.bad_input(30)
@of_modes(*OURS)
def test_buffersize_bounds_what_is_taken_of_the_input(make: Maker) -> None:
    taken = itertools.count()
    results = make().map(tasks.echo, taken, buffersize=4)
    for n in range(10):
        assert next(results) == n
    following = next(taken)
    assert 10 <= following <= 15
    results.close()


@of_modes(*OURS)
def test_buffersize_with_several_inputs(make: Maker) -> None:
    executor = make()
    results = executor.map(tasks.add, [1, 2, 3], itertools.count(10), buffersize=2)
    assert list(results) == [11, 13, 15]
    assert list(executor.map(tasks.add, (), buffersize=3)) == []
    assert list(executor.map(tasks.add, buffersize=3)) == []


@of_modes(*OURS)
def test_error_of_a_buffered_input(make: Maker) -> None:
    def inputs() -> Iterator[int]:
        yield from range(3)
        raise LookupError("of the input")

    executor = make()
    results = executor.map(tasks.echo, inputs(), buffersize=2)
    with pytest.raises(LookupError, match="of the input"):
        list(results)
    assert executor.submit(tasks.add, 1).result() == 2


@of_modes(*OURS)
def test_buffered_iterator_after_shutdown(make: Maker) -> None:
    """What was submitted still comes; the rest of the input cannot be submitted any more."""
    executor = make()
    results = executor.map(tasks.echo, range(10), buffersize=3)
    executor.shutdown()
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        next(results)


@of_modes(*OURS)
def test_the_first_of_a_million_comes_at_once(make: Maker) -> None:
    executor = make()
    executor.submit(tasks.add, 1).result()
    for call in (executor.map, executor.map_unordered):
        inputs = iter(range(1_000_000))
        results = call(tasks.add, inputs, buffersize=1000)
        assert next(results) >= 1
        assert next(inputs) <= 1001
        results.close()


# --- Beyond the standard library ------------------------------------------------------------------


@of_modes(*OURS)
@pytest.mark.parametrize("buffersize", [1, 7, None])
def test_map_unordered(make: Maker, buffersize: int | None) -> None:
    results = make().map_unordered(pow, range(50), itertools.repeat(2), buffersize=buffersize)
    assert sorted(results) == [n * n for n in range(50)]


@of_modes(*OURS)
def test_map_unordered_waits_for_no_slow_item(make: Maker) -> None:
    executor = make()
    list(executor.map(tasks.pause, [0.05] * 2))
    results = executor.map_unordered(tasks.pause, [1.0] + [0.0] * 30, range(31))
    assert [next(results) for _ in range(30)] != list(range(30))
    assert next(results) == 0
    assert list(results) == []


@pytest.mark.bad_input(30)
@of_modes(*OURS)
def test_map_unordered_without_an_end(make: Maker) -> None:
    inputs = itertools.count()
    results = make().map_unordered(tasks.echo, inputs, buffersize=4)
    seen = {next(results) for _ in range(100)}
    assert len(seen) == 100
    assert max(seen) <= 104
    assert next(inputs) == 104
    results.close()


@of_modes(*OURS)
def test_map_unordered_with_a_timeout(make: Maker) -> None:
    executor = make()
    list(executor.map(tasks.pause, [0.05] * 2))
    results = executor.map_unordered(tasks.pause, [2, 0, 0], range(3), timeout=0.5)
    assert {next(results), next(results)} == {1, 2}
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    assert list(results) == []


@of_modes(*OURS)
def test_map_unordered_with_an_error(make: Maker) -> None:
    results = make().map_unordered(functools.partial(tasks.fail_at, bad=2), range(5))
    with pytest.raises(ValueError, match="bad 2"):
        list(results)
    assert list(results) == []


@of_modes(*OURS)
def test_starmap(make: Maker) -> None:
    executor = make()
    assert list(executor.starmap(pow, [(2, 3), [3, 2]])) == [8, 9]
    assert list(executor.starmap(tasks.capture, [(), (1,), "ab"], chunksize=2)) == [
        ((), {}),
        ((1,), {}),
        (("a", "b"), {}),
    ]
    endless = executor.starmap(tasks.add, zip(itertools.count(), itertools.count()), buffersize=3)
    assert [next(endless) for _ in range(5)] == [0, 2, 4, 6, 8]
    endless.close()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.starmap(pow, [(1, 2)])


@of_modes(*OURS)
def test_as_completed_of_an_endless_generator(make: Maker) -> None:
    executor = make()
    submitted = itertools.count()
    futures = (executor.submit(tasks.add, n) for n in submitted)
    done = executor.as_completed(futures, timeout=20, buffersize=10)
    values = {next(done).result() for _ in range(200)}
    assert len(values) == 200
    assert max(values) <= 210
    done.close()
    assert next(submitted) <= 210
