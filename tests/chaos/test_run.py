from __future__ import annotations

from tests.chaos.run import first_after


def test_a_result_after_each_kill_is_the_next_brokers() -> None:
    assert first_after([10.0, 20.0], [9.0, 10.1, 10.5, 11.0, 24.0], []) == [0.5, 4.0]


def test_of_kills_in_a_row_the_last_one_counts() -> None:
    assert first_after([10.0, 12.0], [9.0, 12.1, 15.0], []) == [3.0]


def test_a_broker_that_was_started_by_hand_counts_from_there() -> None:
    assert first_after([10.0, 20.0], [10.5, 25.0], [22.0]) == [0.5, 3.0]


def test_no_result_is_no_figure() -> None:
    assert first_after([10.0], [9.0], []) == []
