"""The submission's rules: kept until resolved, within credit, one outcome each,
blobs before their tasks.
"""

from __future__ import annotations

from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.submission import BLOBS_KEPT, Submission
from tests.unit.core.bench import BROKER, Bench, crossed

USER = "user"


class SubmissionBench(Bench):
    """A client's submissions, in a session if ``credit`` is not None; blobs 1 and 2 are known."""

    core: Submission

    def __init__(self, credit: int | None = 0) -> None:
        super().__init__(Submission())
        self.add_blob(1)
        self.add_blob(2)
        if credit is not None:
            self.connect(credit)

    def add_blob(self, blob: int) -> None:
        """A blob, whose payload tells its number."""
        self.core.add_blob(blob, b"b%d" % blob)
        self.step([])

    def connect(self, credit: int = 0) -> None:
        """A session begins."""
        self.step(self.core.connect(credit))

    def disconnect(self) -> None:
        """A session ends."""
        self.core.disconnect()
        self.step([])

    def submit(self, *ids: int, fn: int = 1, **group: Any) -> None:
        """Tasks of one group."""
        payloads: list[p.Payload] = [b"%d" % id for id in ids]
        self.step(self.core.submit(p.Group(fn, **{"init": 0, **group}), list(ids), payloads))

    def cancel(self, *ids: int, kill: bool = False) -> None:
        """The user cancels."""
        self.step(self.core.cancel(list(ids), kill=kill))

    def hear(self, message: Any) -> None:
        """The broker's message."""
        self.step(self.core.receive(crossed(message), self.now))


def blob(*blobs: int) -> list[tuple[str, Any]]:
    """Blobs on their way to the broker."""
    return [(BROKER, p.Blob(client=0, blob=blob, payload=b"b%d" % blob)) for blob in blobs]


def submit(*ids: int, fn: int = 1, **group: Any) -> tuple[str, Any]:
    """Tasks on their way to the broker."""
    payloads: list[p.Payload] = [b"%d" % id for id in ids]
    return BROKER, p.Submit(fn=fn, ids=list(ids), payloads=payloads, **{"init": 0, **group})


def again(*ids: int, fn: int = 1, **group: Any) -> tuple[str, Any]:
    """Tasks that an earlier broker had, on their way to another one."""
    return submit(*ids, fn=fn, is_again=True, **group)


RESUMED = (BROKER, p.Resumed())


def cancel(*ids: int, kill: bool = False) -> tuple[str, Any]:
    """A cancellation on its way to the broker."""
    return BROKER, p.Cancel(ids=list(ids), kill=kill)


def results(*ids: int) -> p.Results:
    """Outcomes of tasks, of which every other is an error."""
    statuses = bytes(id % 2 for id in ids)
    return p.Results(ids=list(ids), statuses=statuses, payloads=[b"v%d" % id for id in ids])


def failed(id: int) -> p.Failed:
    """The broker gives a task up."""
    return p.Failed(id=id, kind=p.LOST, story=["it was lost"])


def busy(*ids: int, credit: int = 0) -> SubmissionBench:
    """A bench that has submitted these tasks of blob 1."""
    bench = SubmissionBench(credit)
    bench.submit(*ids)
    bench.sent()
    return bench


# --- A task is kept until its outcome came --------------------------------------------------------


def test_a_task_goes_to_the_broker_and_its_result_to_the_user() -> None:
    """After that nothing of it is left."""
    bench = SubmissionBench()
    bench.submit(1, 2, chunk_max=7)
    assert bench.sent() == [*blob(1), submit(1, 2, chunk_max=7)]
    assert len(bench.core) == 2
    bench.hear(results(1, 2))
    assert bench.sent() == [(USER, results(1, 2))]
    assert len(bench.core) == 0
    assert repr(bench.core) == "<Submission 0 tasks | 0 not sent>"


def test_a_new_session_gets_everything_unresolved_again() -> None:
    """Payloads and blobs too, the oldest first, in their groups."""
    bench = busy(1, 2, 3)
    bench.submit(4, fn=2, init=1)
    assert bench.sent() == [*blob(2), submit(4, fn=2, init=1)]
    bench.submit(5)
    assert bench.sent() == [submit(5)]
    bench.hear(results(2))
    bench.sent()
    bench.disconnect()
    bench.connect()
    fourth = again(4, fn=2, init=1)
    assert bench.sent() == [*blob(1), again(1, 3), *blob(2), fourth, again(5), RESUMED]
    bench.hear(results(1, 3, 4, 5))
    assert bench.sent() == [(USER, results(1, 3, 4, 5))]


