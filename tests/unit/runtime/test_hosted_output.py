"""What tasks print is told to their own client: all of it, or how much was dropped."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from achilles.core.protocol import OUTPUT, Kill
from achilles.runtime import output as output_module
from tests.printed import kept_and_told
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import BOUND, Driver, Gate, driving

OTHER = 2
FLOOD = 30_000  # lines
LINE = "x" * 99
SIZE = FLOOD * (len(LINE) + 1)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving(captures=True) as driver:
        driver.spawn()
        yield driver


def printed(driver: Driver, client: int = 1) -> str:
    """What the client was told."""
    letters = [one for one in driver.letters if (one.client, one.kind) == (client, OUTPUT)]
    assert all(one.body[0] == 1 for one in letters)
    return b"".join(one.body[1:] for one in letters).decode()


def is_all_told(text: str) -> bool:
    """Whether it was a flood, and each byte of it came or is counted."""
    kept, told = kept_and_told(text)
    return bool(told) and kept + sum(told) == SIZE


def test_all_of_a_flood_is_told_before_its_result(driver: Driver) -> None:
    """In few lines."""
    started = time.monotonic()
    driver.execute(1, driver.load(tasks.print_lines), (FLOOD, LINE))
    assert driver.outcome(1) is None
    assert is_all_told(printed(driver))
    assert len(kept_and_told(printed(driver))[1]) <= 1 + (time.monotonic() - started)
    assert set(printed(driver).splitlines()[:10_000]) == {LINE}
    driver.until(lambda: driver.host.next_deadline(0.0) is None)


def test_tasks_of_a_chunk_are_told_at_its_end(driver: Driver) -> None:
    count = FLOOD // 30
    driver.execute(1, driver.load(tasks.print_lines), *[(count, LINE)] * 30)
    driver.until(lambda: len(driver.results) == 30)
    assert is_all_told(printed(driver))


def test_one_clients_flood_is_not_anothers(driver: Driver) -> None:
    driver.execute(1, driver.load(tasks.print_lines), (FLOOD, LINE))
    driver.outcome(1)
    fn = driver.load(tasks.print_lines, client=OTHER)
    driver.execute(2, fn, (300, "a line"), client=OTHER)
    driver.outcome(2)
    assert printed(driver, OTHER) == "a line\n" * 300
    assert is_all_told(printed(driver))


def test_a_flood_is_told_when_it_is_over_though_the_task_goes_on(
    driver: Driver, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "PAUSE", 0.05)
    driver.execute(1, driver.load(tasks.print_lines), (FLOOD, LINE, gate.path))
    driver.until(lambda: is_all_told(printed(driver)))
    driver.until(lambda: driver.host.next_deadline(0.0) is None)
    driver.until(gate.is_reached)
    gate.open()
    driver.outcome(1)


def test_all_of_a_flood_is_told_before_the_death(driver: Driver) -> None:
    driver.execute(1, driver.load(tasks.print_lines_and_exit_hard), (FLOOD, LINE))
    driver.death()
    assert is_all_told(printed(driver))


@pytest.mark.parametrize("is_killed", [False, True], ids=["soon", "at the death"])
def test_what_is_nobodys_is_told_where_we_print(
    driver: Driver,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_killed: bool,
) -> None:
    monkeypatch.setattr(output_module, "PAUSE", BOUND if is_killed else 0.05)
    assert driver.run(tasks.print_lines_later, FLOOD, LINE, gate.path) is None
    driver.until(gate.is_reached)
    gate.open()
    text = ""

    def is_told() -> bool:
        nonlocal text
        text += capfd.readouterr().err
        return is_all_told(text)

    if is_killed:
        driver.until(lambda: driver.host.runners[1].owed == {None})
        driver.apply(Kill(1))
        driver.death()
        is_told()
        assert kept_and_told(text)[1]
    else:
        driver.until(is_told)
        assert printed(driver) == ""
