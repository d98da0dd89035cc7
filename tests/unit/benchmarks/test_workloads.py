"""The workloads themselves, on executors of this process: they run,
and they notice wrong results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.systems import SLOTS, System
from benchmarks.workloads import (
    EACH_ROUND,
    ONCE,
    Measurement,
    Scale,
    WrongResult,
    measured,
    words,
)

TINY = Scale(
    0.002,
    mib=1,
    tasks_max=50,
    trips=5,
    repeats=1,
    million=100,
    words=1_000,
    skewed=100,
    skewed_ms=0.01,
    searches=9,
)
PLAIN = [name for name in (EACH_ROUND | ONCE) if name != "search"]  # which wants scikit-learn


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurement]:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(SLOTS) as executor:
        yield Measurement(System(executor), TINY)


@pytest.mark.parametrize("name", PLAIN)
def test_each_workload_finds_figures(bench: Measurement, name: str) -> None:
    bench.figures["submit_rate"] = 1e6  # or a million would be too many
    (EACH_ROUND | ONCE)[name](bench)
    assert len(bench.figures) > 1 or name == "submits"
    assert all(isinstance(value, float) for value in bench.figures.values())


class Lying(System):
    """Its results are those of other tasks."""

    def gather(self, futures: Any) -> list[Any]:
        found = super().gather(futures)
        if isinstance(found[0], tuple):
            return [(-1, *found[0][1:]), *found[1:]]
        return [-1, *found[1:]]

    def map(self, function: Callable[[Any], Any], items: Any) -> list[Any]:
        found = super().map(function, items)
        if isinstance(found[0], dict):
            return [{"w7": 1}, *found[1:]]
        return self.gather([_Done(value) for value in found])


class _Done:
    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "transfers"])
def test_each_workload_notices_wrong_results(bench: Measurement, name: str) -> None:
    bench.system.__class__ = Lying
    bench.figures["submit_rate"] = 1e6
    with pytest.raises(WrongResult):
        (EACH_ROUND | ONCE)[name](bench)


def test_a_system_too_slow_for_a_million_is_not_asked(bench: Measurement) -> None:
    bench.figures["submit_rate"] = 1.0
    ONCE["million"](bench)
    assert "longer than" in bench.notes["million_s"]


def test_without_a_joblib_backend_there_is_no_search(bench: Measurement) -> None:
    EACH_ROUND["search"](bench)
    assert bench.notes == {"search_s": "it has no backend for joblib"}
    assert not bench.figures


def test_chunks_by_hand_are_the_same_map(bench: Measurement) -> None:
    bench.system.takes_chunksize = False
    assert bench.system.map_chunks(abs, range(-7, 0), 3) == [7, 6, 5, 4, 3, 2, 1]


def test_words_are_counted(bench: Measurement) -> None:
    words(bench)
    assert bench.figures["words_s"] > 0


def test_as_many_tasks_as_fit_the_time() -> None:
    asked: list[int] = []

    def run(count: int) -> float:
        asked.append(count)
        return count * 0.001 + (1.0 if len(asked) == 1 else 0.0)  # what happens once

    count, took = measured(10_000, 1.0, run, least=50)
    assert (count, asked) == (1_000, [50, 50, 400, 1_000])
    assert took == pytest.approx(1.0)
    assert measured(200, 1.0, run, least=50)[0] == 200
    assert measured(10_000, 0.01, run, least=50)[0] == 50
