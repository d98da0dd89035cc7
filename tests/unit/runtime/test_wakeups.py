from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from time import monotonic

import pytest

from achilles.runtime import wakeups
from achilles.runtime.wakeups import EVENTS_MAX, Wakeup, new_wakeup
from tests.modes import wait_until


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    wakeups._kept.clear()
    assert len(wakeups._permits) == EVENTS_MAX
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


def eventfds() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum("eventfd" in os.readlink(link) for link in links if os.path.lexists(link))


def test_those_who_sleep_leave_descriptors_to_the_program() -> None:
    before = eventfds()
    many = [new_wakeup() for _ in range(EVENTS_MAX + 5)]
    assert [isinstance(one, wakeups._Event) for one in many] == [
        n < EVENTS_MAX for n in range(EVENTS_MAX + 5)
    ]
    assert eventfds() == before + EVENTS_MAX
    for one in many[: EVENTS_MAX // 2]:
        one.done()
    again = [new_wakeup() for _ in range(EVENTS_MAX)]
    assert sum(isinstance(one, wakeups._Event) for one in again) == EVENTS_MAX // 2
    assert eventfds() == before + EVENTS_MAX


def test_what_an_exception_has_lost_is_closed_and_may_be_made_again() -> None:
    before = eventfds()
    for _ in range(3 * EVENTS_MAX):
        assert isinstance(new_wakeup(), wakeups._Event)
    assert eventfds() == before


def in_child(look: Callable[[], object]) -> None:
    """Whether that holds in a forked child."""
    pid = os.fork()
    if pid == 0:
        holds = False
        try:
            holds = bool(look())
        finally:
            os._exit(0 if holds else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_has_none_of_its_parents() -> None:
    before = eventfds()
    slept: list[Wakeup] = []

    def sleep() -> None:
        slept.append(new_wakeup())
        slept[0].sleep(20)

    thread = threading.Thread(target=sleep)
    thread.start()
    wait_until(lambda: slept)
    new_wakeup().done()
    assert eventfds() == before + 2

    def look() -> bool:
        return eventfds() == before and len(wakeups._permits) == EVENTS_MAX

    def look_again() -> bool:
        new_wakeup().done()
        in_child(look)
        return True

    in_child(look)
    in_child(look_again)
    slept[0].wake()
    thread.join(10)
    assert not thread.is_alive()


def test_a_thread_that_forks_while_it_sleeps_keeps_its_wake() -> None:
    """In the handler of a signal. The child's thread wakes by itself, and may look."""
    mine = new_wakeup()

    def look() -> bool:
        mine.sleep(None)
        mine.wake()  # and what the child does is nothing to the parent
        return True

    mine.wake()
    in_child(look)
    mine.sleep(20)
    start = monotonic()
    mine.sleep(0.01)
    assert monotonic() - start > 0.009
