from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from achilles.runtime import wakeups
from achilles.runtime.wakeups import KEPT_MAX, Wakeup, new_wakeup


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    wakeups._kept.clear()
    yield
    wakeups._kept.clear()


def no_descriptors(*args: object) -> int:
    raise OSError(24, "Too many open files")


@pytest.fixture(params=["eventfd", "no descriptors left", "no eventfd"])
def wakeup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Wakeup:
    if request.param == "no eventfd":
        monkeypatch.delattr(os, "eventfd")
    elif request.param == "no descriptors left":
        monkeypatch.setattr(os, "eventfd", no_descriptors)
    made = new_wakeup()
    assert isinstance(made, wakeups._Event) == (request.param == "eventfd")
    return made


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_who_sleeps_is_woken(wakeup: Wakeup, timeout: float | None) -> None:
    thread = threading.Thread(target=wakeup.sleep, args=(timeout,))
    thread.start()
    wakeup.wake()
    thread.join(10)
    assert not thread.is_alive()
    wakeup.done()


@pytest.mark.parametrize("timeout", [None, 20.0, 1e6])
def test_who_was_woken_before_does_not_sleep(wakeup: Wakeup, timeout: float | None) -> None:
    wakeup.wake()
    start = monotonic()
    wakeup.sleep(timeout)
    assert monotonic() - start < 10
    wakeup.done()


def test_it_wakes_by_itself_and_may_be_woken_then(wakeup: Wakeup) -> None:
    start = monotonic()
    wakeup.sleep(0.02)
    assert 0.019 < monotonic() - start < 10
    wakeup.done()
    wakeup.wake()


def test_the_next_one_has_the_same_descriptor_and_may_wake_for_nothing() -> None:
    first = new_wakeup()
    first.done()
    second = new_wakeup()
    assert second is first
    first.wake()  # late
    second.sleep(20)
    start = monotonic()
    second.sleep(0.01)
    assert monotonic() - start > 0.009
    assert new_wakeup() is not second


def test_few_descriptors_are_kept() -> None:
    before = len(os.listdir("/proc/self/fd"))
    many = [new_wakeup() for _ in range(KEPT_MAX + 5)]
    assert len(os.listdir("/proc/self/fd")) == before + KEPT_MAX + 5
    for one in many:
        one.done()
    del many, one
    assert len(os.listdir("/proc/self/fd")) == before + KEPT_MAX


def test_a_forked_child_has_its_own() -> None:
    new_wakeup().done()
    assert wakeups._kept
    pid = os.fork()
    if pid == 0:
        os._exit(len(wakeups._kept))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert wakeups._kept
