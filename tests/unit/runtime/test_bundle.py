"""What a bundle of calls returns: each outcome as if its call had been alone."""

from __future__ import annotations

import os
import pickle
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from achilles.runtime import bundle, context
from achilles.runtime.bundle import BYTES_MAX, TASK_ID, TEXT_MAX, Bundle, sealed
from achilles.runtime.seal import ONCE_SIZE, TAG_SIZE, Seal
from achilles.runtime.seal import PARTS as PARTS_LETTER
from achilles.runtime.serialize import ERROR, VALUE, load_outcome, loads
from achilles.runtime.side import PARTS
from tests import tasks


class Side:
    """A side channel that keeps what is written to it."""

    def __init__(self) -> None:
        self.letters: deque[tuple[int, int, bytes]] = deque()
        self.has_come = threading.Event()

    def send(self, kind: int, client: int, body: bytes) -> None:
        self.letters.append((kind, client, body))
        self.has_come.set()


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Side:
    side = Side()
    monkeypatch.setattr(context, "side", side)
    monkeypatch.setattr(context, "client", 7)
    return side


def run(
    fn: Callable[..., Any], flat: list[Any], width: int = 1
) -> tuple[list[Any], dict[int, Any]]:
    return Bundle(fn)(flat, width, 1)


def test_values_of_one_and_of_more_arguments() -> None:
    assert run(tasks.add, [1, 2, 3]) == ([2, 3, 4], {})
    assert run(tasks.add, [1, 2, 3, 4], 2) == ([3, 7], {})
    assert run(str, [1, None]) == (["1", "None"], {})


def test_what_one_raises_is_its_own() -> None:
    values, others = run(tasks.fail_at, [1, 2, 2, 2, 3, 2], 2)
    assert values == [1, None, 3]
    assert list(others) == [1]
    status, payload = others[1]
    assert status == ERROR
    _, error = load_outcome(status, payload)
    assert error is not None
    assert repr(error) == "ValueError('bad 2')"
    assert "fail_at" in str(error.__cause__)
    assert "bundle.py" not in str(error.__cause__)


def test_an_index_error_of_a_call_does_not_end_the_bundle() -> None:
    values, others = run([5, 6].__getitem__, [0, 9, 1])
    assert values == [5, None, 6]
    assert list(others) == [1]


def test_what_ends_a_process_is_an_error_of_its_call_too() -> None:
    values, others = run(tasks.exit_with, [3, 4])
    assert values == [None, None]
    assert isinstance(load_outcome(*others[1])[1], SystemExit)


def test_what_cannot_be_pickled_is_an_error_of_its_own() -> None:
    def some(value: int) -> Any:
        return threading.Lock() if value == 2 else value

    values, others = run(some, [1, 2, 3])
    assert values == [1, None, 3]
    assert others[1][0] == ERROR


def test_results_are_what_they_were_when_they_were_returned() -> None:
    kept: list[int] = []

    def grow(value: int) -> list[int]:
        kept.append(value)
        return kept

    values, others = run(grow, [1, 2, 3])
    assert values == [None] * 3
    assert [load_outcome(*others[at])[0] for at in range(3)] == [[1], [1, 2], [1, 2, 3]]
    assert {status for status, _ in others.values()} == {VALUE}


def test_long_texts_are_pickled_by_themselves() -> None:
    values, others = run(str, ["x" * TEXT_MAX, "x" * (TEXT_MAX + 1)])
    assert values == ["x" * TEXT_MAX, None]
    assert load_outcome(*others[1])[0] == "x" * (TEXT_MAX + 1)


@pytest.mark.parametrize("size", [TEXT_MAX, BYTES_MAX])
def test_it_stops_when_results_are_much(size: int) -> None:
    values, _ = run(tasks.zeros, [size] * 1000)
    assert BYTES_MAX <= len(values) * (size + 20) <= BYTES_MAX + 2 * size + 20 * len(values)


