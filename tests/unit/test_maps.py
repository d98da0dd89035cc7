from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from achilles.errors import ArgumentPickleError
from achilles.executor import DistributedExecutor
from achilles.runtime.serialize import dumps_call
from tests import tasks
from tests.unit.silent import Backend


def test_a_map_consumes_its_inputs_at_the_call(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    results = executor.map(tasks.add, iter(range(5)))
    assert backends[0].drain()[0] == [1, 2, 3, 4, 5]
    backends[0].answer(2, 1, 3, 4, 5)
    assert list(results) == [10, 20, 30, 40, 50]


def test_a_buffered_map_holds_no_more_than_its_window(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    inputs = iter(range(100))
    results = executor.map(tasks.add, inputs, buffersize=3)
    assert backends[0].drain()[0] == [1, 2, 3]
    backends[0].answer(1, 2, 3)
    assert next(results) == 10
    assert backends[0].drain()[0] == [4]
    assert next(results) == 20
    assert next(results) == 30
    assert backends[0].drain()[0] == [5, 6]
    assert next(inputs) == 6
    results.close()  # type: ignore[attr-defined]
    assert backends[0].drain() == ([], [4, 5, 6])


def test_a_buffer_is_as_many_chunks_as_it_says(backends: list[Backend]) -> None:
    """As `ProcessPoolExecutor` of Python 3.14 counts."""
    inputs = iter(range(100))
    results = DistributedExecutor(2).map(tasks.add, inputs, buffersize=2, chunksize=4)
    assert backends[0].drain()[0] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert next(inputs) == 8
    del results


def test_results_as_they_come(backends: list[Backend]) -> None:
    results = DistributedExecutor(2).map_unordered(tasks.add, range(4))
    backends[0].drain()
    backends[0].answer(3)
    backends[0].answer(1, 4)
    assert [next(results) for _ in range(3)] == [30, 10, 40]
    results.close()  # type: ignore[attr-defined]
    assert backends[0].drain() == ([], [2])


def test_a_buffer_of_results_as_they_come(backends: list[Backend]) -> None:
    inputs = itertools.count()
    results = DistributedExecutor(2).map_unordered(tasks.add, inputs, buffersize=3)
    assert backends[0].drain()[0] == [1, 2, 3]
    for id in range(2, 50):  # the first item never comes, and holds up nobody
        backends[0].answer(id)
        assert next(results) == id * 10
        backends[0].drain()
    assert next(inputs) == 3 + 48
    results.close()  # type: ignore[attr-defined]
    assert backends[0].drain() == ([], [1, 50, 51])


def test_an_error_among_results_as_they_come(backends: list[Backend]) -> None:
    results = DistributedExecutor(2).map_unordered(tasks.echo, [1, tasks.Unpicklable(), 3])
    backends[0].drain()
    with pytest.raises(ArgumentPickleError):
        next(results)
    assert list(results) == []
    assert backends[0].drain() == ([], [1, 2])


@pytest.mark.bad_input(28)
@pytest.mark.parametrize("name", ["map", "map_unordered"])
def test_what_was_submitted_comes_before_the_inputs_error(
    backends: list[Backend], name: str
) -> None:
    def inputs() -> Iterator[int]:
        yield from range(4)
        raise LookupError("of the input")

    results = getattr(DistributedExecutor(2), name)(tasks.add, inputs(), buffersize=2)
    for id in range(1, 5):
        backends[0].drain()
        backends[0].answer(id)
        assert next(results) == id * 10
    with pytest.raises(LookupError, match="of the input"):
        next(results)
    assert list(results) == []
    assert backends[0].drain() == ([], [])


def test_starmap(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    inputs = iter([(1, 2), [3], iter((4, 5)), "67"])
    results = executor.starmap(tasks.add, inputs, buffersize=3)
    backends[0].drain()
    payloads = backends[0].batches[0].payloads
    assert payloads == [dumps_call(args, {}, tasks.add) for args in [(1, 2), (3,), (4, 5)]]
    assert next(inputs) == "67"
    del results
    with pytest.raises(TypeError, match="not iterable"):
        executor.starmap(tasks.add, [1])  # type: ignore[list-item]


def test_an_iterator_that_is_dropped_cancels_the_rest(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    results = executor.map(tasks.add, range(5))
    backends[0].drain()
    backends[0].answer(1)
    assert next(results) == 10
    del results
    assert backends[0].drain() == ([], [2, 3, 4, 5])
    unused = executor.map(tasks.add, range(3))
    del unused
    assert backends[0].drain() == ([6, 7, 8], [])


def test_an_input_that_raises_cancels_what_was_submitted(backends: list[Backend]) -> None:
    def inputs() -> Iterator[int]:
        yield 1
        raise LookupError

    executor = DistributedExecutor(2)
    with pytest.raises(LookupError):
        executor.map(tasks.add, inputs())
    assert backends[0].drain() == ([1], [1])


@pytest.mark.parametrize(
    ("chunksize", "tasks_max", "expected"), [(1, None, 0), (5, None, 5), (5, 3, 3), (1, 3, 3)]
)
def test_bounds_of_chunks(
    backends: list[Backend], chunksize: int, tasks_max: int | None, expected: int
) -> None:
    executor = DistributedExecutor(2, max_tasks_per_child=tasks_max)
    executor.map(tasks.add, [1], chunksize=chunksize)
    backends[0].drain()
    assert backends[0].batches[0].group.chunk_max == expected
    assert backends[0].tasks_max == (tasks_max or 0)
