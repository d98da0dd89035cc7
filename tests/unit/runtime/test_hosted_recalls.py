"""What a runner has not started comes back, and never runs there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from achilles.core.protocol import Kill, Recall, Retire
from achilles.runtime.hosted import LOOK_SECONDS
from achilles.runtime.serialize import LARGE
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import Driver, Gate


def test_recalled_tasks_never_run(driver: Driver, gate: Gate, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    wait, note = driver.load(tasks.wait_at), driver.load(tasks.note)
    driver.execute(1, wait, (gate.path,), (os.devnull,))
    driver.execute(2, note, (log, "a"), (log, "b"))
    driver.until(gate.is_reached)
    driver.apply(Recall(1))
    assert [(r.runner, sorted(r.unstarted)) for r in driver.recalled] == [(1, [(1, 1), (2, 2)])]
    driver.execute(3, note, (log, "c"))
    gate.open()
    assert driver.outcome(3) == "c"
    assert Path(log).read_text() == "c"
    assert driver.results.keys() == {(1, 1, 0), (1, 3, 0)}
    assert driver.host.next_deadline(0.0) is None


def test_a_recall_from_an_idle_runner_finds_nothing(driver: Driver) -> None:
    driver.run(tasks.add, 1)
    driver.apply(Recall(1))
    assert driver.recalled[0].unstarted == []


@pytest.mark.parametrize("size", [10, LARGE - 1000])
def test_what_is_recalled_for_others_leaves_a_task(driver: Driver, size: int) -> None:
    """If nothing has started: or what nobody gets to before it is recalled would go round and
    round.
    """
    assert driver.run(tasks.identity, 0) == 0
    identity, pid = driver.load(tasks.identity), driver.host.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        values = [bytes([n]) * size for n in range(100)]  # the large ones fill its socket
        driver.execute(2, identity, *((value,) for value in values))
        driver.execute(3, identity, (3,))
        driver.apply(Recall(1, keeps_first=True))
        assert dict(driver.recalled.pop().unstarted) == {2: 99, 3: 1}
    finally:
        os.kill(pid, signal.SIGCONT)
    assert driver.outcome(2, 0) == values[0]
    driver.execute(3, identity, (4,))
    assert driver.outcome(3) == 4
    assert driver.host.next_deadline(0.0) is None


def test_the_end_of_what_was_cut_is_looked_for(driver: Driver, gate: Gate) -> None:
    """The last result of a chunk wakes the host, but that task was taken back."""
    driver.execute(1, driver.load(tasks.wait_at), (gate.path,), (os.devnull,))
    driver.until(gate.is_reached)
    driver.apply(Recall(1))
    for _ in range(2):
        now = time.monotonic()
        due = driver.host.next_deadline(now)
        assert due is not None
        assert due <= now + LOOK_SECONDS
        driver.host.collect()
    gate.open()
    assert driver.outcome(1) == "open"


def test_who_retires_keeps_nothing(driver: Driver) -> None:
    """Nothing more can be given to it, and others run what it has not started."""
    assert driver.run(tasks.identity, 0) == 0
    pid = driver.host.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        driver.execute(2, driver.load(tasks.identity), (1,), (2,))
        driver.apply(Retire(1), Recall(1, keeps_first=True))
        assert driver.recalled.pop().unstarted == [(2, 2)]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert driver.death().unstarted == []


def test_who_has_started_gives_all_else_back(driver: Driver, gate: Gate) -> None:
    driver.execute(1, driver.load(tasks.wait_at), (gate.path,), (os.devnull,))
    driver.until(gate.is_reached)
    driver.apply(Recall(1, keeps_first=True))
    assert driver.recalled.pop().unstarted == [(1, 1)]
    gate.open()
    assert driver.outcome(1) == "open"


def test_a_recalled_seq_can_be_used_again_at_once(driver: Driver, gate: Gate) -> None:
    wait, add = driver.load(tasks.wait_at), driver.load(tasks.add)
    driver.execute(1, wait, (gate.path,), (os.devnull,))
    driver.until(gate.is_reached)
    for number in range(300):
        driver.execute(2, add, (number,))
        driver.execute(3, add, (number,), (number,))
        driver.apply(Recall(1))
        assert dict(driver.recalled.pop().unstarted) == {2: 1, 3: 2} | (
            {1: 1} if not number else {}
        )
    driver.execute(2, add, (1000,))
    driver.execute(3, add, (2000,), (3000,))
    gate.open()
    assert driver.outcome(2) == 1000
    assert driver.outcome(3, 1) == 3000
    assert len(driver.results) == 4
    driver.results.clear()
    driver.execute(1, add, (7,), (8,))  # the rest of the first chunk was recalled
    assert driver.outcome(1, 1) == 8
    assert driver.outcome(1, 0) == 7


def test_many_recalled_chunks_do_not_pile_up(driver: Driver, gate: Gate) -> None:
    wait, add = driver.load(tasks.wait_at), driver.load(tasks.add)
    driver.execute(255, wait, (gate.path,))
    driver.until(gate.is_reached)
    for seq in range(1, 250):
        driver.execute(seq, add, (seq,))
        driver.apply(Recall(1))
        assert driver.recalled.pop().unstarted == [(seq, 1)]
    driver.execute(250, add, (250,))
    gate.open()
    assert driver.outcome(250) == 250


def test_a_runner_that_dies_gives_held_chunks_back(driver: Driver, gate: Gate) -> None:
    wait, add = driver.load(tasks.wait_at), driver.load(tasks.add)
    driver.execute(1, wait, (gate.path,))
    driver.until(gate.is_reached)
    driver.execute(2, add, (1,))
    driver.apply(Recall(1))
    driver.execute(2, add, (1,), (2,))
    driver.apply(Kill(1))
    assert driver.death().unstarted == [(2, 2)]
