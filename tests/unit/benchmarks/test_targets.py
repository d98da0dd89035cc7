"""Goals are met, missed or not measured, and nothing else decides than the figures."""

from __future__ import annotations

from benchmarks.systems import CONTESTANTS, OURS
from benchmarks.tables import ROWS
from benchmarks.targets import Goal, goals, judge

RATE = Goal(
    "rate",
    "embedded",
    "submit_rate",
    10,
    "x",
    at_least=True,
    against=("processpool", "submit_rate"),
)
START = Goal("start-up", "embedded", "startup_s", 0.3, "s")


def test_a_ratio_at_its_limit_is_met_and_below_it_is_missed() -> None:
    pool = {"submit_rate": [10.0, 10.0, 10.0]}
    met = judge(RATE, {"embedded": {"submit_rate": [90.0, 100.0, 110.0]}, "processpool": pool})
    missed = judge(RATE, {"embedded": {"submit_rate": [110.0, 99.0, 90.0]}, "processpool": pool})
    assert (met.is_met, met.word) == (True, "met")
    assert (missed.is_met, missed.word) == (False, "MISSED")


def test_a_limit_from_above() -> None:
    assert judge(START, {"embedded": {"startup_s": [0.3]}}).is_met is True
    assert judge(START, {"embedded": {"startup_s": [0.31]}}).is_met is False


def test_an_absent_peer_is_neither_met_nor_missed() -> None:
    verdict = judge(RATE, {"embedded": {"submit_rate": [100.0]}})
    assert verdict.is_met is None
    assert verdict.word == "not measured"
    assert "processpool" in verdict.reason


def test_a_figure_of_ours_that_is_missing_is_named() -> None:
    verdict = judge(RATE, {"embedded": {"submit_rate": [None]}})
    assert "embedded has no submit_rate" in verdict.reason


def test_goals_name_contestants_and_figures_that_there_are() -> None:
    figures = {row.figure for row in ROWS}
    for goal in goals():
        assert goal.contestant in OURS
        assert goal.figure in figures
        if goal.against is not None:
            assert goal.against[0] in CONTESTANTS
            assert goal.against[1] in figures


def test_each_goal_of_the_broker_is_there_for_tcp_too() -> None:
    ipc = [(goal.what, goal.limit) for goal in goals() if goal.contestant == "ipc"]
    tcp = [(goal.what, goal.limit) for goal in goals() if goal.contestant == "tcp"]
    assert ipc == tcp
    assert len(ipc) == 14
