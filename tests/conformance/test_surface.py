"""What other programs look for on an executor and its futures,
and what they may do with them at odd moments.
"""

from __future__ import annotations

import concurrent.futures
import gc
import html.parser
import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.runtime.serialize import dumps
from tests import tasks
from tests.modes import ALL, CLUSTER, OURS, STANDARD, Maker, of_modes, wait_until


@of_modes(*ALL)
def test_max_workers_is_a_positive_integer(make: Maker) -> None:
    """dask asserts it, before any worker may be known; others size their queues by it."""
    for given in (None, 1, 3):
        executor = make(given)
        assert type(executor._max_workers) is int
        assert executor._max_workers == (given or executor._max_workers) >= 1
        if make.is_ours:
            assert executor.size == executor._max_workers


@of_modes(*OURS)
def test_it_is_mistaken_for_nothing_else(make: Maker) -> None:
    """A `_processes` would be taken for a Pool's, a `__call__` for a scheduler,
    a `Client` with `get` for dask's.
    """
    executor = make(1)
    assert issubclass(type(executor), concurrent.futures.Executor)
    executor.submit(tasks.add, 1).result()
    assert not hasattr(executor, "_processes")
    assert not callable(executor)
    assert not hasattr(executor, "get")
    assert "Client" not in type(executor).__name__
    assert executor._broken is False


@of_modes(*ALL)
def test_futures_are_the_standards(make: Maker) -> None:
    """asyncio asserts the class; adaptive sets attributes, and keeps futures as keys."""
    future = make(1).submit(tasks.add, 1)
    assert isinstance(future, concurrent.futures.Future)
    future.start_time = 1.5  # type: ignore[attr-defined]
    future.result()
    assert {future: 1.5}[future] == vars(future)["start_time"]


@of_modes(*OURS)
@pytest.mark.parametrize("call", ["map", "map_unordered", "starmap"])
def test_iterators_are_valid_after_shutdown(make: Maker, call: str) -> None:
    executor = make()
    results = getattr(executor, call)(tasks.pause, *_inputs(call))
    executor.shutdown()
    assert sorted(results) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        getattr(executor, call)(tasks.pause, *_inputs(call))


def _inputs(call: str) -> list[Any]:
    pairs = [(0.05, n) for n in range(4)]
    return [pairs] if call == "starmap" else [*zip(*pairs)]


@pytest.mark.bad_input(65)
@of_modes(*STANDARD)
def test_a_collected_executor_cleans_up(make: Maker) -> None:
    """Its threads, and its processes, which the test's end looks for;
    a map's iterator may be the last to hold it.
    """
    before = set(threading.enumerate())
    executor = make(1)
    make._stack.pop_all()  # which would keep it
    references = [weakref.ref(executor)]
    results = executor.map(tasks.pause, [0.05] * 3, range(3))
    assert next(results) == 0
    del executor
    gc.collect()
    assert list(results) == [1, 2]
    del results
    unused = make(1)
    make._stack.pop_all()
    references.append(weakref.ref(unused))
    del unused
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    wait_until(lambda: set(threading.enumerate()) <= before, "its threads have ended")


@of_modes(*ALL)
def test_callbacks_may_submit_and_block(make: Maker) -> None:
    """The standard's run where results are read,
    so that there a callback that waits for a result waits for ever.
    """
    executor = make(1)
    found: list[Any] = []
    is_over = threading.Event()

    def proceed(future: concurrent.futures.Future[int]) -> None:
        following = executor.submit(tasks.add, future.result())
        if make.is_ours:
            found.append(following.result(10))
            found.extend(executor.map(tasks.add, range(2)))
        is_over.set()

    executor.submit(tasks.pause, 0.05, 1).add_done_callback(proceed)
    assert is_over.wait(10)
    assert found == ([2, 1, 2] if make.is_ours else [])


