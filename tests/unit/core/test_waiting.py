"""Why tasks wait, in words, and when a client is told."""

from __future__ import annotations

from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.tables import READY, RETURNING
from achilles.core.waiting import (
    FIRST_QUESTION_SECONDS,
    QUESTION_SECONDS,
    REPEAT_SECONDS,
    WARN_SECONDS,
    Conditions,
    Curiosity,
    advice,
    obstacle,
)
from tests.unit.core.bench import CLIENT, OTHER, SECOND, WORKER, SchedulerBench, crossed, of, runs

ADMIN = "admin"


class WaitingBench(SchedulerBench):
    """With an administrator who asks, and workers with tags."""

    def __init__(self, workers: int = 1, slots: int = 1) -> None:
        super().__init__(workers, slots)
        hello = p.ClientHello(bytes(16), "admin", "0", "3", "somebody")
        self._check(self.core.join(ADMIN, crossed(hello), self.now))

    def join_with_tags(self, name: str, *tags: str, slots: int = 1) -> list[Any]:
        hello = p.WorkerHello(bytes(16), "0", "3", name, slots, 1, list(tags))
        return self._check(self.core.join(name, crossed(hello), self.now))

    def submit_with(self, *ids: int, peer: str = CLIENT, **options: Any) -> list[Any]:
        payloads: list[p.Payload] = [b""] * len(ids)
        return self.say(peer, p.Submit(1, 0, list(ids), payloads, options=p.PLAIN.but(**options)))

    def explain(self, task: int, client: str = "") -> list[p.Waiting]:
        (status,) = of(self.say(ADMIN, p.StatusRequest(task, client)), p.Status)
        return status.waiting

    def why(self, task: int) -> str:
        (waiting,) = self.explain(task)
        return waiting.reason

    def stuck(self, peer: str = CLIENT) -> list[p.Waiting]:
        (status,) = of(self.say(peer, p.StatusRequest(is_brief=True)), p.Status)
        assert status.is_brief
        assert not status.workers
        assert not status.clients
        return status.waiting


# --- What nobody may run --------------------------------------------------------------------------


@pytest.mark.bad_input(50)
def test_no_worker() -> None:
    bench = WaitingBench(workers=0)
    bench.submit(4, 5, 6)
    reason = "no worker is connected"
    assert bench.stuck() == [p.Waiting(CLIENT, 4, 3, reason, True)]
    assert bench.why(5) == "it waits: no worker is connected"
    assert bench.stuck(ADMIN) == bench.stuck(), "an administrator sees everybody's"
    bench.join_worker(WORKER)
    assert bench.stuck() == []


def test_a_tag_that_nobody_offers() -> None:
    bench = WaitingBench(workers=0)
    bench.join_with_tags(WORKER, "big", "fast")
    bench.submit_with(1, 2, tags=("gpu",))
    bench.submit_with(3, tags=("big",))
    bench.submit_with(4, tags=("big", "gpu"))
    rows = bench.stuck()
    assert [(row.id, row.count, row.tags) for row in rows] == [
        (1, 2, ["gpu"]),
        (4, 1, ["big", "gpu"]),
    ]
    assert rows[0].reason == "no worker offers the tag gpu (what is offered: the tags big, fast)"
    assert rows[1].reason.startswith("no worker offers the tags big, gpu ")
    assert advice(rows[0], "tcp://h:1") == "start one with: achilles worker tcp://h:1 --tag gpu"
    assert bench.why(2) == f"it waits: {rows[0].reason}"
    bench.join_with_tags(SECOND, "gpu")
    assert [row.id for row in bench.stuck()] == [4]


def test_workers_that_take_nothing_new() -> None:
    bench = WaitingBench(workers=2)
    bench.say(WORKER, p.Drain())
    bench.core.suspect(SECOND)
    bench.submit(1)
    (row,) = bench.stuck()
    assert row.reason == (
        "no worker that may run it takes new work (worker is draining, second is silent)"
    )
    bench.core.resume(SECOND, bench.now)
    assert bench.stuck() == []