def test_a_session_that_begins_without_the_end_of_the_last_is_a_new_one() -> None:
    """The broker may be a new one all the same."""
    bench = busy(1, 2, 3, credit=2)
    bench.connect(1)
    assert bench.sent() == [*blob(1), again(1)]
    bench.connect(0)
    assert bench.sent() == [*blob(1), again(1, 2), submit(3), RESUMED]


def test_what_an_earlier_broker_had_is_marked_until_it_is_sent_again() -> None:
    """Also by the broker before that; what is resolved or cancelled meanwhile is not missed."""
    bench = busy(1, 2, 3, 4, credit=4)
    bench.submit(5)
    bench.disconnect()
    bench.connect(1)
    assert bench.sent() == [*blob(1), again(1)]
    bench.disconnect()
    bench.cancel(3)
    bench.connect(1)
    assert bench.sent() == [*blob(1), again(1)]
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1)), again(2)]
    bench.cancel(4)
    assert bench.sent() == [RESUMED]
    bench.hear(results(2))
    assert bench.sent() == [(USER, results(2)), submit(5)]


def test_without_a_session_tasks_wait() -> None:
    """Before the first one, and between two; those that are cancelled meanwhile never go out."""
    bench = SubmissionBench(credit=None)
    bench.submit(1, 2)
    bench.cancel(2)
    bench.connect()
    assert bench.sent() == [*blob(1), submit(1)]
    bench.disconnect()
    bench.submit(3, 4, 5, fn=2)
    bench.cancel(1, 4)
    assert repr(bench.core) == "<Submission 2 tasks | 2 not sent>"
    bench.connect()
    assert bench.sent() == [*blob(2), submit(3, 5, fn=2), RESUMED]


def test_what_was_said_before_the_session_ended_counts() -> None:
    """A result that was under way is one, and the task is not submitted again."""
    bench = busy(1, 2, 3)
    bench.disconnect()
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1))]
    bench.hear(failed(2))
    assert bench.sent() == [(USER, failed(2))]
    bench.connect()
    assert bench.sent() == [*blob(1), again(3), RESUMED]


@pytest.mark.parametrize(
    "message",
    [
        p.Running(ids=[1]),
        p.Cluster(workers=1, slots=2),
        p.Status([], [], 0, 0, 0, 0, 0, 0, 0.0),
        p.ShuttingDown(),
        p.Goodbye(reason="done"),
    ],
)
def test_what_does_not_end_a_task_is_handed_on(message: p.ToClient) -> None:
    """The user's side knows what to do with it."""
    bench = busy(1)
    bench.hear(message)
    assert bench.sent() == [(USER, message)]
    assert len(bench.core) == 1


def test_time_changes_nothing() -> None:
    """All that happens here happens because somebody spoke."""
    bench = busy(1)
    assert bench.core.next_deadline() is None
    bench.tick(1e6)


def test_groups_travel_apart() -> None:
    """Options, and blobs that payloads refer to, belong to a group;
    so does the size of its chunks.
    """
    options = p.Options(timeout=1.5, retries=2, priority=3, tags=("gpu",))
    bench = SubmissionBench()
    bench.submit(1, options=options, blobs=(2,), chunk_max=7)
    assert bench.sent() == [*blob(1, 2), submit(1, options=options, blobs=(2,), chunk_max=7)]
    bench.submit(2, options=options)
    assert bench.sent() == [submit(2, options=options)]
    bench.connect()
    assert bench.sent() == [
        *blob(1, 2),
        again(1, options=options, blobs=(2,), chunk_max=7),
        again(2, options=options),
        RESUMED,
    ]


ONCE = p.Options(at_most_once=True)


def test_what_may_run_once_and_another_broker_had_is_told_apart() -> None:
    """The broker knows whether a worker holds it;
    what the first one never had is like any other.
    """
    bench = SubmissionBench(credit=3)
    bench.submit(1)
    assert bench.sent() == [*blob(1), submit(1)]
    bench.submit(2, 3, 4, options=ONCE)
    assert bench.sent() == [submit(2, 3, options=ONCE)]
    bench.hear(results(2))
    assert bench.sent() == [(USER, results(2)), submit(4, options=ONCE)]
    bench.disconnect()
    bench.submit(5, options=ONCE)
    bench.connect(3)
    assert bench.sent() == [*blob(1), again(1), again(3, 4, options=ONCE), RESUMED]
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1)), submit(5, options=ONCE)]


