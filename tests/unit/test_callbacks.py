from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

from achilles.callbacks import CallbackThread
from achilles.futures import Future
from achilles.runtime.wakeups import Wakeup


class Owner:
    def __init__(self) -> None:
        self.callbacks = CallbackThread()

    def cancelled(self, ids: list[int]) -> None:
        raise AssertionError("nothing is cancelled")

    def call_back(self, future: Future) -> bool:
        return self.callbacks.put(future)

    def wake_soon(self, sleepers: Iterable[Wakeup]) -> None:
        raise AssertionError("nobody sleeps")


@pytest.fixture
def owner() -> Owner:
    return Owner()


def resolved(owner: Owner, id: int, *callbacks: Any) -> None:
    future = Future(owner, id, "f")
    for callback in callbacks:
        future.add_done_callback(callback)
    future.resolve(id, None)


def ended(owner: Owner) -> threading.Thread:
    owner.callbacks.end()
    thread = owner.callbacks.thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
    return thread


def test_one_thread_calls_back_in_order(owner: Owner) -> None:
    called: list[tuple[int, threading.Thread]] = []
    for id in range(100):
        resolved(owner, id, lambda f: called.append((f.result(), threading.current_thread())))
    thread = ended(owner)
    assert called == [(id, thread) for id in range(100)]


def test_those_after_an_error_have_their_turn(
    owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(_: object) -> None:
        raise SystemExit("of a callback")

    def fail(_: object) -> None:
        raise LookupError("of a callback")

    called: list[Any] = []
    resolved(owner, 1, fail, called.append)
    resolved(owner, 2, leave)
    resolved(owner, 3, called.append)
    ended(owner)
    assert [future.result() for future in called] == [1, 3]
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
        LookupError,
        SystemExit,
    ]


def test_without_callbacks_there_is_no_thread(owner: Owner) -> None:
    resolved(owner, 1)
    owner.callbacks.end()
    assert owner.callbacks.thread is None