def test_after_another_broker() -> None:
    bench = WaitingBench()
    bench.submit(1, 2)
    client, worker = bench.core._clients[CLIENT], bench.core._workers[WORKER]
    # As `recovery` does; the invariants know that nothing is recovered here
    client.is_held_back = True
    (status,) = of(list(bench.core.receive(ADMIN, p.StatusRequest(2), bench.now)), p.Status)
    assert status.waiting[0].reason.startswith("it is held back for a moment: a worker may come ")
    worker.state = RETURNING
    assert obstacle((), [worker]).endswith("(worker tells what it holds of an earlier broker's)")
    worker.state = READY
    assert obstacle((), [worker]) == ""


def test_each_client_is_told_of_its_own() -> None:
    bench = WaitingBench(workers=0)
    bench.join_client(OTHER)
    bench.submit(1, peer=OTHER)
    assert bench.stuck() == []
    assert [row.client for row in bench.stuck(OTHER)] == [OTHER]
    bench.submit(1, 2)
    assert sorted(row.client for row in bench.stuck(ADMIN)) == [CLIENT, OTHER]
    assert [row.client for row in bench.explain(1)] == [CLIENT, OTHER]
    assert [row.client for row in bench.explain(1, OTHER)] == [OTHER]
    assert bench.explain(2, OTHER) == bench.explain(9) == []


def test_a_client_is_not_told_of_a_single_task() -> None:
    """That looks at all of a client's tasks, which is for administrators to afford."""
    bench = WaitingBench()
    bench.submit(1)
    (status,) = of(bench.say(CLIENT, p.StatusRequest(1)), p.Status)
    assert status.waiting == []
    assert status.workers


def test_slots_that_are_taken_are_no_news() -> None:
    bench = WaitingBench()
    bench.submit(1, 2, 3)
    assert bench.stuck() == []
    assert obstacle((), []) == "no worker is connected"


# --- Where a task is ------------------------------------------------------------------------------


def test_a_task_that_runs() -> None:
    bench = WaitingBench()
    bench.submit(1)
    bench.tick(3.0)
    assert bench.why(1) == "it runs on worker worker, which has had it for 3.0 s"
    (row,) = bench.explain(1)
    assert advice(row, "tcp://h:1") == "", "nothing helps but time"
    bench.core.suspect(WORKER)
    assert bench.why(1).endswith("; that worker has been silent for 3.0 s")


def test_a_task_behind_others() -> None:
    bench = WaitingBench()
    bench.teach(0.0001)
    bench.submit(*range(2, 40))
    assert bench.why(2).startswith("it runs on worker")
    assert "in a chunk behind task 2" in bench.why(3)
    queued = max(id for id in range(2, 40) if "waits for a slot" in bench.why(id))
    assert queued == 39
    assert "1 of the 1 where it may run are taken, and " in bench.why(39)


def test_a_task_that_was_sent_ahead() -> None:
    bench = WaitingBench()
    bench.submit(1, 2)
    assert (
        bench.why(2)
        == "it waits for a slot: 1 of the 1 where it may run are taken, and 0 of its client's tasks come first"
    )
    bench.join_client(OTHER)
    bench.submit(7, peer=OTHER)
    assert bench.why(7) == "it waits on worker worker, behind what runs there"


def test_a_higher_priority_comes_first() -> None:
    bench = WaitingBench()
    bench.submit_with(1)
    bench.submit_with(2, 3)
    bench.submit_with(4, 5, priority=1)  # of which one is sent ahead
    assert "1 of its client's tasks come first" in bench.why(2)
    assert "2 of its client's tasks come first" in bench.why(3)
    assert "0 of its client's tasks come first" in bench.why(5)