def test_what_may_run_once_waits_for_the_first_broker() -> None:
    """Nobody can have started it."""
    bench = SubmissionBench(credit=None)
    bench.submit(1, options=ONCE)
    bench.connect()
    assert bench.sent() == [*blob(1), submit(1, options=ONCE)]


# --- Credit ---------------------------------------------------------------------------------------


def test_the_broker_holds_no_more_than_the_credit() -> None:
    """The rest waits here, in order, and goes out as outcomes come."""
    bench = SubmissionBench(credit=2)
    bench.submit(1, 2, 3, 4, 5)
    assert bench.sent() == [*blob(1), submit(1, 2)]
    bench.submit(6)
    bench.hear(results(2))
    assert bench.sent() == [(USER, results(2)), submit(3)]
    bench.hear(failed(1))
    assert bench.sent() == [(USER, failed(1)), submit(4)]
    bench.hear(results(3, 4))
    assert bench.sent() == [(USER, results(3, 4)), submit(5, 6)]


def test_tasks_that_use_up_the_credit_exactly_go_at_once() -> None:
    """And the next one waits."""
    bench = SubmissionBench(credit=2)
    bench.submit(1)
    assert bench.sent() == [*blob(1), submit(1)]
    bench.submit(2)
    assert bench.sent() == [submit(2)]
    bench.submit(3)
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1)), submit(3)]


def test_a_cancellation_gives_credit_back() -> None:
    """Of what the broker has; it is told before it gets more."""
    bench = busy(1, 2, 3, 4, 5, credit=2)
    bench.cancel(3)
    bench.cancel(1, 4)
    assert bench.sent() == [cancel(1), submit(5)]


def test_a_cancellation_lets_those_pass_that_waited_behind_it() -> None:
    """Of a task that did not fit into what the broker takes in bytes."""
    bench = SubmissionBench(credit=None)
    bench.step(bench.core.connect(0, credit_bytes=8))
    bench.submit(1)
    bench.sent()
    bench.submit(12_345_678, 2)
    bench.cancel(12_345_678)
    assert bench.sent() == [submit(2)]


def test_dropped_outcomes_give_no_credit_back() -> None:
    """The cancellation did."""
    bench = busy(1, 2, 3, 4, credit=2)
    bench.cancel(1)
    assert bench.sent() == [cancel(1), submit(3)]
    bench.hear(results(1))
    bench.hear(failed(1))
    bench.hear(results(1, 2))
    assert bench.sent() == [(USER, results(2)), submit(4)]


def test_credit_begins_anew_with_a_session() -> None:
    """It may be another one's."""
    bench = busy(1, 2, 3, 4, credit=1)
    bench.disconnect()
    bench.connect(3)
    assert bench.sent() == [*blob(1), again(1), submit(2, 3), RESUMED]
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1)), submit(4)]


def test_one_message_holds_no_more_than_it_may() -> None:
    """From the user's call, and from what waited."""
    ids = range(1, 2 * p.TASKS_MAX + 2)
    parts = [
        submit(*ids[: p.TASKS_MAX]),
        submit(*ids[p.TASKS_MAX : -1]),
        submit(ids[-1]),
    ]
    bench = SubmissionBench()
    bench.submit(*ids)
    assert bench.sent() == [*blob(1), *parts]
    bench.connect()
    parts = [again(*message.ids) for _, message in parts]
    assert bench.sent() == [*blob(1), *parts, RESUMED]


def test_the_largest_message_is_one() -> None:
    """It fits exactly."""
    ids = range(1, p.TASKS_MAX + 1)
    bench = SubmissionBench()
    bench.submit(*ids)
    assert bench.sent() == [*blob(1), submit(*ids)]


# --- One outcome each -----------------------------------------------------------------------------


def test_a_second_outcome_is_dropped() -> None:
    """Whatever the first was."""
    bench = busy(1, 2)
    bench.hear(results(1))
    bench.sent()
    bench.hear(results(1))
    bench.hear(failed(1))
    bench.hear(failed(2))
    bench.sent()
    bench.hear(failed(2))
    bench.hear(results(1, 2))
    assert len(bench.core) == 0


def test_outcomes_of_what_the_broker_never_had_are_dropped() -> None:
    """A broken one may tell of them; the tasks still run."""
    bench = busy(1, 2, 3, 4, credit=1)
    bench.hear(failed(2))
    bench.hear(results(3, 4))
    assert len(bench.core) == 4
    bench.hear(results(1, 2))
    assert bench.sent() == [(USER, results(1)), submit(2)]
    bench.disconnect()
    bench.hear(results(4))
    bench.connect()
    assert bench.sent() == [*blob(1), again(2), submit(3, 4), RESUMED]
    bench.hear(results(2, 3, 4))
    assert bench.sent() == [(USER, results(2, 3, 4))]