@of_modes(*OURS)
def test_results_that_come_too_late_or_twice(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """The first outcome stands, and nothing is raised or logged where results are read."""
    caplog.set_level(logging.WARNING)
    executor = make(2)
    for _ in range(20):  # the outcomes of those that are cancelled at their dispatch come later
        futures = [executor.submit(tasks.add, n) for n in range(50)]
        cancelled = {future for future in futures if future.cancel()}
        concurrent.futures.wait(futures, 10)
        assert cancelled == {future for future in futures if future.cancelled()}
    future, dropped = executor.submit(tasks.add, 1), executor.submit(tasks.pause, 0.2)
    results = executor.map(tasks.add, range(3))
    assert future.result() == 2
    assert list(results) == [1, 2, 3]
    dropped.cancel()
    _receive_again(executor, future._id, dropped._id, dropped._id + 1, 10**9)
    assert future.result() == 2
    assert executor.submit(tasks.add, 5).result(10) == 6
    assert caplog.records == []


def _receive_again(executor: DistributedExecutor, *ids: int) -> None:
    """Have the I/O thread take in these outcomes, with every status,
    in whatever state the tasks are.
    """
    backend: Any = executor._core.backend
    is_done = threading.Event()

    def receive() -> None:
        error = p.Failed(ids[0], p.CRASHED, ["a story"])
        payloads: list[p.Payload] = [dumps("another")] * len(ids)
        for message in (
            p.Results(list(ids), bytes([p.VALUE] * len(ids)), payloads),
            p.Results(list(ids), bytes([p.ERROR] * len(ids)), payloads),
            p.Running(list(ids)),
            error,
        ):
            backend.mailbox.receive(message)
        is_done.set()

    backend.call(receive)
    assert is_done.wait(10)


# --- A forked child -------------------------------------------------------------------------------


def in_forked_child(function: Callable[[], Any]) -> Any:
    """What the function returns in a forked child, by JSON;
    its error's type and text if it raises.
    """
    ours, childs = socket.socketpair()
    pid = os.fork()
    if not pid:
        try:
            try:
                answer = function()
            except BaseException as error:
                answer = [type(error).__name__, str(error)]
            childs.send(json.dumps(answer).encode())
        finally:
            os._exit(0)
    childs.close()
    ours.settimeout(20)
    text = ours.recv(100_000).decode()
    os.waitpid(pid, 0)
    ours.close()
    return json.loads(text)


def outcome(function: Callable[..., Any], *args: Any) -> str:
    """The name of what it raises."""
    try:
        function(*args)
    except BaseException as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.bad_input(34)
@of_modes(*OURS)
def test_a_forked_child_cannot_use_it(make: Maker) -> None:
    executor, unused = make(1), make(1)
    assert executor.submit(tasks.add, 1).result() == 2

    def use() -> list[str]:
        found = []
        for each in (executor, unused):
            for call in (each.submit, each.map, each.map_unordered, each.starmap, each.amap):
                found.append(outcome(call, tasks.add, [1]))
            found.append(outcome(each.status))
            each.shutdown()  # which is the parent's affair
            assert "DistributedExecutor" in repr(each) + each._repr_html_()
        return found

    assert in_forked_child(use) == ["ExecutorForkedError"] * 12
    kind, text = in_forked_child(lambda: executor.submit(tasks.add, 1))
    assert kind == "ExecutorForkedError"
    assert "create one after the fork" in text
    assert executor.submit(tasks.add, 2).result() == 3
    assert unused.submit(tasks.add, 3).result() == 4


@of_modes(*OURS)
def test_a_forked_child_waits_for_nothing(make: Maker) -> None:
    """What the parent's threads would resolve has failed there, and only there."""
    executor = make(1)
    done = executor.submit(tasks.add, 1)
    assert done.result() == 2
    waiting = [executor.submit(tasks.pause, 0.5, n) for n in range(3)]
    concurrent.futures.wait(waiting[:1], 0)  # so that it has a condition of its own
    results = executor.map(tasks.pause, [0.1] * 3, range(3))
    unordered = executor.map_unordered(tasks.pause, [0.1] * 3, range(3))

    def use() -> list[Any]:
        found = [done.result(), *(outcome(future.result) for future in waiting)]
        found += [outcome(next, results), outcome(list, unordered)]
        found.append(len(concurrent.futures.wait(waiting, 5).done))
        return [*found, any(future.cancel() for future in waiting)]

    assert in_forked_child(use) == [2, *["ExecutorForkedError"] * 5, 3, False]
    assert [future.result() for future in waiting] == [0, 1, 2]
    assert list(results) == [0, 1, 2]
    assert sorted(unordered) == [0, 1, 2]


@of_modes(*OURS)
def test_a_forked_child_has_executors_of_its_own(make: Maker) -> None:
    make(1).submit(tasks.add, 1).result()
    cluster = make.cluster.address if make.cluster is not None else None

    def use() -> int:
        with DistributedExecutor(1, address=cluster) as executor:
            value: int = executor.submit(tasks.add, 41).result(15)
            return value

    assert in_forked_child(use) == 42


# --- Notebooks ------------------------------------------------------------------------------------


class Texts(html.parser.HTMLParser):
    """The tags and texts of a document, which must be well-formed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def close(self) -> None:
        super().close()
        assert self._open == []


def read_html(text: str) -> Texts:
    found = Texts()
    found.feed(text)
    found.close()
    return found


@of_modes(*OURS)
def test_repr_html(make: Maker) -> None:
    executor = make(2)
    executor.submit(tasks.add, 1).result()
    before = read_html(executor._repr_html_())
    assert set(before.tags) == {"table", "caption", "tr", "th", "td"}
    cells = dict(zip(before.texts[1::2], before.texts[2::2]))
    assert cells["runs on"] == repr(executor._core.backend)
    assert cells["state"] == "running"
    assert cells["tasks at once"] == "2"
    assert cells["tasks without a result"] == "0"
    assert ("workers" in cells) == (make.mode == CLUSTER)
    executor.shutdown()
    assert "shut down" in read_html(executor._repr_html_()).texts


@of_modes(*OURS)
def test_repr_html_is_escaped_and_asks_nobody(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make(1)
    executor.submit(tasks.add, 1).result()
    text = "<script>alert('&')</script>"
    monkeypatch.setattr(type(executor._core.backend), "__repr__", lambda self: text)
    monkeypatch.setattr(type(executor._core.backend), "status", None)
    executor._mailbox.broken = RuntimeError(text)
    found = read_html(executor._repr_html_())
    assert "script" not in found.tags
    assert text in found.texts
    assert f"broken: {text}" in found.texts
