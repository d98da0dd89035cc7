"""The loop waits for descriptors, for the clock and for other threads."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from achilles.runtime import loop as module
from achilles.runtime.loop import Loop, PatientThread


@pytest.fixture(params=["native", "poll"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A loop of each kind: the platform's best, and what is there without epoll and eventfd."""
    if request.param == "poll":
        monkeypatch.delattr(select, "epoll", raising=False)
    made = Loop()
    yield made
    made.close()


def test_a_readable_descriptor_calls_back(loop: Loop) -> None:
    """That is what it is for."""
    read, write = os.pipe()
    seen: list[bytes] = []
    loop.register(read, lambda: seen.append(os.read(read, 10)))
    os.write(write, b"x")
    loop.wait(5)
    loop.unregister(read)
    os.write(write, b"y")
    loop.wait(0)
    os.close(read)
    os.close(write)
    assert seen == [b"x"]


def test_write_interest_comes_and_goes(loop: Loop) -> None:
    """Registering again replaces what was wanted."""
    read, write = os.pipe()
    calls: list[str] = []
    loop.register(write, lambda: calls.append("ready"), write=True)
    loop.wait(5)
    loop.register(write, lambda: calls.append("never"))
    loop.wait(0)
    loop.unregister(write)
    os.close(read)
    os.close(write)
    assert calls == ["ready"]


def test_a_callback_may_end_another(loop: Loop) -> None:
    """A descriptor that was closed by an earlier callback of the same wait is passed over."""
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def end_all(index: int) -> None:
        called.append(index)
        for read, _ in pipes:
            loop.unregister(read)

    for index, (read, write) in enumerate(pipes):
        loop.register(read, lambda index=index: end_all(index))  # type: ignore[misc]
        os.write(write, b"x")
    loop.wait(5)
    for pair in pipes:
        for fd in pair:
            os.close(fd)
    assert len(called) == 1


def test_another_thread_wakes_it(loop: Loop) -> None:
    """Before the wait or during it, each time."""
    for _ in range(3):
        loop.wake()
        loop.wait(30)
        thread = threading.Timer(0.01, loop.wake)
        thread.start()
        loop.wait(30)
        thread.join()


def test_it_can_wait_awake(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake ends that, and no other wait after it; so does a descriptor, which is called back."""
    loop.wake()
    assert loop.wait_awake(30)
    assert not loop.wait_awake(0.0)
    thread = threading.Timer(0.01, loop.wake)
    thread.start()
    assert loop.wait_awake(30)
    thread.join()
    read, write = os.pipe()
    called: list[bytes] = []
    loop.register(read, lambda: called.append(os.read(read, 1)))
    offered: list[int] = []

    def offer() -> None:
        offered.append(1)
        if len(offered) == 3:
            os.write(write, b"x")

    monkeypatch.setattr(module, "_offer_core", offer)
    assert loop.wait_awake(30)
    assert called == [b"x"]
    loop.unregister(read)
    os.close(read)
    os.close(write)


def test_an_unknown_descriptor_is_passed_over(loop: Loop) -> None:
    """Ending twice does no harm."""
    loop.unregister(12345)


def test_waking_a_closed_loop_does_nothing() -> None:
    """Its thread is gone, and its descriptors' numbers may be another's."""
    loop = Loop()
    loop.close()
    loop.close()
    loop.wake()


def test_a_thread_lives_on_when_who_waits_for_it_is_interrupted() -> None:
    """On Python 3.10 and 3.11 a `threading.Thread` looks dead then."""
    go_on = threading.Event()
    thread = PatientThread(lambda: go_on.wait(10), "patient")
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="before it is started"):
        thread.join()
    thread.start()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            thread.join(10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert thread.is_alive()
    thread.join(0.01)
    assert thread.is_alive()
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_thread_whose_start_was_interrupted_is_started_once() -> None:
    """`start` waits until the thread runs, which Ctrl-C can end."""
    calls: list[int] = []
    go_on = threading.Event()

    def call() -> None:
        calls.append(1)
        go_on.wait(10)

    thread = PatientThread(call, "interrupted")
    started = thread._started  # type: ignore[attr-defined]
    wait = started.wait

    def interrupted(timeout: float | None = None) -> bool:
        started.wait = wait
        wait(timeout)
        raise KeyboardInterrupt

    started.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        thread.start()
    thread.start()
    thread.start()
    assert thread.is_alive()
    go_on.set()
    thread.join(10)
    assert calls == [1]


def test_a_thread_that_fails_has_ended() -> None:
    failed: list[object] = []
    thread = PatientThread(lambda: 1 / 0, "failing")
    hook, threading.excepthook = threading.excepthook, failed.append
    try:
        thread.start()
        thread.join(10)
    finally:
        threading.excepthook = hook
    assert not thread.is_alive()
    assert len(failed) == 1


def test_a_wait_ends_in_time(loop: Loop) -> None:
    """Without anything to do it ends after its timeout, not before."""
    start = time.monotonic()
    loop.wait(0.02)
    assert time.monotonic() - start >= 0.019