def test_of_a_message_only_the_new_outcomes_are_handed_on() -> None:
    """Each with its own status and payload, and once where one is named twice."""
    bench = busy(1, 2, 3, 4)
    bench.hear(results(2))
    bench.sent()
    bench.hear(results(1, 2, 3, 3, 99, 4))
    assert bench.sent() == [(USER, results(1, 3, 4))]


def test_a_cancelled_task_has_no_outcome() -> None:
    """Cancelled twice, or after its outcome, it is passed over."""
    bench = busy(1, 2, 3)
    bench.cancel(1, 1, 99)
    assert bench.sent() == [cancel(1)]
    bench.cancel(1)
    bench.hear(results(1))
    bench.hear(results(2))
    bench.sent()
    bench.cancel(2)
    bench.cancel(2, 3)
    assert bench.sent() == [cancel(3)]
    assert len(bench.core) == 0


def test_a_kill_goes_along_with_the_cancellation() -> None:
    """Only the broker knows what runs."""
    bench = busy(1, 2, 3, credit=1)
    bench.cancel(1, 2, kill=True)
    assert bench.sent() == [cancel(1, kill=True), submit(3)]


def test_a_long_cancellation_goes_in_messages_that_the_broker_reads() -> None:
    ids = list(range(1, 2 * p.TASKS_MAX + 2))
    bench = SubmissionBench()
    for at in range(0, len(ids), p.TASKS_MAX):
        bench.submit(*ids[at : at + p.TASKS_MAX], fn=0)
        bench.sent()
    bench.cancel(*ids)
    lengths = [len(message.ids) for _, message in bench.sent()]
    assert lengths == [p.TASKS_MAX, p.TASKS_MAX, 1]


# --- Blobs ----------------------------------------------------------------------------------------


def test_blobs_go_before_the_first_task_that_names_them() -> None:
    """Function and initializer alike, and once; 0 is none."""
    bench = SubmissionBench()
    bench.submit(1, fn=0)
    assert bench.sent() == [submit(1, fn=0)]
    bench.submit(2, fn=2, init=1)
    assert bench.sent() == [*blob(2, 1), submit(2, fn=2, init=1)]
    bench.submit(3, fn=1, init=2)
    assert bench.sent() == [submit(3, fn=1, init=2)]


def test_blobs_wait_with_their_tasks() -> None:
    """They go when these do."""
    bench = SubmissionBench(credit=1)
    bench.submit(1, fn=0)
    bench.sent()
    bench.submit(2, fn=1)
    bench.submit(3, fn=2)
    bench.hear(results(1))
    assert bench.sent() == [(USER, results(1)), *blob(1), submit(2, fn=1)]
    bench.hear(results(2))
    assert bench.sent() == [(USER, results(2)), *blob(2), submit(3, fn=2)]


def test_a_blob_that_is_known_stays_what_it_is() -> None:
    """Its number never names another."""
    bench = SubmissionBench()
    bench.core.add_blob(1, b"something else")
    bench.submit(1)
    assert bench.sent() == [*blob(1), submit(1)]


def used(count: int) -> SubmissionBench:
    """A bench that has used so many blobs, one after the other; blob 2 was not."""
    bench = SubmissionBench()
    for number in (1, *range(3, count + 3))[:count]:
        bench.add_blob(number)
        bench.submit(number, fn=number)
        assert bench.sent() == [*blob(number), submit(number, fn=number)]
        bench.hear(results(number))
        assert bench.sent() == [(USER, results(number))]
    return bench


def forget(*blobs: int) -> list[tuple[str, Any]]:
    """Blobs that the broker may forget."""
    return [(BROKER, p.Forget(client=0, blobs=list(blobs)))]


def test_blobs_that_were_used_long_ago_are_forgotten() -> None:
    """One that is used again is sent again."""
    bench = used(BLOBS_KEPT - 1)
    last = BLOBS_KEPT
    bench.submit(1)
    bench.sent()
    bench.hear(results(1))
    bench.sent()
    for number in (last + 1, last + 2):
        bench.add_blob(number)
    bench.submit(last + 1, fn=last + 1, init=last + 2)
    bench.sent()
    assert bench.core.knows_blob(2)
    bench.hear(results(last + 1))  # two too many: 2, which never went out, and 3
    assert bench.sent() == [(USER, results(last + 1)), *forget(3)]
    assert [bench.core.knows_blob(number) for number in (1, 2, 3, 4)] == [True, False, False, True]
    bench.add_blob(3)
    bench.submit(last + 3, fn=3)
    assert bench.sent() == [*blob(3), submit(last + 3, fn=3)]


