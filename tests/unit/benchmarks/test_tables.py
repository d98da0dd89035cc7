"""Tables say what was found, and what was not."""

from __future__ import annotations

from benchmarks.stats import Summary
from benchmarks.tables import cell, figures_table, notes_list, ratios_table, verdicts_table
from benchmarks.targets import Figures, Goal, judge

TITLES = {"processpool": "Pool", "embedded": "achilles"}
FIGURES: Figures = {
    "processpool": {"submit_rate": [10.0, 12.0], "p50_us": [None, None]},
    "embedded": {"submit_rate": [100.0, 120.0]},
}


def test_a_cell_has_the_median_and_half_the_spread() -> None:
    assert cell(Summary(100.0, 90.0, 110.0, 3)) == "100 ±10%"
    assert cell(Summary(100.0, 100.0, 100.0, 1)) == "100"
    assert cell(None) == "-"


def test_figures_without_any_value_are_left_out() -> None:
    assert figures_table(TITLES, FIGURES).splitlines() == [
        "|  | Pool | achilles |",
        "| --- | ---: | ---: |",
        "| no-op `submit`s (1/s) | 11 ±9% | 110 ±9% |",
    ]


def test_ratios_say_what_is_better() -> None:
    assert ratios_table(TITLES, FIGURES).splitlines()[2:] == [
        "| no-op `submit`s (more is better) | 1 ±0% | 10 ±0% |"
    ]


def test_verdicts_have_their_words() -> None:
    goal = Goal("rate", "embedded", "submit_rate", 10, "x", True, ("processpool", "submit_rate"))
    found = [judge(goal, FIGURES), judge(goal._replace(limit=11), FIGURES), judge(goal, {})]
    rows = verdicts_table(TITLES, found).splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows] == ["met |", "MISSED |", "not measured |"]
    assert rows[0].startswith("| rate | achilles | ≥ 10 x | 10 ±0% |")
    assert "embedded has no submit_rate" in rows[2]


def test_equal_reasons_are_told_once() -> None:
    notes = {"embedded": {"a": "broken", "b": "broken", "c": "slow"}, "ray": {"absent": "no wheel"}}
    assert notes_list(TITLES, notes).splitlines() == [
        "- achilles: a, b: broken",
        "- achilles: c: slow",
        "- ray: absent: no wheel",
    ]
