"""What a worker keeps of its reports while it has no broker."""

from __future__ import annotations

import pytest

from achilles.core import holding
from achilles.core import protocol as p
from achilles.core.holding import HELD_SECONDS, MARGIN, OWN_BYTES, Holding
from achilles.core.runners import Chunk

NOW = 100.0


def chunk(lease: int, *ids: int) -> Chunk:
    """A lease of client 5."""
    return Chunk(p.Run(lease, 5, 1, 2, list(ids), [b"p"] * len(ids), attempt=3, blobs=(4,)))


def done(lease: int, *indexes: int, value: bytes = b"v") -> p.Done:
    """A report of values."""
    count = len(indexes)
    return p.Done(lease, list(indexes), bytes(count), [value] * count, 0.5)


def held(lease: int, ids: list[int], indexes: list[int], blobs: list[int]) -> p.Held:
    """What a broker is told of a lease of `chunk`."""
    return p.Held(lease, 5, ids, indexes, blobs, attempt=3)


def test_open_tasks_and_reported_ones_are_told_in_order() -> None:
    made = Holding(1)
    ended, running = chunk(1, 11), chunk(2, 12, 13, 14)
    running.open = {1, 2}
    made.ended(ended)
    made.add([done(1, 0), done(2, 0), p.Crashed(2, 2, "died"), p.Returned(2, [1])], NOW)
    running.open = {1}
    leases, reports = made.take([running], {(5, 1), (5, 4), (6, 2)})
    assert leases == [held(2, [12, 13, 14], [0, 1, 2], [1, 4]), held(1, [11], [0], [1, 4])]
    assert reports == [done(1, 0), done(2, 0), p.Crashed(2, 2, "died")]
    assert made.take([], {}) == ([], [])


def test_what_a_task_printed_is_kept_and_its_questions_are_not() -> None:
    made = Holding(1)
    printed = p.Letter(0, 1, 5, p.OUTPUT, b"line")
    made.add([printed, p.Letter(0, 1, 5, p.IMPORT, b"module"), p.Drain()], NOW)
    assert made.take([], {}) == ([], [printed])


def test_a_report_of_a_lease_that_is_long_over_is_dropped() -> None:
    """No broker can have thought it open."""
    made = Holding(1)
    for lease in range(1, MARGIN + 4):
        made.ended(chunk(lease, lease))
    made.add([done(1, 0), done(2, 0)], NOW)
    leases, reports = made.take([], {})
    assert [one.lease for one in leases] == [2]
    assert reports == [done(2, 0)]


def test_payloads_of_ended_leases_are_not_kept() -> None:
    made, ended = Holding(1), chunk(1, 11)
    made.ended(ended)
    assert ended.run.payloads == []


def test_the_oldest_reports_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HELD_BYTES", 2 * OWN_BYTES + 10)
    made = Holding(1)
    for lease in (1, 2, 3):
        made.ended(chunk(lease, lease))
        made.add([done(lease, 0, value=b"12345")], NOW)
    assert [one.lease for one in made.take([], {})[0]] == [2, 3]
    made.add([done(1, 0, value=bytes(OWN_BYTES))], NOW)  # their sizes count no more
    assert len(made) == 1


def printed(size: int) -> p.Letter:
    return p.Letter(0, 1, 5, p.OUTPUT, bytes(size))


@pytest.mark.parametrize(
    "large",
    [done(1, 0, value=bytes(1000)), printed(1000), p.Crashed(1, 0, "x" * 1000)],
    ids=["result", "output", "reason"],
)
def test_whatever_is_large_counts(monkeypatch: pytest.MonkeyPatch, large: p.Wire) -> None:
    monkeypatch.setattr(holding, "HELD_BYTES", 1000 + OWN_BYTES)
    made = Holding(1)
    made.add([done(1, 0), large], NOW)
    assert len(made) == 1
    made.add([printed(0)], NOW)
    assert len(made) == 1


def test_so_does_the_number_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HELD_BYTES", 100 * OWN_BYTES)
    made = Holding(1)
    made.add([printed(0) for _ in range(200)], NOW)
    assert len(made) == 100


def test_after_long_nobody_waits() -> None:
    made = Holding(1)
    assert not made.is_too_old(NOW)
    made.add([], NOW)
    made.add([done(1, 0)], NOW + 1)
    assert not made.is_too_old(NOW + HELD_SECONDS - 0.1)
    assert made.is_too_old(NOW + HELD_SECONDS)
    made.clear()
    assert not made.is_too_old(NOW + HELD_SECONDS)
    assert len(made) == 0
