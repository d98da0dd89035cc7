from __future__ import annotations

from tests.chaos.plan import plan
from tests.chaos.run import Report, _forbidden, first_after


def test_a_result_after_each_kill_is_the_next_brokers() -> None:
    assert first_after([10.0, 20.0], [9.0, 10.1, 10.5, 11.0, 24.0], []) == [0.5, 4.0]


def test_of_kills_in_a_row_the_last_one_counts() -> None:
    assert first_after([10.0, 12.0], [9.0, 12.1, 15.0], []) == [3.0]


def test_a_broker_that_was_started_by_hand_counts_from_there() -> None:
    assert first_after([10.0, 20.0], [10.5, 25.0], [22.0]) == [0.5, 3.0]


def test_no_result_is_no_figure() -> None:
    assert first_after([10.0], [9.0], []) == []


def test_tasks_are_given_up_for_what_befell_them_alone() -> None:
    report = Report(plan(0, 20.0, "N9"))
    report.buckets.excused = 2
    assert "2 tasks were given up" in _forbidden(report)[0]
    report.effects["clock"] = 20  # harms nobody
    assert _forbidden(report)
    report.effects["flap"] = 3  # each may cost a worker its session, with both of its tasks
    assert not _forbidden(report)


def test_a_drain_charges_nobody() -> None:
    report = Report(plan(0, 20.0, "N6"))
    report.buckets.charged = 1
    assert _forbidden(report)
    report.plan = plan(0, 20.0, "N2")
    assert not _forbidden(report)
