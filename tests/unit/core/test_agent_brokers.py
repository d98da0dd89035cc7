"""A worker whose broker is gone, and what it tells the next one."""

from __future__ import annotations

from typing import Any

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.holding import HELD_SECONDS
from tests.unit.core.agents import HOST, AgentBench, done, execute, returned, started
from tests.unit.core.bench import BROKER

FIRST, SECOND = b"1" * 16, b"2" * 16
RESUMED = (BROKER, p.Resumed())


class Away(AgentBench):
    """An agent that has joined a broker; ``cut`` is what its shell does when that is gone."""

    def __init__(self, slots: int = 1) -> None:
        super().__init__(slots)
        self.join(FIRST)
        assert self.sent() == []  # the first one is told nothing

    def join(self, epoch: bytes) -> None:
        """A session begins."""
        self.step(self.core.join(epoch, self.now))

    def cut(self, *unsent: Any) -> None:
        """The session is over, and these reports had not reached the broker."""
        self.core.hold([message for _, message in unsent], self.now)

    def finish_away(self, runner: int, *rows: tuple[int, int]) -> None:
        """Values come while there is no session."""
        self.finish(runner, *rows)
        self.cut(*[send for send in self.sent() if send[0] == BROKER])


def held(lease: int, ids: list[int], indexes: list[int]) -> tuple[str, Any]:
    """What the next broker is told of a lease of blob 1 of client 1."""
    return BROKER, p.Held(lease, 1, ids, indexes, [1])


def kill(runner: int) -> tuple[str, Any]:
    return HOST, p.Kill(runner=runner)


def test_another_broker_is_told_what_runs_what_waits_and_what_is_done() -> None:
    bench = Away()
    bench.run(7, 11, 12)
    assert bench.sent() == started(1, 11, 12)
    bench.run(8, 13)
    assert bench.sent() == [execute(1, 2, 13)]
    bench.finish(1, (1, 0))
    bench.cut(*bench.sent())
    bench.finish_away(1, (1, 1))
    bench.join(SECOND)
    told = [held(8, [13], [0]), held(7, [11, 12], [0, 1])]  # what is open stands first
    assert bench.sent() == [*told, RESUMED, done(7, (1, 0)), done(7, (1, 1))]
    bench.finish(1, (2, 0))
    assert bench.sent() == [done(8, (2, 0))]  # it went on all the time
    bench.join(SECOND)  # which has given it up since
    assert bench.sent() == [kill(1), RESUMED]


def test_a_broker_that_has_given_it_up_is_told_nothing() -> None:
    bench = Away()
    bench.run(7, 11)
    bench.sent()
    bench.cut(returned(6, 0))
    bench.join(FIRST)
    assert bench.sent() == [kill(1), RESUMED]


def test_what_was_given_back_is_not_held() -> None:
    bench = Away()
    bench.run(7, 11)
    bench.sent()
    bench.run(8, 12)
    bench.sent()
    bench.recalled(1, (2, 1))
    assert bench.sent() == [returned(8, 0)]
    bench.cut(returned(8, 0))
    bench.join(SECOND)
    assert bench.sent() == [held(7, [11], [0]), RESUMED]


def test_blobs_that_nothing_needs_any_more_are_dropped() -> None:
    """The next broker does not know that they are here."""
    bench = Away()
    bench.hear(p.Blob(client=2, blob=1, payload=b"b"))
    bench.hear(p.Blob(client=1, blob=2, payload=b"b"))
    bench.run(7, 11)
    bench.sent()
    bench.cut()
    bench.join(SECOND)
    assert bench.sent() == [held(7, [11], [0]), RESUMED]
    assert bench.core._blobs.keys() == {(1, 1)}


def test_tasks_that_submitted_tasks_and_those_begin_anew() -> None:
    """What they wait for was with the broker."""
    bench = Away(slots=3)
    for lease, fields in ((7, {}), (8, {}), (9, {"client": 5, "root": 1, "fn": 0})):
        bench.run(lease, lease + 4, **fields)
        bench.sent()
    nested = envelope.pack(1, p.Submit(0, 0, [1], [b"x"]))
    bench.hear(p.FromRunner(runner=1, client=1, kind=envelope.NESTED, body=nested))
    bench.sent()
    bench.cut()
    bench.join(SECOND)
    assert bench.sent() == [kill(1), kill(3), held(8, [12], [0]), RESUMED]
    bench.die(1, last_seq=1)
    assert bench.sent() == []


def test_a_drain_ends_when_the_reports_have_reached_a_broker() -> None:
    bench = Away()
    bench.run(7, 11)
    bench.sent()
    bench.step(bench.core.drain())
    bench.cut(*[send for send in bench.sent() if send[0] == BROKER])
    bench.recalled(1)
    bench.finish_away(1, (1, 0))
    assert not bench.core.is_drained
    assert not bench.core.is_empty
    bench.join(SECOND)
    assert bench.sent() == [
        (HOST, p.Unload(runner=1, client=1, blobs=[])),
        (BROKER, p.Held(7, 1, [11], [0], [])),
        (BROKER, p.Drain()),
        RESUMED,
        done(7, (1, 0)),
        (BROKER, p.Goodbye("drained")),
    ]
    assert bench.core.is_drained
    assert bench.core.is_empty


def test_after_long_without_a_broker_all_is_ended() -> None:
    bench = Away()
    bench.run(7, 11)
    bench.sent()
    bench.recalled(1)
    bench.cut(done(6, (1, 0)))
    bench.tick(HELD_SECONDS - 1)
    assert bench.sent() == []
    bench.tick(1)
    assert bench.sent() == [kill(1)]
    bench.join(SECOND)
    assert bench.sent() == [RESUMED]
