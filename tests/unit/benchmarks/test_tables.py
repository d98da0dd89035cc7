"""Tables say what was found, and what was not."""

from __future__ import annotations

import pytest

from benchmarks.stats import Summary
from benchmarks.tables import (
    cell,
    figures_table,
    notes_list,
    ratios_table,
    summary_table,
    verdicts_table,
    with_block,
)
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


def test_a_block_is_replaced_and_the_rest_stays() -> None:
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    wanted = "before\n<!-- bench -->\n\nnew\n\n<!-- /bench -->\nafter\n"
    assert with_block(text, "bench", "new\n") == wanted
    assert with_block(wanted, "bench", "new") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- bench --> no end",
        "<!-- /bench --> <!-- bench -->",
        "<!-- bench --> <!-- /bench --> <!-- bench --> <!-- /bench -->",
    ],
)
def test_a_text_without_one_such_block_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        with_block(text, "bench", "new")


def test_the_short_table_has_a_row_for_each_contestant() -> None:
    lines = summary_table({**TITLES, "ray": "Ray"}, FIGURES, {"ray": "no wheel"}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| Pool", "| achilles", "| Ray"]
    assert "110 ±9%" in lines[3]
    assert "no wheel" in lines[4]
