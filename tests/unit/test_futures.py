from __future__ import annotations

import concurrent.futures
import gc
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest

from achilles.futures import Future, MapRun, as_completed

FUTURES = 300
ROUNDS = 30


class Owner:
    """Remembers what it was told; callbacks run where they are called."""

    def __init__(self) -> None:
        self.cancels: list[int] = []
        self.called_back: list[Future] = []
        self.takes_callbacks = False

    def cancelled(self, ids: list[int]) -> None:
        self.cancels += ids

    def call_back(self, future: Future) -> bool:
        self.called_back.append(future)
        return self.takes_callbacks


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def future(owner: Owner) -> Future:
    return Future(owner, 7, "f")


@pytest.fixture
def fast_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_a_value(future: Future) -> None:
    assert not future.done()
    assert future.start()
    assert future.running()
    assert future.resolve(5, None)
    assert (future.result(), future.exception(), future.done()) == (5, None, True)
    assert not future.running()
    assert not future.cancel()


def test_an_error(future: Future) -> None:
    error = LookupError("gone")
    assert future.resolve(None, error)
    assert future.exception() is error
    with pytest.raises(LookupError):
        future.result()


def test_the_first_outcome_stands(future: Future) -> None:
    assert future.resolve(1, None)
    assert not future.resolve(2, None)
    assert not future.start()
    assert future.result() == 1


def test_the_first_outcome_stands_for_those_who_watch(future: Future) -> None:
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0)
    assert future.resolve(1, None)
    assert not future.resolve(2, None)
    assert future.result() == 1


def test_cancel_tells_the_owner_once(future: Future, owner: Owner) -> None:
    assert future.cancel()
    assert future.cancel()
    assert owner.cancels == [7]
    assert future.cancelled()
    assert not future.start()
    assert not future.resolve(1, None)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    assert concurrent.futures.wait([future], 0).done == {future}


def test_withdraw_tells_nobody(future: Future, owner: Owner) -> None:
    assert future.withdraw()
    assert not future.withdraw()
    assert owner.cancels == []
    assert future.cancelled()


def test_what_runs_cannot_be_cancelled(future: Future, owner: Owner) -> None:
    assert future.start()
    assert future.start()
    assert not future.cancel()
    assert owner.cancels == []


def test_callbacks_go_by_the_owner(future: Future, owner: Owner) -> None:
    owner.takes_callbacks = True
    called: list[Any] = []
    future.add_done_callback(called.append)
    future.resolve(1, None)
    assert owner.called_back == [future]
    assert called == []
    future._invoke_callbacks_here()
    assert called == [future]
    future.add_done_callback(called.append)
    assert called == [future, future]


def test_no_condition_is_made_for_those_who_come_late(future: Future, owner: Owner) -> None:
    future.start()
    future.resolve(1, None)
    assert owner.called_back == []
    assert not isinstance(future._condition, threading.Condition)
    assert concurrent.futures.wait([future]).done == {future}
    assert list(as_completed([future])) == [future]


def test_the_standard_setters_work_too(owner: Owner) -> None:
    done, failed = Future(owner, 1, "f"), Future(owner, 2, "f")
    done.set_result(1)
    failed.set_exception(LookupError())
    assert done.result() == 1
    assert isinstance(failed.exception(), LookupError)
    with pytest.raises(concurrent.futures.InvalidStateError):
        done.set_result(2)


def test_repr_and_attributes(future: Future) -> None:
    assert repr(future).endswith("state=pending>")
    future.resolve(1, None)
    assert repr(future).endswith("state=finished returned int>")
    future.mark = 1  # type: ignore[attr-defined]


@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("how", ["wait", "as_completed", "many", "result", "callbacks", "cancel"])
def test_outcomes_that_come_while_others_look(owner: Owner, how: str) -> None:
    """`wait` and `as_completed` hold the conditions of all, and look at each state twice."""
    for _ in range(ROUNDS):
        futures = [Future(owner, id, "f") for id in range(FUTURES)]
        begin = threading.Event()

        def resolve(futures: list[Future] = futures, begin: threading.Event = begin) -> None:
            begin.wait()
            for n, future in enumerate(futures):
                future.start()
                future.resolve(n, None)

        thread = threading.Thread(target=resolve)
        thread.start()
        begin.set()
        _look(futures, how)
        thread.join()


def _look(futures: list[Future], how: str) -> None:
    if how == "wait":
        assert not concurrent.futures.wait(futures, 10).not_done
    elif how == "as_completed":
        assert len(list(as_completed(futures, 10))) == FUTURES
    elif how == "result":
        assert [future.result(10) for future in reversed(futures)] == list(reversed(range(FUTURES)))
    elif how == "callbacks":
        called: list[Any] = []
        for future in futures:
            future.add_done_callback(called.append)
        concurrent.futures.wait(futures, 10)
        for _ in range(1000):
            if len(called) == FUTURES:
                break
            threading.Event().wait(0.01)
        assert sorted(map(id, called)) == sorted(map(id, futures))
    elif how == "cancel":
        cancelled = {future for future in futures if future.cancel()}
        assert not concurrent.futures.wait(futures, 10).not_done
        assert {future for future in futures if future.cancelled()} == cancelled
    else:  # many threads, each with an order of its own
        left: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda part: left.extend(concurrent.futures.wait(part, 10)[1]), args=(part,)
            )
            for part in (futures, futures[::2], futures[1::2], futures[::3])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert left == []


# --- MapRun ---------------------------------------------------------------------------------------


def read(status: int, payload: Any) -> tuple[Any, BaseException | None]:
    return (payload, None) if not status else (None, payload)


def test_items_are_taken_in_any_order() -> None:
    run = MapRun(read)
    for index in (2, 0, 1):
        run.put(index, 0, f"value {index}")
        run.notify()
    assert [run.take(index, None) for index in range(3)] == ["value 0", "value 1", "value 2"]


def test_an_item_that_failed() -> None:
    run = MapRun(read)
    run.put(0, 1, LookupError("gone"))
    with pytest.raises(LookupError, match="gone"):
        run.take(0, None)


def test_an_item_that_does_not_come_in_time() -> None:
    run = MapRun(read)
    start = monotonic()
    with pytest.raises(concurrent.futures.TimeoutError):
        run.take(0, start + 0.05)
    assert 0.04 < monotonic() - start < 2
    run.put(0, 0, "late")
    run.notify()
    assert run.take(0, start) == "late"


@pytest.mark.usefixtures("fast_switches")
def test_items_that_come_while_they_are_waited_for() -> None:
    run = MapRun(read)

    def put() -> None:
        for index in range(5000):
            run.put(index, 0, index)
            run.notify()

    thread = threading.Thread(target=put)
    thread.start()
    assert [run.take(index, monotonic() + 10) for index in range(5000)] == list(range(5000))
    thread.join()


def test_an_error_is_not_kept_by_its_own_traceback() -> None:
    run = MapRun(read)
    run.put(0, 1, LookupError("gone"))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(LookupError) as caught:
            run.take(0, None)
        frames = []
        traceback = caught.value.__traceback__
        while traceback is not None:
            frames.append(traceback.tb_frame)
            traceback = traceback.tb_next
        assert "error" not in frames[-1].f_locals
    finally:
        gc.enable()


def test_as_completed_takes_a_generator(owner: Owner) -> None:
    futures = [Future(owner, id, "f") for id in range(3)]
    for future in futures:
        future.resolve(1, None)
    assert set(as_completed(iter(futures))) == set(futures)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(as_completed([Future(owner, 9, "f")], timeout=0.01))
