"""Large blobs of a submission: those used once go at once,
the others stay up to a number of bytes.
"""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from achilles.core import submission
from tests.unit.core.test_submission import USER, SubmissionBench, forget, results, submit


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 100 bytes on a blob is large."""
    monkeypatch.setattr(submission, "LARGE", 100)


def add_large(bench: SubmissionBench, blob: int, *, is_kept: bool) -> None:
    bench.core.add_blob(blob, b"%100d" % blob, is_kept=is_kept)
    bench.step([])


def run_with(bench: SubmissionBench, *blobs: int, ids: tuple[int, ...] = (1,)) -> list[int]:
    """Run tasks that name these blobs; what is forgotten at their end."""
    bench.submit(*ids, blobs=blobs)
    bench.sent()
    bench.hear(results(*ids))
    return [
        number
        for _, message in bench.sent()
        if isinstance(message, p.Forget)
        for number in message.blobs
    ]


def test_a_large_blob_that_was_used_once_goes_with_its_last_task() -> None:
    bench = SubmissionBench()
    add_large(bench, 5, is_kept=False)
    bench.submit(1, 2, blobs=(5,))
    bench.sent()
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1))]
    bench.hear(results(2))
    assert bench.sent() == [(USER, results(2)), *forget(5)]
    assert not bench.core.knows_blob(5)


def test_a_large_blob_that_is_used_again_stays() -> None:
    bench = SubmissionBench()
    add_large(bench, 5, is_kept=False)
    bench.submit(1, blobs=(5,))
    bench.sent()
    add_large(bench, 5, is_kept=True)
    bench.submit(2, blobs=(5,))
    bench.sent()
    bench.hear(results(1, 2))
    assert bench.sent() == [(USER, results(1, 2))]
    bench.submit(3, blobs=(5,))
    assert bench.sent() == [submit(3, blobs=(5,))]  # without the blob


def test_large_blobs_stay_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones used last, whatever those that are used now have."""
    monkeypatch.setattr(submission, "BYTES_KEPT", 200)
    bench = SubmissionBench()
    for number in (5, 6, 7, 8):
        add_large(bench, number, is_kept=True)
    bench.submit(100, blobs=(8,))
    bench.sent()
    assert run_with(bench, 5, ids=(1,)) == []
    assert run_with(bench, 6, ids=(2,)) == []
    assert run_with(bench, 5, ids=(3,)) == []
    assert run_with(bench, 7, ids=(4,)) == [6]
    assert [bench.core.knows_blob(number) for number in (5, 6, 7, 8)] == [True, False, True, True]


def test_a_large_function_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "BYTES_KEPT", 99)
    bench = SubmissionBench()
    add_large(bench, 5, is_kept=True)
    bench.submit(1, fn=5)
    bench.sent()
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1)), *forget(5)]


def test_large_blobs_count_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "BLOBS_KEPT", 2)
    bench = SubmissionBench()
    add_large(bench, 5, is_kept=True)
    assert run_with(bench, 5) == []
    add_large(bench, 6, is_kept=True)
    assert run_with(bench, 6, ids=(2,)) == [5]
