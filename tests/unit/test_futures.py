from __future__ import annotations

import concurrent.futures
import gc
import itertools
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any

import pytest

from achilles.futures import Future, MapRun, UnorderedRun, as_completed
from achilles.runtime.wakeups import Wakeup
from tests.modes import wait_until

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

    def wake_soon(self, sleepers: Iterable[Wakeup]) -> None:
        for sleeper in sleepers:
            sleeper.wake()


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


def test_who_only_looks_does_not_sleep(future: Future) -> None:
    """`wait` holds thousands of them."""
    assert concurrent.futures.wait([future], 0).not_done == {future}
    assert future._condition._sleepers == ()


class Sleeper:
    """A thread that waits for the outcome; made when it sleeps."""

    def __init__(self, future: Future, ask: Callable[[], Any]) -> None:
        self._answer: Any = None
        before = len(future._condition._sleepers)
        self._thread = threading.Thread(target=self._run, args=(ask,))
        self._thread.start()
        wait_until(lambda: len(future._condition._sleepers) > before)

    def _run(self, ask: Callable[[], Any]) -> None:
        try:
            self._answer = ask()
        except BaseException as error:
            self._answer = error

    def answer(self) -> Any:
        self._thread.join(10)
        assert not self._thread.is_alive(), "it was never woken"
        return self._answer


def test_all_who_sleep_are_woken(future: Future) -> None:
    asked = [future.result, lambda: future.result(20), future.exception, lambda: future.result()]
    sleepers = [Sleeper(future, ask) for ask in asked]
    future.resolve(5, None)
    assert [sleeper.answer() for sleeper in sleepers] == [5, 5, None, 5]


def test_a_cancellation_wakes(future: Future) -> None:
    sleeper = Sleeper(future, future.result)
    future.cancel()
    assert isinstance(sleeper.answer(), concurrent.futures.CancelledError)


def test_the_standard_setters_wake(future: Future) -> None:
    sleeper = Sleeper(future, future.result)
    future.set_result(5)
    assert sleeper.answer() == 5


@pytest.mark.parametrize("timeout", [0, -1, 0.001, float("nan"), float("-inf")])
def test_who_has_given_up_does_not_sleep_any_more(future: Future, timeout: float) -> None:
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout)
    assert future._condition._sleepers == ()


@pytest.mark.parametrize("timeout", [1e20, float("inf")])
def test_no_timeout_beyond_what_locks_take(future: Future, timeout: float) -> None:
    """As the standard's: None is for ever."""
    with pytest.raises(OverflowError):
        future.result(timeout)
    assert future._condition._sleepers == ()


def test_a_signal_handler_may_wait_while_its_thread_sleeps(owner: Owner) -> None:
    """It sleeps on something of its own, so that it takes nothing from who it interrupts."""
    outer, inner = Future(owner, 1, "f"), Future(owner, 2, "f")

    def handle(signum: int, frame: object) -> None:
        outer.resolve(1, None)  # before the inner one, and it is not asleep for it
        inner_thread.start()
        assert inner.result() == 2

    inner_thread = threading.Thread(target=lambda: inner.resolve(2, None))
    before = signal.signal(signal.SIGUSR1, handle)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: bool(outer._condition._sleepers))
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        assert outer.result(20) == 1
    finally:
        thread.join()
        inner_thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_two_who_ask_at_once_share_a_condition(owner: Owner) -> None:
    """Whoever comes second, with one of his own in his hands, takes the first one's."""
    future = Future(owner, 1, "f")
    first = future._condition
    del future.__dict__["_condition"]
    assert future._condition is first
    waiters = future._waiters
    assert future.__dict__["_waiters"] is waiters


def test_the_standard_setters_work_too(owner: Owner) -> None:
    done, failed = Future(owner, 1, "f"), Future(owner, 2, "f")
    done.set_result(1)
    failed.set_exception(LookupError())
    assert done.result() == 1
    assert isinstance(failed.exception(), LookupError)
    with pytest.raises(concurrent.futures.InvalidStateError):
        done.set_result(2)