def test_a_fork_of_a_call_goes_no_further() -> None:
    read, write = os.pipe()

    def fork(value: int) -> int:
        return os.fork() if value == 1 else value

    values, _ = run(fork, [0, 1, 2])
    if values == [0]:  # the child: the runner would end it
        os.write(write, b"child")
        os._exit(0)
    os.waitpid(values[1], 0)
    assert os.read(read, 100) == b"child"
    assert values[2] == 2
    os.close(read)
    os.close(write)


def test_what_waits_behind_a_long_call_is_taken_back_and_told(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "STUCK_SECONDS", 0.0)

    def slow(value: int) -> Any:
        if value == 3:
            assert side.has_come.wait(30)
        return [value] if value == 1 else value

    values, others = Bundle(slow)([0, 1, 2, 3, 4, 5], 1, 9)
    kind, client, body = side.letters.popleft()
    assert not side.letters
    assert (kind, client, TASK_ID.unpack_from(body)) == (PARTS, 7, (9,))
    done, done_others, end = loads(body[TASK_ID.size :])
    assert len(values) == end
    assert values[:1] == [0]
    assert done == values[: len(done)]
    assert done_others == {at: others[at] for at in others if at < len(done)}


def test_a_bundle_that_ends_in_time_tells_nothing(side: Side) -> None:
    Bundle(tasks.add)([1, 2], 1, 9)
    assert not side.letters


def test_a_thread_looks_after_bundles_while_they_come(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all of them, which ends when it has looked in vain some times; then the next."""
    watcher = bundle._Watcher()
    monkeypatch.setattr(bundle, "_watcher", watcher)
    may_look = threading.Semaphore(0)
    monkeypatch.setattr(bundle, "sleep", lambda seconds: may_look.acquire(timeout=30))
    threads: list[threading.Thread] = []

    def start(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        threads.append(threading.Thread(target=function, args=args, daemon=True))
        threads[-1].start()

    monkeypatch.setattr(bundle, "start_new_thread", start)
    for _ in range(20):
        run(tasks.add, [1, 2])
    assert len(threads) == 1
    may_look.release(2 * bundle.LOOKS)
    threads[0].join(30)
    assert not threads[0].is_alive()
    monkeypatch.setattr(bundle, "STUCK_SECONDS", 0.0)

    def slow(value: int) -> int:
        if value == 1:
            assert side.has_come.wait(30)
        return value

    for number in range(2):  # it ends when it has told of one, too
        values, _ = run(slow, [0, 1, 2])
        assert values == [0, 1, 2][: len(values)]
        threads[-1].join(30)
        assert len(side.letters) == number + 1
        assert len(threads) == number + 2
        side.has_come.clear()


def test_news_that_cannot_be_told_are_none(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is taken back all the same; and the next bundle's are told."""
    monkeypatch.setattr(bundle, "STUCK_SECONDS", 0.0)
    has_failed = threading.Event()

    def fail(value: object) -> bytes:
        has_failed.set()
        raise MemoryError

    def waits_for(event: threading.Event) -> Callable[[int], bool]:
        return lambda value: event.wait(30)

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "dumps", fail)
        assert run(waits_for(has_failed), [0, 1, 2])[0] in ([], [True])
        assert has_failed.wait(30)
    assert run(waits_for(side.has_come), [0, 1, 2])[0] in ([], [True])
    assert side.has_come.wait(30)


def test_a_letter_is_sealed_where_calls_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Seal(bytes(32))
    monkeypatch.setattr(context, "seal", seal)
    letter = sealed(b"news", b"r" * 16)
    once, tag = letter[:ONCE_SIZE], letter[ONCE_SIZE : ONCE_SIZE + TAG_SIZE]
    assert letter[ONCE_SIZE + TAG_SIZE :] == b"news"
    assert tag == seal.letter(PARTS_LETTER, b"r" * 16, once, b"news")
    assert sealed(b"news", b"r" * 16)[:ONCE_SIZE] != once


def test_it_travels_with_its_function() -> None:
    again = pickle.loads(pickle.dumps(Bundle(tasks.add)))
    assert again.fn is tasks.add
    assert repr(again).startswith("<Bundle of <function add")
