"""Results and iterators of a pool: what they submit, when, and what they make of the outcomes."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import threading
import weakref
from collections.abc import Iterator
from multiprocessing.pool import MaybeEncodingError, RemoteTraceback  # type: ignore[attr-defined]
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.errors import ArgumentPickleError, ResultPickleError, TerminatedError
from achilles.pool import Pool
from achilles.pool_calls import WINDOW_MIN, AsyncResult
from achilles.runtime.serialize import dump_result, dumps
from achilles.runtime.tracebacks import dump_error
from tests import tasks
from tests.modes import wait_until
from tests.unit.silent import Backend
from tests.unit.test_pool import sent

BOUND = 20.0


@pytest.fixture
def pool(backends: list[Backend]) -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.terminate()


def returned(backend: Backend, id: int, value: object) -> None:
    """A task is done."""
    backend.mailbox.receive(p.Results([id], bytes([p.VALUE]), [dumps(value)]))


def raised(backend: Backend, id: int, error: Exception) -> None:
    backend.mailbox.receive(p.Results([id], bytes([p.ERROR]), [dump_error(error)]))


def sizes(backend: Backend) -> list[int]:
    """Of the chunks that were submitted since the last look; 0: no chunk, but a single call."""
    return [len(args[0]) if isinstance(args[0], list | tuple) else 0 for _, args in sent(backend)]


# --- Results --------------------------------------------------------------------------------------


def test_a_chunk_whose_time_was_up_is_cut_anew(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    result = pool.map_async(tasks.echo, range(40))
    assert sizes(backend) == [10] * 4
    returned(backend, 1, ([0, 1, 2, 3], {}))
    assert sizes(backend) == [2, 2, 2]  # of half of what the time was enough for
    returned(backend, 2, ([10], {}))
    assert sizes(backend) == [0] * 9
    for id, start in ((3, 20), (4, 30)):
        returned(backend, id, (list(range(start, start + 10)), {}))
    assert sizes(backend) == []
    for id, start in ((5, 4), (6, 6), (7, 8)):
        returned(backend, id, ([start, start + 1], {}))
    for id, value in zip(range(8, 17), range(11, 20)):
        assert not result.ready()
        returned(backend, id, value)
    assert result.ready()
    assert result.get() == list(range(40))


def test_the_first_error_in_order_is_raised(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    result = pool.map_async(tasks.echo, range(6), 2)
    backend.drain()
    returned(backend, 3, ([None, 5], {0: dump_error(ValueError("of 4"))}))
    returned(backend, 1, ([0, None], {1: dump_error(ValueError("of 1"))}))
    assert not result.ready()
    raised(backend, 2, KeyError("of 2 and 3"))
    assert not result.successful()
    with pytest.raises(ValueError, match="of 1") as caught:
        result.get()
    assert type(caught.value.__cause__) is RemoteTraceback


def test_an_error_before_the_time_was_up(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    result = pool.map_async(tasks.echo, range(8))
    assert sizes(backend) == [2] * 4
    returned(backend, 1, ([None], {0: dump_error(ValueError("slow and bad"))}))
    assert sizes(backend) == [0]
    for id in (2, 3, 4):
        returned(backend, id, ([0, 0], {}))
    returned(backend, 5, 1)
    with pytest.raises(ValueError, match="slow and bad"):
        result.get(0)


def test_a_callback_that_raises_is_logged(
    pool: Pool, backends: list[Backend], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("concurrent.futures").propagate = True
    seen: list[int] = []

    def call(value: int) -> None:
        seen.append(value)
        raise SystemExit("in a callback")

    results = [pool.apply_async(tasks.echo, (n,), callback=call) for n in range(2)]
    mapped = pool.map_async(tasks.echo, [2], callback=call)  # type: ignore[arg-type]
    backends[0].drain()
    for id in (1, 2, 3):
        returned(backends[0], id, id - 1)
    assert [result.get(0) for result in (*results, mapped)] == [0, 1, [2]]
    assert seen == [0, 1, [2]]
    assert caplog.text.count("exception calling callback") == 3


def test_a_result_shows_its_state(pool: Pool, backends: list[Backend]) -> None:
    result: AsyncResult[int] = pool.apply_async(tasks.echo, (1,))
    assert repr(result) == "<achilles.pool_calls.AsyncResult under way>"
    backends[0].drain()
    returned(backends[0], 1, 1)
    assert repr(result) == "<achilles.pool_calls.AsyncResult successful>"
    failed = pool.map_async(tasks.echo, [tasks.Unpicklable()])
    assert repr(failed) == "<achilles.pool_calls.MapResult failed>"


def test_errors_are_those_of_the_standard_library(pool: Pool, backends: list[Backend]) -> None:
    result = pool.apply_async(tasks.echo, (tasks.Unpicklable(),))
    with pytest.raises(TypeError, match="will not be pickled"):
        result.get(0)
    with pytest.raises(TypeError, match="will not be pickled") as caught:
        result.get(0)
    notes = getattr(caught.value, "__notes__", ["argument 1 ('value') of echo()"])
    assert len(notes) == 1
    assert "argument 1 ('value') of echo()" in notes[0]
    assert not isinstance(caught.value, ArgumentPickleError)
    returned_badly = pool.apply_async(tasks.echo)
    backends[0].drain()
    status, payload = dump_result(tasks.Unpicklable(), tasks.echo)
    backends[0].mailbox.receive(p.Results([1], bytes([status]), [payload]))  # type: ignore[list-item]
    with pytest.raises(MaybeEncodingError, match="the value returned by echo") as encoding:
        returned_badly.get(0)
    assert isinstance(encoding.value.__cause__, ResultPickleError)


def test_terminating_fails_what_is_under_way(pool: Pool, backends: list[Backend]) -> None:
    seen: list[Any] = []
    calls = {"callback": seen.append, "error_callback": seen.append}
    started = pool.apply_async(tasks.echo, (1,), **calls)  # type: ignore[arg-type]
    backends[0].drain()
    backends[0].mailbox.receive(p.Running([1]))
    waiting = pool.apply_async(tasks.echo, (2,), **calls)  # type: ignore[arg-type]
    mapped = pool.map_async(tasks.echo, range(8))
    iterated = pool.imap(tasks.echo, Source())
    wait_until(lambda: backends[0].mailbox.unresolved == 6 + WINDOW_MIN, "all is submitted")
    pool.terminate()
    for result in (started, waiting, mapped):
        with pytest.raises(TerminatedError, match="terminated"):
            result.get(BOUND)
    for _ in range(WINDOW_MIN + 1):  # the last one says that there would have been more
        with pytest.raises(TerminatedError, match="terminated"):
            iterated.next(BOUND)
    with pytest.raises(StopIteration):
        iterated.next(BOUND)
    assert seen == []


def test_terminating_in_the_middle_of_a_call(pool: Pool) -> None:
    class Ending:
        def __reduce__(self) -> Any:
            pool.terminate()
            return int, ()

    with pytest.raises(TerminatedError):
        pool.apply_async(tasks.echo, (Ending(),)).get(0)


def test_a_closed_pool_ends_with_its_last_call(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    result = pool.map_async(tasks.echo, range(8))
    pool.close()
    backend.drain()
    for id in (1, 2, 3):
        returned(backend, id, ([0, 0], {}))
    returned(backend, 4, ([0], {}))
    assert not backend.mailbox.is_closing
    backend.drain()
    returned(backend, 5, 0)
    assert result.get(0) == [0] * 8
    assert backend.mailbox.is_closing


# --- Iterators ------------------------------------------------------------------------------------


def test_results_in_order_and_as_they_come(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    ordered = pool.imap(tasks.echo, "ab")
    wait_until(lambda: sizes(backend) == [0, 0] or backend.mailbox.unresolved == 2)
    unordered = pool.imap_unordered(tasks.echo, "cd")
    wait_until(lambda: backend.mailbox.unresolved == 4)
    backend.drain()
    returned(backend, 2, "b")
    with pytest.raises(multiprocessing.TimeoutError):
        ordered.next(0)
    returned(backend, 1, "a")
    assert [ordered.next(0), ordered.next(0)] == ["a", "b"]
    returned(backend, 4, "d")
    assert unordered.next(0) == "d"
    with pytest.raises(multiprocessing.TimeoutError):
        unordered.next(0.001)
    returned(backend, 3, "c")
    assert list(unordered) == ["c"]
    assert list(ordered) == []


def test_a_failed_chunk_fails_each_of_its_calls(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    results = pool.imap(tasks.echo, range(5), 2)
    wait_until(lambda: backend.mailbox.unresolved == 3)
    assert sizes(backend) == [2, 2, 0]
    raised(backend, 1, KeyError("lost"))
    returned(backend, 2, ([2, None], {1: dump_error(ValueError("of 3"))}))
    returned(backend, 3, 4)
    outcomes: list[object] = []
    for _ in range(5):
        try:
            outcomes.append(results.next(BOUND))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes == [KeyError, KeyError, 2, ValueError, 4]
    with pytest.raises(StopIteration):
        results.next(0)


class Source:
    """An endless input that says how much of it was read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> int:
        self.read += 1
        return self.read - 1