def test_what_is_abandoned_has_failed(owner: Owner) -> None:
    """In a forked child."""
    waiting, cancelled, done = (Future(owner, id, "f") for id in range(3))
    waiting._condition.acquire()
    cancelled.cancel()
    done.resolve(1, None)
    for future in (waiting, cancelled, done):
        future.abandon(LookupError("of the parent"))
    with pytest.raises(LookupError, match="of the parent"):
        waiting.result(0)
    assert cancelled.cancelled()
    assert done.result(0) == 1
    assert concurrent.futures.wait([waiting, cancelled, done], 0).not_done == set()


def test_who_sleeps_for_what_is_abandoned_sleeps_no_more(future: Future) -> None:
    """In a forked child the only thread may have forked in a signal's handler, while it slept."""
    sleeper = Sleeper(future, future.result)
    (wakeup,) = future._condition._sleepers
    future.abandon(LookupError("of the parent"))
    wakeup.wake()  # as the fork does
    assert isinstance(sleeper.answer(), LookupError)


def test_repr_and_attributes(future: Future) -> None:
    assert repr(future).startswith("<Future of task 7, f(), at 0x")
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
    assert [run.take(run.wait(None)) for _ in range(3)] == ["value 0", "value 1", "value 2"]


def test_an_item_that_failed() -> None:
    run = MapRun(read)
    run.put(0, 1, LookupError("gone"))
    with pytest.raises(LookupError, match="gone"):
        run.take(run.wait(None))


def test_an_item_that_does_not_come_in_time() -> None:
    run = MapRun(read)
    start = monotonic()
    with pytest.raises(concurrent.futures.TimeoutError):
        run.wait(start + 0.05)
    assert 0.04 < monotonic() - start < 2
    run.put(0, 0, "late")
    run.notify()
    assert run.take(run.wait(start)) == "late"


@pytest.mark.usefixtures("fast_switches")
def test_items_that_come_while_they_are_waited_for() -> None:
    run = MapRun(read)

    def put() -> None:
        for index in range(5000):
            run.put(index, 0, index)
            run.notify()

    thread = threading.Thread(target=put)
    thread.start()
    assert [run.take(run.wait(monotonic() + 10)) for _ in range(5000)] == list(range(5000))
    thread.join()


def test_an_error_is_not_kept_by_its_own_traceback() -> None:
    run = MapRun(read)
    run.put(0, 1, LookupError("gone"))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(LookupError) as caught:
            run.take(run.wait(None))
        frames = []
        traceback = caught.value.__traceback__
        while traceback is not None:
            frames.append(traceback.tb_frame)
            traceback = traceback.tb_next
        assert "error" not in frames[-1].f_locals
    finally:
        gc.enable()


def test_items_are_taken_as_they_come() -> None:
    run = UnorderedRun(read)
    for index in (2, 0):
        run.put(index, 0, f"value {index}")
        run.notify()
    run.put(1, 1, LookupError("gone"))
    assert [run.take(run.wait(None)) for _ in range(2)] == ["value 2", "value 0"]
    index = run.wait(None)
    assert index == 1
    with pytest.raises(LookupError, match="gone"):
        run.take(index)
    with pytest.raises(concurrent.futures.TimeoutError):
        run.wait(monotonic() + 0.01)