def test_an_executor_that_wants_few_slots() -> None:
    bench = WaitingBench(slots=4)
    bench.join_client(OTHER, slots_max=1)
    bench.submit(1, 2, 3, peer=OTHER)
    reason = bench.why(3)
    assert reason.startswith(
        "it waits: its executor has all the 1 slots at once that it wants (max_"
    )
    assert reason.endswith("; 1 of its tasks come first")
    (row,) = bench.explain(3)
    assert advice(row, "tcp://h:1") == "", "another worker would not help"


def test_a_worker_more_helps_who_waits_for_a_slot() -> None:
    bench = WaitingBench()
    bench.submit(1, 2)
    (row,) = bench.explain(2)
    assert advice(row, "tcp://h:1") == "start one with: achilles worker tcp://h:1"


def test_what_befell_it_before() -> None:
    bench = WaitingBench()
    (run,) = runs(bench.submit(1))
    bench.say(WORKER, p.Crashed(run.lease, 0, "was killed by SIGSEGV"))
    assert bench.why(1).endswith(
        "; it was tried before: its runner was killed by SIGSEGV on worker worker"
    )


@pytest.mark.bad_input(36)
def test_a_task_that_waits_for_tasks_of_its_own() -> None:
    bench = WaitingBench()
    (run,) = runs(bench.submit(1, 2))
    parent = p.Relay(5, run.client, run.lease, p.Blob(0, 1, b"f"))
    bench.say(WORKER, parent)
    child = p.Submit(1, 0, [17], [b""], options=p.PLAIN.but(tags=("gpu",)))
    bench.say(WORKER, p.Relay(5, run.client, run.lease, child))
    assert bench.why(1) == "it waits on worker worker for tasks of its own, and takes up no slot"
    assert bench.why(17).endswith("(it was submitted by a task)")
    (row,) = bench.stuck()
    assert (row.id, row.count, row.tags) == (0, 1, ["gpu"]), "its client is told, without a number"
    bench.submit(3)
    assert "1 others wait for tasks of their own, and take up no slot" in bench.why(3)


# --- When a client asks, and is told --------------------------------------------------------------


def test_a_client_asks_while_its_tasks_wait() -> None:
    curiosity = Curiosity()
    assert not curiosity.is_due(100.0, is_waiting=True), "most work is done before that"
    assert not curiosity.is_due(100.0 + 0.9 * FIRST_QUESTION_SECONDS, is_waiting=True)
    now = 100.0 + FIRST_QUESTION_SECONDS
    assert curiosity.is_due(now, is_waiting=True)
    assert not curiosity.is_due(now + 0.9 * QUESTION_SECONDS, is_waiting=True)
    assert curiosity.is_due(now + QUESTION_SECONDS, is_waiting=True)
    assert not curiosity.is_due(now + 100, is_waiting=False)
    assert not curiosity.is_due(now + 200, is_waiting=True), "it begins anew"


def test_a_condition_that_lasts_is_told_of_and_seldom_again() -> None:
    conditions = Conditions()
    told = [
        second
        for second in range(2000)
        if conditions.observe({"none": max(100.0, float(second))}, 100.0 + second)
    ]
    first = WARN_SECONDS
    assert told == [first + n * REPEAT_SECONDS for n in range(7)]


def test_a_condition_that_ends_is_forgotten() -> None:
    conditions = Conditions()
    assert conditions.observe({"a": 100.0, "b": 104.0}, 104.0) == []
    assert conditions.observe({"a": 109.0, "b": 109.0}, 110.0) == ["a"]
    assert conditions.observe({"b": 111.0}, 114.0) == ["b"]
    assert conditions.observe({"a": 115.0}, 115.0) == []
    assert conditions.observe({"a": 115.0}, 125.0) == ["a"]


def test_what_is_known_to_have_lasted_is_told_of_at_once() -> None:
    assert Conditions().observe({"silence": 100.0}, 100.0 + WARN_SECONDS) == ["silence"]
