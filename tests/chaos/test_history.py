from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.history import Execution, by_number, executions, expected, judge, lines_of, vacuous
from tests.chaos.history import repeated as count_repeated
from tests.chaos.work import AWKWARD, blob, digest, mix

WELL = {"was_killed": False}


def submit(first: int, kind: str = "sleep", count: int = 1, detail: Any = None) -> dict[str, Any]:
    return {"op": "submit", "first": first, "count": count, "kind": kind, "detail": detail}


def done(first: int, *given: Any, what: str = "value") -> dict[str, Any]:
    return {"op": "done", "first": first, "what": what, "given": list(given)}


def ran(number: int, signs: str, attempt: int = 1) -> list[Execution]:
    return [Execution(number, attempt, 1, float(at), sign == "+") for at, sign in enumerate(signs)]


def test_right_values_are_acknowledged_and_compared() -> None:
    records = [submit(5, count=3), done(5, mix(5), mix(6)), done(7, mix(7))]
    buckets = judge(records, {}, **WELL)
    assert (buckets.submitted, buckets.acknowledged, buckets.compared) == (3, 3, 3)
    assert buckets.is_well


@pytest.mark.parametrize(
    ("records", "bucket"),
    [
        ([submit(1)], "lost"),
        ([submit(1), done(1, mix(2))], "unexpected"),
        ([submit(1), done(1, "ValueError", what="error")], "unexpected"),
        ([submit(1), done(1, None, what="cancelled")], "unexpected"),
        ([done(1, mix(1))], "unexpected"),
        ([submit(1), done(1, mix(1)), done(1, mix(1))], "duplicated"),
        ([submit(1, "raises"), done(1, mix(1))], "unexpected"),
        ([submit(1, "fat", detail=64), done(1, digest(1, 64))], "unexpected"),
    ],
)
def test_what_must_not_be_is_in_its_bucket(records: list[dict[str, Any]], bucket: str) -> None:
    buckets = judge(records, {}, **WELL)
    assert getattr(buckets, bucket) == 1
    assert buckets.acknowledged == 0
    assert not buckets.is_well
    assert "task 1" in str(buckets)


def test_items_of_a_map_in_another_order_are_unexpected() -> None:
    assert judge([submit(1, count=2), done(1, mix(2), mix(1))], {}, **WELL).unexpected == 2


def test_what_a_killed_client_had_open_is_open() -> None:
    buckets = judge([submit(1, count=2), done(1, mix(1))], {}, was_killed=True)
    assert (buckets.open, buckets.acknowledged, buckets.lost) == (1, 1, 0)
    assert buckets.is_well


def test_what_is_behind_a_failed_item_of_a_map_has_no_outcome() -> None:
    story = "was killed by SIGKILL; " * 3
    failed = {**done(2, "TaskCrashedError", what="error"), "text": story}
    behind = done(3, None, None, what="behind")
    buckets = judge([submit(1, "tiny", count=4), failed, behind, done(1, mix(1))], {}, **WELL)
    assert (buckets.acknowledged, buckets.excused, buckets.behind) == (1, 1, 2)
    assert buckets.is_well


def test_a_task_that_was_begun_again_is_recovered() -> None:
    records = [submit(1), done(1, mix(1)), submit(2), done(2, mix(2))]
    buckets = judge(records, {1: ran(1, "++-"), 2: ran(2, "+-")}, **WELL)
    assert (buckets.recovered, buckets.acknowledged) == (1, 2)


@pytest.mark.parametrize(
    ("error", "line", "lines", "is_excused"),
    [
        ("TaskCrashedError", "killed by SIGKILL; ", 3, True),
        ("TaskCrashedError", "killed by SIGKILL; ", 2, False),
        ("TaskCrashedError", "killed by SIGSEGV; ", 3, False),
        ("WorkerLostError", "was lost; ", 5, True),
        ("WorkerLostError", "was lost; ", 4, False),
        ("BrokerLostError", "was lost; ", 5, False),
    ],
)
def test_a_failure_by_the_rules_tells_of_each_attempt(
    error: str, line: str, lines: int, is_excused: bool
) -> None:
    records = [submit(1), {**done(1, error, what="error"), "text": line * lines}]
    buckets = judge(records, {}, **WELL)
    assert (buckets.excused, buckets.unexpected) == (is_excused, not is_excused)


def test_awkward_tasks_end_as_the_table_says() -> None:
    for number, (kind, error) in enumerate(AWKWARD.items()):
        outcome = done(number, mix(number)) if error is None else done(number, error, what="error")
        assert judge([submit(number, kind), outcome], {}, **WELL).acknowledged == 1, kind


def test_some_tasks_may_be_cancelled() -> None:
    for kind in ("cancel", "late"):
        records = [submit(1, kind), done(1, None, what="cancelled")]
        assert judge(records, {}, **WELL).acknowledged == 1
    assert expected(1, "late", None) == ("error", "TaskTimeoutError")


def test_charges_are_counted_for_those_who_harm_nobody() -> None:
    records = [submit(1), done(1, mix(1)), submit(2, "is killed once"), done(2, mix(2))]
    runs = {1: ran(1, "+-"), 2: ran(2, "+-", attempt=2)}
    assert judge(records, runs, **WELL).charged == 0
    assert judge(records, {**runs, 1: ran(1, "+-", attempt=3)}, **WELL).charged == 2


def test_executions_are_read_from_lines_of_which_one_may_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert executions(path) == []
    path.write_text("1 1 77 5.0 +\n1 1 77 6.5 -\n2 1 77 7.0")
    found = executions(path)
    assert found == [Execution(1, 1, 77, 5.0, True), Execution(1, 1, 77, 6.5, False)]
    assert by_number(found) == {1: found}


def test_repetitions() -> None:
    counts = count_repeated({1: ran(1, "+-"), 2: ran(2, "++-"), 3: ran(3, "++--")})
    assert (counts["requeued"], counts["late"]) == (2, 1)


def test_only_a_killed_client_may_leave_half_a_record(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text(json.dumps(submit(1)) + '\n{"op": "do')
    assert list(lines_of(path, may_be_cut=True)) == [submit(1)]
    with pytest.raises(ValueError, match="Unterminated"):
        list(lines_of(path, may_be_cut=False))
    assert list(lines_of(tmp_path / "none", may_be_cut=False)) == []


def test_a_run_that_harmed_too_little_proves_nothing() -> None:
    needs = {"kill runner": 10, "requeued": 1}
    assert vacuous(needs, {"kill runner": 10, "requeued": 3, "other": 0}) == []
    assert vacuous(needs, {"kill runner": 9}) == [
        "9 of at least 10 kill runner",
        "0 of at least 1 requeued",
    ]


def test_values_tell_their_numbers() -> None:
    assert len({mix(number) for number in range(10_000)}) == 10_000
    assert all(0 <= mix(number) < 1 << 64 for number in range(1000))
    assert len(blob(1, 1 << 10)) == 1 << 10
    assert blob(1, 64) != blob(2, 64)
