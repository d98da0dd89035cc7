"""What `submit` and its futures do, with every kind of executor."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import pickle
import threading
import time
import weakref
from concurrent.futures.process import _RemoteTraceback
from pathlib import Path
from typing import Any

import pytest

from tests import tasks
from tests.modes import (
    ALL,
    EMBEDDED,
    OURS,
    PROCESSES,
    STANDARD,
    THREADS,
    Maker,
    of_modes,
    wait_until,
)


@of_modes(*ALL)
def test_result(make: Maker) -> None:
    future = make().submit(tasks.add, 2, b=3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == 5
    assert future.result(timeout=0) == 5
    assert future.exception() is None
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert not future.cancel()


@of_modes(*ALL)
def test_every_keyword_is_the_functions(make: Maker) -> None:
    keywords = {
        name: name for name in ("fn", "self", "timeout", "args", "kwargs", "chunksize", "retries")
    }
    future = make().submit(tasks.capture, 1, **keywords)
    assert future.result() == ((1,), keywords)


@pytest.mark.bad_input(32)
@of_modes(*ALL)
def test_submit_needs_a_function(make: Maker) -> None:
    executor = make()
    with pytest.raises(TypeError):
        executor.submit()
    with pytest.raises(TypeError):
        executor.submit(fn=tasks.add, a=1)


@of_modes(*ALL)
@pytest.mark.parametrize(
    "value",
    [None, 0, "", b"", (), float("inf"), {"a": [1, (2,)]}, 2**200, "\udc80", b"x" * 100_000],
    ids=lambda value: repr(value)[:12],
)
def test_values_go_there_and_back(make: Maker, value: Any) -> None:
    assert make(1).submit(tasks.echo, value).result() == value


@of_modes(*ALL)
def test_callables_of_all_kinds(make: Maker) -> None:
    executor = make(1)
    calls: list[tuple[Any, tuple[Any, ...], Any]] = [
        (len, ("abc",), 3),
        (str.upper, ("abc",), "ABC"),
        ("abc".upper, (), "ABC"),
        (int, ("7",), 7),
        (functools.partial(tasks.add, 1), (2,), 3),
        (tasks.Adder(10), (1,), 11),
        (tasks.Adder(10).method, (1,), 11),
        (tasks.Adder, (), None),
    ]
    futures = [executor.submit(call, *args) for call, args, _ in calls]
    values = [future.result() for future in futures]
    assert values[:-1] == [value for _, _, value in calls[:-1]]
    assert isinstance(values[-1], tasks.Adder)


@pytest.mark.bad_input(68)
@of_modes(*STANDARD)
def test_arguments_are_copies(make: Maker) -> None:
    mutable = [1]
    adder = tasks.Adder()
    executor = make(1)
    assert executor.submit(list.append, mutable, 2).result() is None
    assert [executor.submit(adder, 1).result() for _ in range(3)] == [1, 1, 1]
    assert (mutable, adder.total) == ([1], 0)


@of_modes(*ALL)
def test_exception(make: Maker) -> None:
    future = make().submit(tasks.fail, "text")
    with pytest.raises(ValueError, match=r"\Atext\Z") as caught:
        future.result()
    assert future.exception() is caught.value
    assert caught.value.args == ("text",)


@of_modes(*STANDARD)
def test_exception_shows_the_remote_traceback(make: Maker) -> None:
    error = make().submit(tasks.fail, "text").exception()
    assert type(error.__cause__) is _RemoteTraceback
    assert "raise ValueError(text)  # a comment that the traceback shows" in error.__cause__.tb
    assert "tasks.py" in str(error.__cause__)


@pytest.mark.bad_input(14)
@of_modes(*STANDARD)
def test_exception_with_a_cause_of_its_own(make: Maker) -> None:
    error = make().submit(tasks.raise_chained).exception()
    assert type(error) is KeyError
    assert "the first" in str(error.__cause__)
    assert "the second" in str(error.__cause__)


@pytest.mark.bad_input(15)
@of_modes(*STANDARD)
@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (functools.partial(tasks.exit_with, 3), SystemExit),
        (tasks.interrupt, KeyboardInterrupt),
    ],
    ids=["SystemExit", "KeyboardInterrupt"],
)
def test_exits_are_outcomes(make: Maker, task: Any, kind: type[BaseException]) -> None:
    executor = make(1)
    error = executor.submit(task).exception()
    assert type(error) is kind
    assert error.args == ((3,) if kind is SystemExit else ("by the task itself",))
    assert executor.submit(tasks.add, 1).result() == 2


@pytest.mark.bad_input(35)
@of_modes(*OURS)
def test_a_future_as_an_argument_is_refused_with_what_to_pass_instead(make: Maker) -> None:
    executor = make()
    argument = executor.submit(tasks.add, 1)
    with pytest.raises(TypeError, match=r"future of add cannot be pickled.*pass its result\(\)"):
        pickle.dumps(argument)
    with pytest.raises(pickle.PicklingError, match=r"argument 1 .*pass its result\(\)"):
        executor.submit(tasks.echo, argument).result(20)
    assert argument.result(20) == 2


@of_modes(*STANDARD)
def test_what_cannot_be_pickled_fails_its_future_alone(make: Maker) -> None:
    executor = make()
    futures = [
        executor.submit(tasks.echo, tasks.Unpicklable()),
        executor.submit(tasks.echo, value=threading.Lock()),
        executor.submit(tasks.Unpicklable().__reduce__),
        executor.submit(tasks.return_unpicklable),
    ]
    for future in futures:
        with pytest.raises(Exception, match="pickle"):
            future.result()
    assert executor.submit(tasks.add, 1).result() == 2


@pytest.mark.bad_input(38)
@of_modes(*ALL)
def test_cancel(make: Maker) -> None:
    executor = make(1)
    running = executor.submit(tasks.pause, 0.3)
    waiting = [executor.submit(tasks.pause, 0.3) for _ in range(8)]
    wait_until(running.running, "the first task runs")
    assert not running.cancel()
    last = waiting[-1]
    assert last.cancel()
    assert last.cancel()
    assert last.cancelled()
    assert last.done()
    assert not last.running()
    with pytest.raises(concurrent.futures.CancelledError):
        last.result()
    with pytest.raises(concurrent.futures.CancelledError):
        last.exception()
    others = sum(future.cancel() for future in waiting[:-1])
    assert others >= 5  # ProcessPoolExecutor has two under way
    assert running.result() is None
    assert concurrent.futures.wait(waiting, 10).not_done == set()


@of_modes(*OURS)
def test_cancel_wakes_those_who_wait(make: Maker) -> None:
    executor = make(1)
    first = executor.submit(tasks.pause, 0.5)
    last = [executor.submit(tasks.pause, 0.5) for _ in range(8)][-1]
    woken = threading.Event()

    def wait_for_it() -> None:
        concurrent.futures.wait([last])
        woken.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert last.cancel()
    assert woken.wait(5)
    assert not first.done()
    thread.join()
    executor.shutdown(cancel_futures=True)


@of_modes(*ALL)
def test_timeout_of_result(make: Maker) -> None:
    future = make(1).submit(tasks.pause, 0.3, "value")
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout=0)
    assert future.result() == "value"


@of_modes(*ALL)
def test_callbacks(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    executor = make(1)
    seen: list[Any] = []
    is_over = threading.Event()

    def broken(_: object) -> None:
        raise RuntimeError("a broken callback")

    future = executor.submit(tasks.pause, 0.1)
    future.add_done_callback(lambda done: seen.append((1, done)))
    future.add_done_callback(broken)
    future.add_done_callback(lambda done: seen.append((2, done)))
    future.add_done_callback(lambda _: is_over.set())
    assert is_over.wait(10)
    assert seen == [(1, future), (2, future)]
    assert "a broken callback" in caplog.text
    future.add_done_callback(lambda _: seen.append(threading.current_thread()))
    assert seen[-1] is threading.current_thread()
    assert executor.submit(tasks.add, 1).result() == 2


@of_modes(*ALL)
def test_callback_of_a_cancelled_future(make: Maker) -> None:
    executor = make(1)
    [executor.submit(tasks.pause, 0.1) for _ in range(6)]
    last = executor.submit(tasks.pause, 0.1)
    called: list[Any] = []
    last.add_done_callback(called.append)
    assert last.cancel()
    assert called == [last]


@of_modes(*ALL)
def test_callback_submits(make: Maker) -> None:
    executor = make(1)
    found: list[Any] = []
    is_over = threading.Event()

    def proceed(future: concurrent.futures.Future[int]) -> None:
        if future.result() >= 20:
            is_over.set()
            return
        following = executor.submit(tasks.add, future.result())
        found.append(following)
        following.add_done_callback(proceed)

    executor.submit(tasks.add, 0).add_done_callback(proceed)
    assert is_over.wait(20)
    assert [future.result() for future in found] == list(range(2, 21))


@of_modes(*ALL)
def test_callbacks_have_run_when_shutdown_returns(make: Maker) -> None:
    called: list[int] = []

    def slow(future: concurrent.futures.Future[int]) -> None:
        time.sleep(0.1)
        called.append(future.result())

    with make(1) as executor:
        for n in range(3):
            executor.submit(tasks.pause, 0.05, n).add_done_callback(slow)
    assert called == [0, 1, 2]


@of_modes(*OURS)
def test_callback_that_shuts_down(make: Maker) -> None:
    executor = make(1)
    is_over = threading.Event()

    def end(_: object) -> None:
        executor.shutdown()
        is_over.set()

    executor.submit(tasks.add, 1).add_done_callback(end)
    assert is_over.wait(10)


@pytest.mark.bad_input(37)
@of_modes(*OURS)
def test_callback_that_raises_more_than_an_exception(make: Maker) -> None:
    executor = make(1)
    called: list[int] = []

    def leave(_: object) -> None:
        raise SystemExit(3)

    first = executor.submit(tasks.pause, 0.1)
    first.add_done_callback(leave)
    executor.submit(tasks.pause, 0.1, 5).add_done_callback(
        lambda done: called.append(done.result())
    )
    executor.shutdown()
    assert called == [5]


@pytest.mark.bad_input(37)
@of_modes(*OURS)
def test_callback_that_blocks_holds_up_nobody(make: Maker) -> None:
    executor = make(1)
    is_free = threading.Event()
    executor.submit(tasks.add, 0).add_done_callback(lambda _: is_free.wait(20))
    assert executor.submit(tasks.add, 1).result(timeout=10) == 2

    results: list[int] = []
    other = executor.submit(tasks.add, 1)  # and one may wait for another of the same executor
    other.add_done_callback(lambda _: results.append(executor.submit(tasks.add, 2).result(10)))
    is_free.set()
    wait_until(lambda: results == [3], "the callback has had its result")


@of_modes(*ALL)
def test_wait(make: Maker) -> None:
    executor = make(2)
    fast, slow = executor.submit(tasks.add, 1), executor.submit(tasks.pause, 0.4)
    done, not_done = concurrent.futures.wait(
        [fast, slow], return_when=concurrent.futures.FIRST_COMPLETED
    )
    assert (done, not_done) == ({fast}, {slow})
    done, not_done = concurrent.futures.wait([fast, slow], timeout=0.01)
    assert (done, not_done) == ({fast}, {slow})
    failing = executor.submit(tasks.fail)
    done, _ = concurrent.futures.wait(
        [slow, failing], return_when=concurrent.futures.FIRST_EXCEPTION
    )
    assert failing in done
    assert concurrent.futures.wait([fast, slow, failing]).not_done == set()


@of_modes(*ALL)
def test_as_completed(make: Maker) -> None:
    executor = make(2)
    list(executor.map(tasks.pause, [0.1] * 2))  # both of its processes have started
    slow = executor.submit(tasks.pause, 0.4)
    fast = [executor.submit(tasks.add, n) for n in range(5)]
    seen = list(concurrent.futures.as_completed([slow, *fast, *fast]))
    assert len(seen) == 6
    assert seen[-1] is slow
    late = executor.submit(tasks.pause, 0.3)
    with pytest.raises(concurrent.futures.TimeoutError, match=r"1 \(of 1\) futures unfinished"):
        list(concurrent.futures.as_completed([late], timeout=0.01))


@of_modes(*OURS)
def test_as_completed_with_futures_of_another_kind(make: Maker) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        ours, theirs = make(1).submit(tasks.add, 1), threads.submit(tasks.add, 2)
        done = concurrent.futures.as_completed(iter([ours, theirs]), timeout=10)
        assert {future.result() for future in done} == {2, 3}


@of_modes(*ALL)
def test_futures_take_attributes_and_are_keys(make: Maker) -> None:
    future = make(1).submit(tasks.add, 1)
    future.start_time = 1.5
    assert {future: "value"}[future] == "value"
    assert future.start_time == 1.5
    future.result()
    assert weakref.ref(future)() is future
    assert "state=finished returned int" in repr(future)


@of_modes(*STANDARD)
def test_nothing_keeps_the_arguments_alive(make: Maker) -> None:
    executor = make(1)
    argument = tasks.Adder()
    reference = weakref.ref(argument)
    future = executor.submit(tasks.echo, argument)
    del argument
    assert isinstance(future.result(), tasks.Adder)
    wait_until(lambda: reference() is None, "the argument is free")


@of_modes(*ALL)
def test_many_threads_share_an_executor(make: Maker) -> None:
    executor = make(2)
    sums: list[int] = []

    def use(start: int) -> None:
        futures = [executor.submit(tasks.add, start, n) for n in range(100)]
        sums.append(sum(future.result() for future in futures))

    threads = [threading.Thread(target=use, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sums) == [100 * start + 4950 for start in range(4)]


@of_modes(*OURS)
def test_lambdas_and_closures(make: Maker) -> None:
    """Beyond ProcessPoolExecutor, which refuses them."""
    base = 40
    executor = make(1)
    assert executor.submit(lambda n: base + n, 2).result() == 42
    assert list(executor.map(lambda n: base * n, range(3))) == [0, 40, 80]

    class Local:
        value = base

    assert executor.submit(lambda: Local().value).result() == 40


@of_modes(THREADS, PROCESSES, EMBEDDED)
def test_proxies_of_a_manager(make: Maker) -> None:
    executor = make(1)
    executor.submit(tasks.add, 1).result()  # the process may be there before the manager
    with multiprocessing.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        executor.submit(tasks.put, shared, "key", 5).result()
        assert dict(shared) == {"key": 5}
        if make.mode == THREADS:
            return  # it would keep the lock beyond its manager
        # Only the executor refers to that lock.
        other = make(1, initializer=tasks.set_state, initargs=(manager.Lock(),))
        assert other.submit(tasks.get_state).result() is not None
        other.shutdown()


@of_modes(THREADS, *STANDARD)
def test_tasks_run_at_once(make: Maker, tmp_path: Path) -> None:
    executor = make(2)
    for future in [executor.submit(tasks.meet, str(tmp_path / "notes"), 2) for _ in range(2)]:
        future.result(60)


@pytest.mark.bad_input(32)
@of_modes(*ALL)
@pytest.mark.parametrize("wrong", [5, None, "add"])
def test_what_is_no_function_fails_its_future(make: Maker, wrong: Any) -> None:
    executor = make(1)
    assert type(executor.submit(wrong).exception()) is TypeError
    results = executor.map(wrong, [1])
    with pytest.raises(TypeError, match=r"callable"):
        next(results)
    assert list(executor.map(wrong, [])) == []
    assert executor.submit(tasks.add, 1).result() == 2
