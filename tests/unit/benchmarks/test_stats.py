"""Medians, ratios and idle time, by hand-made rounds and schedules."""

from __future__ import annotations

import pytest

from benchmarks.stats import (
    Span,
    Summary,
    ideal_seconds,
    longest_idle,
    paired_ratio,
    percentile,
    summarize,
)


def test_a_summary_leaves_out_rounds_without_a_value() -> None:
    summary = summarize([4.0, None, 1.0, 3.0])
    assert summary == Summary(median=3.0, low=1.0, high=4.0, rounds=3)
    assert summary is not None
    assert summary.spread == pytest.approx(1.0)


def test_no_rounds_make_no_summary() -> None:
    assert summarize([]) is None
    assert summarize([None, None]) is None


def test_the_spread_of_nothing_is_nothing() -> None:
    assert Summary(0.0, 0.0, 0.0, 3).spread == 0.0


def test_ratios_are_taken_within_a_round() -> None:
    # The second round was ten times slower for both: of the medians it would be 2 / 10.
    assert paired_ratio([1.0, 20.0], [2.0, 10.0]) == Summary(1.25, 0.5, 2.0, 2)


def test_a_ratio_needs_both_and_no_zero() -> None:
    assert paired_ratio([1.0, None, 3.0], [None, 2.0, 0.0]) is None
    assert paired_ratio([1.0, 6.0], [None, 2.0]) == Summary(3.0, 3.0, 3.0, 1)


@pytest.mark.parametrize(
    ("part", "value"), [(0.0, 1), (0.5, 5), (0.51, 6), (0.9, 9), (0.99, 10), (1.0, 10)]
)
def test_percentiles_are_nearest_ranks(part: float, value: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], part) == value


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_schedule_without_gaps_does_not_idle() -> None:
    spans = [Span(0.0, 1.0), Span(0.0, 2.0), Span(1.0, 3.0), Span(2.0, 3.0)]
    assert longest_idle(spans, slots=2, since=0.0) == 0.0


def test_one_slot_that_waits_while_another_runs_idles() -> None:
    spans = [Span(0.0, 1.0), Span(0.0, 5.0), Span(4.0, 5.0)]
    assert longest_idle(spans, slots=2, since=0.0) == 3.0


def test_the_time_before_the_first_task_counts() -> None:
    assert longest_idle([Span(2.0, 3.0), Span(2.0, 3.0)], slots=2, since=0.5) == 1.5


def test_a_slot_without_work_for_it_does_not_idle() -> None:
    spans = [Span(0.0, 1.0), Span(0.0, 9.0)]
    assert longest_idle(spans, slots=2, since=0.0) == 0.0


def test_a_slot_that_never_gets_a_task_idles_up_to_the_last_start() -> None:
    spans = [Span(0.0, 1.0), Span(1.0, 2.0), Span(2.0, 3.0)]
    assert longest_idle(spans, slots=2, since=0.0) == 2.0


def test_no_tasks_no_idling() -> None:
    assert longest_idle([], slots=2, since=0.0) == 0.0


def test_an_ideal_schedule_is_bound_by_the_sum_or_by_the_longest() -> None:
    assert ideal_seconds([1.0] * 10, 2) == 5.0
    assert ideal_seconds([1.0, 9.0], 2) == 9.0
    assert ideal_seconds([], 2) == 0.0
