"""Items that travel together behave as if each were alone: in real processes,
whatever befalls one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from achilles import bundles, current_attempt
from achilles.errors import TaskCrashedError
from tests import tasks
from tests.modes import OURS, Maker, of_modes

COUNT = 400
LATE = 300  # an item that is in a bundle


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every item but the first few is bundled; the sizes of the bundles,
    of which there must be some.
    """
    monkeypatch.setattr(bundles, "KNOWN_MIN", 0)
    monkeypatch.setattr(bundles, "SHORT_SECONDS", 1e9)
    monkeypatch.setattr(bundles, "BUNDLE_SECONDS", 1e9)
    sizes: list[int] = []
    submit = bundles.Bundler.submit

    def count(self: bundles.Bundler, first: int, items: list[Any]) -> bool:
        sizes.append(len(items))
        return submit(self, first, items)

    monkeypatch.setattr(bundles.Bundler, "submit", count)
    yield sizes
    assert sum(sizes) > COUNT / 2
    assert max(sizes) > 1


@of_modes(*OURS)
def test_values_and_their_order(make: Maker) -> None:
    with make() as executor:
        assert list(executor.map(tasks.add, range(COUNT))) == list(range(1, COUNT + 1))
        assert list(executor.map(tasks.add, range(COUNT), range(COUNT))) == list(
            range(0, 2 * COUNT, 2)
        )
        assert sorted(executor.map_unordered(tasks.add, range(COUNT))) == list(range(1, COUNT + 1))


@of_modes(*OURS)
def test_a_function_of_the_program_itself(make: Maker) -> None:
    offset = 5
    with make() as executor:
        found = executor.map(lambda value: [value + offset], range(COUNT))
        assert list(found) == [[n + 5] for n in range(COUNT)]


@of_modes(*OURS)
def test_an_error_comes_when_it_is_its_turn(make: Maker) -> None:
    with make() as executor:
        results = executor.map(tasks.fail_at, range(COUNT), [LATE] * COUNT)
        assert [next(results) for _ in range(LATE)] == list(range(LATE))
        with pytest.raises(ValueError, match=f"bad {LATE}"):
            next(results)


@of_modes(*OURS)
def test_a_long_call_holds_up_nothing_before_or_behind_it(make: Maker, tmp_path: Path) -> None:
    go = str(tmp_path / "go")
    with make() as executor:
        results = executor.map_unordered(
            tasks.await_file_at, range(COUNT), [LATE] * COUNT, [go] * COUNT
        )
        found = [next(results) for _ in range(COUNT - 1)]
        assert sorted(found) == [n for n in range(COUNT) if n != LATE]
        Path(go).touch()
        assert list(results) == [LATE]


@of_modes(*OURS)
def test_a_call_that_kills_its_runner_fails_alone(make: Maker, tmp_path: Path) -> None:
    with make() as executor:
        log = tmp_path / "attempts"
        results = executor.map(die_at, range(COUNT), [LATE] * COUNT, repeat_of(str(log)))
        assert [next(results) for _ in range(LATE)] == list(range(LATE))
        with pytest.raises(TaskCrashedError, match=f"item {LATE}.*attempt 3"):
            next(results)
        assert log.read_text().split() == ["1", "2", "3"]
        results = executor.map(die_once_at, range(COUNT), repeat_of(str(tmp_path / "died")))
        assert list(results) == list(range(COUNT))


@of_modes(*OURS)
def test_shutdown_waits_for_what_must_go_out_again(make: Maker, tmp_path: Path) -> None:
    executor = make()
    results = executor.map(die_once_at, range(COUNT), repeat_of(str(tmp_path / "died")))
    executor.shutdown(wait=True)
    assert list(results) == list(range(COUNT))


def repeat_of(text: str) -> list[str]:
    return list(repeat(text, COUNT))


def die_at(value: int, bad: int, log: str) -> int:
    if value == bad:
        with open(log, "a") as file:
            print(current_attempt(), file=file)
        tasks.die()
    return value


def die_once_at(value: int, path: str) -> int:
    if value == LATE and not os.path.exists(path):
        Path(path).touch()
        tasks.die()
    return value