@pytest.mark.usefixtures("fast_switches")
def test_items_that_come_in_any_order_while_they_are_waited_for() -> None:
    run = UnorderedRun(read)

    def put(start: int) -> None:
        for index in range(start, 6000, 2):
            run.put(index, 0, index)
            run.notify()

    threads = [threading.Thread(target=put, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    taken = [run.take(run.wait(monotonic() + 10)) for _ in range(6000)]
    assert sorted(taken) == list(range(6000))
    for thread in threads:
        thread.join()


# --- as_completed ---------------------------------------------------------------------------------


def make_futures(owner: Owner, *states: str) -> list[Future]:
    """Futures that are ``done``, or not."""
    futures = [Future(owner, id, "f") for id in range(len(states))]
    for future, state in zip(futures, states):
        if state == "done":
            future.resolve(1, None)
    return futures


def test_as_completed_of_a_collection(owner: Owner) -> None:
    waiting, done, other = make_futures(owner, "not", "done", "done")
    found = as_completed([waiting, done, done, other], timeout=0.01)
    assert {next(found), next(found)} == {done, other}
    with pytest.raises(concurrent.futures.TimeoutError, match=r"1 \(of 3\) futures unfinished"):
        next(found)


def test_as_completed_of_an_iterator(owner: Owner) -> None:
    futures = make_futures(owner, "not", "done", "not", "done")
    found = as_completed(iter(futures), timeout=10)
    assert [next(found), next(found)] == [futures[1], futures[3]]
    futures[2].cancel()
    assert next(found) is futures[2]
    futures[0].resolve(None, LookupError())
    assert list(found) == [futures[0]]
    assert list(as_completed(iter(()))) == []


def test_as_completed_takes_no_more_than_it_needs(owner: Owner) -> None:
    """The first that is done is yielded before the next is taken, and a buffer builds up."""
    made: list[Future] = []

    def submit() -> Iterator[Future]:
        while True:
            made.append(Future(owner, len(made), "f"))
            if len(made) != 3:
                made[-1].resolve(1, None)
            yield made[-1]

    found = as_completed(submit(), buffersize=5)
    taken = []
    for _ in range(10):
        next(found)
        taken.append(len(made))
    assert taken == [2, 4, 6, 8, 9, 10, 11, 12, 13, 14]
    assert len(made[2]._waiters) == 1  # which is waited for
    found.close()  # type: ignore[attr-defined]
    assert made[2]._waiters == []


def test_as_completed_fills_its_buffer_while_nothing_is_done(owner: Owner) -> None:
    made: list[Future] = []

    def submit() -> Iterator[Future]:
        while True:
            made.append(Future(owner, len(made), "f"))
            yield made[-1]

    found = as_completed(submit(), timeout=0.01, buffersize=7)
    with pytest.raises(concurrent.futures.TimeoutError, match=r"7 \(of 7\) futures unfinished"):
        next(found)
    assert len(made) == 7
    assert [future._waiters for future in made] == [[]] * 7


def test_as_completed_of_an_iterator_that_repeats_itself(owner: Owner) -> None:
    waiting, done = make_futures(owner, "not", "done")
    assert list(as_completed(iter([done, done]))) == [done]
    waiting.start()
    threading.Timer(0.05, waiting.resolve, (1, None)).start()
    found = as_completed(itertools.repeat(waiting), timeout=10)
    assert [next(found), next(found)] == [waiting, waiting]


def test_as_completed_when_the_iterator_raises(owner: Owner) -> None:
    waiting = Future(owner, 1, "f")

    def submit() -> Iterator[Future]:
        yield waiting
        raise LookupError("of the input")

    with pytest.raises(LookupError, match="of the input"):
        next(as_completed(submit()))
    assert waiting._waiters == []


def test_as_completed_of_what_is_no_future(owner: Owner) -> None:
    """An error, as with the standard's, and not the end."""
    waiting = Future(owner, 1, "f")
    with pytest.raises(AttributeError):
        next(as_completed(iter([waiting, None])))  # type: ignore[arg-type]
    assert waiting._waiters == []


def test_as_completed_keeps_nothing_that_it_has_yielded(owner: Owner) -> None:
    futures = (make_futures(owner, "done").pop() for _ in range(5))
    for future in as_completed(futures, buffersize=1):
        reference = weakref.ref(future)
        del future
        assert reference() is None


def test_as_completed_waits_for_others_kinds_of_futures(owner: Owner) -> None:
    ours, theirs = Future(owner, 1, "f"), concurrent.futures.Future[int]()
    found = as_completed(iter([ours, theirs]), timeout=10)
    threading.Timer(0.02, theirs.set_result, (2,)).start()
    assert next(found) is theirs
    threading.Timer(0.02, ours.resolve, (1, None)).start()
    assert next(found) is ours


def test_as_completed_needs_a_buffer(owner: Owner) -> None:
    with pytest.raises(ValueError, match="buffersize must be > 0"):
        as_completed(iter(()), buffersize=0)


@pytest.mark.usefixtures("fast_switches")
def test_as_completed_of_an_iterator_while_outcomes_come(owner: Owner) -> None:
    for _ in range(ROUNDS):
        futures = [Future(owner, id, "f") for id in range(FUTURES)]

        def resolve(futures: list[Future] = futures) -> None:
            for n, future in enumerate(futures):
                future.start()
                future.resolve(n, None)

        thread = threading.Thread(target=resolve)
        thread.start()
        found = list(as_completed(iter(futures), 10, buffersize=20))
        assert sorted(map(id, found)) == sorted(map(id, futures))
        thread.join()