def test_the_input_is_read_up_to_a_window(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    source = Source()
    results = pool.imap(tasks.echo, source)
    ids = itertools.count(1)

    def answer(count: int) -> None:
        backend.drain()
        for id in itertools.islice(ids, count):
            returned(backend, id, id - 1)

    wait_until(lambda: backend.mailbox.unresolved == WINDOW_MIN, "the window is full")
    answer(WINDOW_MIN)
    half = WINDOW_MIN // 2
    assert [next(results) for _ in range(half - 1)] == list(range(half - 1))
    assert source.read == WINDOW_MIN
    assert next(results) == half - 1
    wait_until(lambda: backend.mailbox.unresolved == half, "half of the window was submitted")
    assert source.read == WINDOW_MIN + half
    reference = weakref.ref(results)
    del results
    gc.collect()
    assert reference() is None  # and from here on only what is under way counts
    wait_until(lambda: backend.mailbox.unresolved == WINDOW_MIN, "more was submitted")
    read = source.read
    answer(WINDOW_MIN)
    wait_until(lambda: source.read > read, "more was submitted")
    assert backend.mailbox.unresolved <= WINDOW_MIN


def test_terminating_does_not_wait_for_the_input(pool: Pool, backends: list[Backend]) -> None:
    gate = threading.Event()

    def inputs() -> Iterator[int]:
        yield 1
        assert gate.wait(BOUND)
        yield 2

    results = pool.imap(tasks.echo, inputs())
    wait_until(lambda: backends[0].mailbox.unresolved == 1)
    pool.close()
    joining = threading.Thread(target=pool.join)
    joining.start()
    pool.terminate()
    pool.join()
    joining.join(BOUND)
    assert not joining.is_alive()
    for _ in range(2):
        with pytest.raises(TerminatedError):
            results.next(0)
    with pytest.raises(StopIteration):
        results.next(0)
    gate.set()
    wait_until(lambda: not _threads(), "the input's thread ends")


def test_joining_reads_on_without_a_reader(pool: Pool, backends: list[Backend]) -> None:
    (backend,) = backends
    results = pool.imap(tasks.echo, range(3 * WINDOW_MIN))
    wait_until(lambda: backend.mailbox.unresolved == WINDOW_MIN)
    pool.close()
    joining = threading.Thread(target=pool.join)
    joining.start()

    def is_joined() -> bool:
        for id in backend.drain()[0]:
            returned(backend, id, id)
        return not joining.is_alive()

    wait_until(is_joined, "all was submitted and answered")
    assert len(list(results)) == 3 * WINDOW_MIN


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "achilles-imap"]