def test_a_blob_that_never_went_out_is_dropped_in_silence() -> None:
    """The broker does not know it."""
    bench = used(BLOBS_KEPT - 1)
    bench.add_blob(1000)
    bench.submit(1000, fn=1000)
    bench.sent()
    bench.hear(results(1000))
    assert bench.sent() == [(USER, results(1000))]
    assert not bench.core.knows_blob(2)


def test_blobs_of_unresolved_tasks_are_not_forgotten() -> None:
    """Nor is any while the session is over, when nobody can be told."""
    bench = SubmissionBench(credit=None)
    blobs = range(3, BLOBS_KEPT + 3)
    for number in blobs:
        bench.add_blob(number)
    bench.submit(1, fn=2, init=1)
    for number in blobs:
        bench.submit(number, fn=number)
    bench.cancel(3, 4)
    bench.disconnect()
    assert bench.core.knows_blob(3)
    bench.connect()
    *_, last = bench.sent()
    assert last == submit(blobs[-1], fn=blobs[-1])
    assert [bench.core.knows_blob(number) for number in (1, 2, 3, 4)] == [True, True, False, False]


def test_a_blob_that_is_needed_for_long_is_not_forgotten() -> None:
    """However many others came and went since."""
    bench = SubmissionBench()
    bench.submit(1)
    bench.sent()
    for number in range(3, BLOBS_KEPT + 1):
        bench.add_blob(number)
        bench.submit(number, fn=number)
        bench.sent()
        bench.hear(results(number))
        assert bench.sent() == [(USER, results(number))]
    for number in (BLOBS_KEPT + 1, BLOBS_KEPT + 2):
        bench.add_blob(number)
    bench.submit(BLOBS_KEPT + 1, fn=BLOBS_KEPT + 1, init=BLOBS_KEPT + 2)
    bench.sent()
    bench.hear(results(BLOBS_KEPT + 1))
    assert bench.sent() == [(USER, results(BLOBS_KEPT + 1)), *forget(3)]
    assert [bench.core.knows_blob(number) for number in (1, 2, 3, 4)] == [True, False, False, True]


def test_blobs_that_payloads_refer_to_are_needed_too() -> None:
    """As long as the task is unresolved."""
    bench = used(BLOBS_KEPT - 1)
    bench.submit(1000, fn=0, blobs=(3, 2))
    assert bench.sent() == [*blob(2), submit(1000, fn=0, blobs=(3, 2))]
    bench.add_blob(1001)
    bench.submit(1001, fn=1001)
    bench.sent()
    bench.hear(results(1001))
    assert bench.sent() == [(USER, results(1001)), *forget(1)]
    bench.add_blob(1002)
    bench.hear(results(1000))
    assert bench.sent() == [(USER, results(1000)), *forget(4)]


def test_blobs_are_not_forgotten_while_tasks_wait() -> None:
    """The next of them may name one that nobody named for long."""
    bench = used(BLOBS_KEPT - 1)
    bench.connect(1)
    assert bench.sent() == [RESUMED]
    bench.add_blob(1000)
    bench.submit(1000, fn=1000)
    bench.sent()
    bench.submit(1001)
    bench.submit(1002)
    bench.hear(results(1000))
    assert bench.sent() == [(USER, results(1000)), *blob(1), submit(1001)]
    assert bench.core.knows_blob(2)
    bench.hear(results(1001))
    assert bench.sent() == [(USER, results(1001)), submit(1002)]
    assert not bench.core.knows_blob(2)


def test_blobs_are_not_forgotten_while_nobody_can_be_told() -> None:
    """The next session begins with none at all."""
    bench = used(BLOBS_KEPT - 1)
    bench.add_blob(1000)
    bench.submit(1000, fn=1000, blobs=(2,))
    bench.sent()
    bench.disconnect()
    bench.hear(results(1000))
    assert bench.sent() == [(USER, results(1000))]
    assert bench.core.knows_blob(1)
    bench.connect()
    assert bench.sent() == [RESUMED]
    assert not bench.core.knows_blob(1)
    bench.submit(1001, fn=1000)
    assert bench.sent() == [*blob(1000), submit(1001, fn=1000)]
