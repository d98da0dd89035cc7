from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import achilles
from achilles import compat
from achilles.errors import BrokerLostError
from tests import tasks
from tests.unit.silent import Backend


@pytest.fixture(autouse=True)
def _no_shared_executor() -> Iterator[None]:
    yield
    compat.shutdown(wait=False)


@pytest.fixture
def answering(backends: list[Backend]) -> Iterator[list[Backend]]:
    """Backends that answer each task with ten times its number."""
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.wait(0.001):
            for backend in backends:
                backend.answer(*backend.drain()[0])

    thread = threading.Thread(target=serve)
    thread.start()
    yield backends
    is_over.set()
    thread.join()


def three() -> Iterator[int]:
    yield from range(3)


@pytest.mark.parametrize(
    "args",
    [
        range(3),
        (1, 2, 3),
        iter("abc"),
        three,
        partial(range, 3),
        (n for n in range(3)),
        [[1, 2], [], [3]],
        iter([[1], [2, 3]]),
        lambda: iter([[1, 2, 3]]),
        [(1, 2), (3, 4), [5]],  # the first is no list
    ],
    ids=repr,
)
def test_arguments_of_all_shapes(answering: list[Backend], args: Any) -> None:
    assert compat.map(tasks.echo, args) == [10, 20, 30]


@pytest.mark.parametrize("call", [compat.map, compat.imap, compat.imap_unordered])
def test_arguments_that_cannot_be(backends: list[Backend], call: Callable[..., Any]) -> None:
    assert list(call(tasks.echo, [])) == []
    assert list(call(tasks.echo, lambda: ())) == []
    with pytest.raises(TypeError, match="all must be: int is none"):
        list(call(tasks.echo, [[], 1]))
    with pytest.raises(TypeError, match="not iterable"):
        call(tasks.echo, 5)
    with pytest.raises(ValueError, match=r"chunksize must be >= 1\."):
        call(tasks.echo, [1], chunksize=0)


def test_chunks(backends: list[Backend]) -> None:
    compat.imap(tasks.echo, range(10), chunksize=3)
    compat.imap(tasks.echo, [[1, 2], [3]], chunksize=3)
    backends[0].drain()
    assert [batch.group.chunk_max for batch in backends[0].batches] == [3, 0]


@pytest.mark.parametrize("call", [compat.imap, compat.imap_unordered])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1000),
        ({"chunksize": 10}, 1000),
        ({"chunksize": 1000}, 16_000),
        ({"buffersize": 3}, 3),
        ({"buffersize": 3, "chunksize": 5}, 15),
    ],
)
def test_how_far_ahead_an_iterator_reads(
    backends: list[Backend],
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Any],
    options: dict[str, int],
    expected: int,
) -> None:
    monkeypatch.setenv("ACHILLES_CLIENT_MAX_WORKERS", "4")
    inputs = itertools.count()
    results = call(tasks.echo, inputs, **options)
    assert next(inputs) == expected
    ids, _ = backends[0].drain()
    assert len(ids) == expected
    backends[0].answer(1)
    assert next(results) == 10
    assert len(backends[0].drain()[0]) == 1
    del results
    assert len(backends[0].drain()[1]) == expected


def test_results_in_order_and_as_they_come(backends: list[Backend]) -> None:
    ordered = compat.imap(tasks.echo, range(3))
    unordered = compat.imap_unordered(tasks.echo, range(3))
    backends[0].drain()
    backends[0].answer(6, 3, 4, 2)
    with pytest.raises(multiprocessing.TimeoutError):
        ordered.next(timeout=0.01)
    assert [next(unordered), unordered.next(timeout=0)] == [60, 40]
    backends[0].answer(1)
    assert list(ordered) == [10, 20, 30]
    with pytest.raises(StopIteration):
        ordered.next()
    unordered.close()
    assert list(unordered) == []
    assert backends[0].drain() == ([], [5])


def test_callbacks(answering: list[Backend]) -> None:
    seen: list[int] = []
    assert compat.map(tasks.echo, range(3), lambda value: value + 1) == [11, 21, 31]
    assert compat.map(tasks.echo, range(2), seen.append) == [40, 50]
    assert seen == [40, 50]
    assert list(compat.imap(tasks.echo, range(2), lambda value: value * 2)) == [120, 140]
    assert list(compat.imap_unordered(tasks.echo, range(1), callback=seen.append)) == [80]
    with pytest.raises(ZeroDivisionError):
        compat.map(tasks.echo, range(2), lambda value: value // 0)


def test_errors_of_items(answering: list[Backend]) -> None:
    args = [1, tasks.Unpicklable(), 3, tasks.Unpicklable()]
    errors: list[BaseException] = []
    values: list[int] = []
    with pytest.raises(Exception, match="argument 1") as caught:
        compat.map(tasks.echo, args, values.append, error_callback=errors.append)
    assert len(errors) == 2
    assert errors[0] is caught.value
    assert values == [10, 20]  # all that did not fail

    del errors[:]
    results = compat.imap(tasks.echo, args, error_callback=errors.append)
    for value in (30, 40):
        assert next(results) == value
        with pytest.raises(Exception, match="argument 1") as caught:
            next(results)
        assert errors[-1] is caught.value
    assert list(results) == []


def test_errors_of_the_input(answering: list[Backend]) -> None:
    def inputs() -> Iterator[int]:
        yield 1
        raise LookupError("of the input")

    with pytest.raises(LookupError, match="of the input"):
        compat.map(tasks.echo, inputs)
    results = compat.imap(tasks.echo, inputs, buffersize=1)
    assert next(results) == 20
    with pytest.raises(LookupError, match="of the input"):
        next(results)
    assert list(results) == []


def test_one_executor_for_all(backends: list[Backend]) -> None:
    compat.imap(tasks.echo, [1])
    compat.imap_unordered(tasks.echo, [1])
    assert len(backends) == 1
    other = achilles.DistributedExecutor(1)
    compat.imap(tasks.echo, [1], executor=other)
    assert len(backends) == 2
    assert [backend.starts for backend in backends] == [1, 1]


def test_what_is_no_executor_is_refused_by_name(backends: list[Backend]) -> None:
    wrong: Any = 3
    for call in (compat.map, compat.imap, compat.imap_unordered):
        with pytest.raises(TypeError, match="must be a DistributedExecutor or None, not int"):
            call(tasks.echo, [1], executor=wrong)
    assert not backends


def test_another_executor_when_it_cannot_be_used(backends: list[Backend]) -> None:
    first = compat.shared_executor()
    assert compat.shared_executor() is first
    compat.shutdown()
    compat.shutdown()
    second = compat.shared_executor()
    assert second is not first
    second._mailbox.broken = BrokerLostError("it went away")
    third = compat.shared_executor()
    assert third is not second
    third.shutdown()
    assert compat.shared_executor() is not third


def test_a_forked_child_has_another_executor() -> None:
    shared = compat.shared_executor()
    with compat._lock:  # as if another thread held it
        pid = os.fork()
        if not pid:
            try:
                is_another = compat.shared_executor() is not shared
            finally:
                os._exit(0 if is_another else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_package_has_them_too() -> None:
    assert achilles.map is compat.map
    assert achilles.imap is compat.imap
    assert achilles.imap_unordered is compat.imap_unordered
    assert "map" in dir(achilles)
    assert "map" not in achilles.__all__  # which would hide the built-in one
