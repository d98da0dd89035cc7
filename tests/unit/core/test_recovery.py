"""A broker that follows another one: who holds what, who asks for it,
and for how long that is waited for.
"""

from __future__ import annotations

from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.recovery import IN_DOUBT, LETTERS_MAX, stable_number
from achilles.core.scheduler import Scheduler
from achilles.errors import ProtocolError
from tests.unit.core.bench import CLIENT, SECOND, WORKER, SchedulerBench, of, runs

OLD = 1 << 32  # leases of an earlier broker
PATIENCE = 30.0
WINDOW = 3.0


def incarnation(name: str) -> bytes:
    """A peer's, which it keeps for its life."""
    return name.encode().ljust(16)


def number(name: str) -> int:
    """What brokers call it."""
    return stable_number(incarnation(name))


class RecoveryBench(SchedulerBench):
    """A scheduler of epoch 2, which awaits these workers; None: it does not know whom."""

    def __init__(self, *awaited: str, is_known: bool = True) -> None:
        self.now = 100.0
        self.core = Scheduler(
            now=self.now,
            epoch=2,
            recovery=WINDOW,
            patience=PATIENCE,
            awaited=frozenset(map(number, awaited)) if is_known else None,
        )

    def client(self, name: str = CLIENT, *, is_back: bool = True) -> list[Any]:
        """A client says hello."""
        hello = p.ClientHello(incarnation(name), "client", "0", "3", name, is_back=is_back)
        return self._check(self.core.join(name, hello, self.now))

    def worker(self, name: str = WORKER, slots: int = 1, *, is_back: bool = True) -> list[Any]:
        """A worker says hello."""
        hello = p.WorkerHello(incarnation(name), "0", "3", name, slots, 1, is_back=is_back)
        return self._check(self.core.join(name, hello, self.now))

    def holds(self, lease: int, *ids: int, worker: str = WORKER, **fields: Any) -> list[Any]:
        """A worker tells of a lease of an earlier broker's."""
        fields = {"indexes": list(range(len(ids))), "blobs": [], "client": number(CLIENT), **fields}
        return self.say(worker, p.Held(OLD + lease, ids=list(ids), **fields))

    def again(self, *ids: int, options: p.Options | None = None) -> list[Any]:
        """The client submits tasks that an earlier broker had."""
        payloads: list[p.Payload] = [b"%d" % id for id in ids]
        message = p.Submit(0, 0, list(ids), payloads, options=options, is_again=True)
        return self.say(CLIENT, message)

    def known(self) -> set[int] | None:
        """The numbers of the workers that there are, or may be."""
        return None if self.core.workers is None else set(self.core.workers)

    def resumed(self, peer: str) -> list[Any]:
        """A peer has told all."""
        return self.say(peer, p.Resumed())

    def value(self, lease: int, index: int = 0, worker: str = WORKER) -> list[Any]:
        """A result of an earlier broker's lease."""
        return self.say(worker, p.Done(OLD + lease, [index], b"\0", [b"value"], 0.5))


def results(*ids: int, seconds: float = 0.5) -> tuple[str, p.Results]:
    return CLIENT, p.Results(list(ids), bytes(len(ids)), [b"value"] * len(ids), seconds)


def revoke(lease: int, *indexes: int, worker: str = WORKER) -> tuple[str, p.Revoke]:
    return worker, p.Revoke(OLD + lease, list(indexes), kill=True)


# --- What is held goes on -------------------------------------------------------------------------


@pytest.mark.parametrize("is_client_first", [True, False])
def test_what_is_held_goes_on_whoever_comes_first(is_client_first: bool) -> None:
    bench = RecoveryBench(WORKER)

    def client() -> None:
        bench.client()
        assert runs(bench.again(1, 2)) == []

    if is_client_first:
        client()
    bench.worker()
    assert bench.holds(1, 1) == []
    sends = bench.resumed(WORKER)
    if not is_client_first:
        client()
        sends = bench.tick(0.1)
    else:
        sends += bench.tick(0.1)
    (running,) = of(sends, p.Running)
    assert running.ids == [1]
    (status,) = of(bench.say(CLIENT, p.StatusRequest()), p.Status)
    assert (status.queued, status.running) == (1, 1) or runs(sends)
    sends = bench.value(1)
    assert sends[0] == results(1)


def test_a_result_waits_for_its_client() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    assert bench.value(1) == []
    bench.resumed(WORKER)
    bench.tick(10.0)
    bench.client()
    sends = bench.again(1, 2)
    assert sends[0] == results(1, seconds=0.0)
    assert [run.ids for run in runs(sends)] == [[2]]
    bench.resumed(CLIENT)
    assert of(bench.say(CLIENT, p.StatusRequest()), p.Status)[0].done == 1


def test_a_result_that_raised_has_its_retries_yet() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    bench.holds(2, 2)
    bench.say(WORKER, p.Done(OLD + 1, [0], bytes([p.ERROR]), [b"error"], 0.1))
    bench.resumed(WORKER)
    bench.client()
    (run,) = runs(bench.again(1, options=p.Options(retries=1)))
    assert (run.ids, run.attempt) == ([1], 2)


@pytest.mark.parametrize("kind", [p.TIMEOUT, p.MEMORY])
@pytest.mark.parametrize("retries", [0, 1])
def test_what_took_too_much_before_its_client_is_back_has_its_retries_and_no_more(
    kind: str, retries: int
) -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    bench.resumed(WORKER)
    assert bench.say(WORKER, p.Crashed(OLD + 1, 0, "took too much", kind)) == []
    bench.client()
    sends = bench.again(1, options=p.Options(timeout=5.0, retries=retries))
    assert [run.ids for run in runs(sends)] == [[1]] * retries
    assert [(failed.id, failed.kind) for failed in of(sends, p.Failed)] == [(1, kind)] * (
        1 - retries
    )
    bench.resumed(CLIENT)


def test_a_later_attempt_is_the_one_to_have_also_where_the_earlier_took_too_long() -> None:
    """It was charged by the broker that is gone, and the task has gone on elsewhere."""
    bench = RecoveryBench(WORKER, SECOND)
    bench.worker()
    bench.holds(1, 1)
    bench.say(WORKER, p.Crashed(OLD + 1, 0, "took too long", p.TIMEOUT))
    bench.worker(SECOND)
    assert bench.holds(2, 1, worker=SECOND, attempt=2) == []
    for name in (WORKER, SECOND):
        bench.resumed(name)
    bench.client()
    sends = bench.again(1, options=p.Options(timeout=5.0, retries=1))
    assert (runs(sends), of(sends, p.Failed)) == ([], [])
    assert bench.value(2, worker=SECOND)[0] == results(1)


def test_what_crashes_before_its_client_is_back_runs_again_for_it() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    bench.resumed(WORKER)
    assert bench.say(WORKER, p.Crashed(OLD + 1, 0, "died")) == []
    bench.client()
    assert [run.ids for run in runs(bench.again(1))] == [[1]]


def test_what_is_held_by_a_worker_that_is_lost_runs_elsewhere() -> None:
    bench = RecoveryBench(WORKER, SECOND)
    bench.worker()
    bench.holds(1, 1)
    bench.worker(SECOND)
    bench.resumed(WORKER)
    bench.resumed(SECOND)
    bench.leave(WORKER)
    bench.client()
    ((to, run),) = [send for send in bench.again(1) if isinstance(send[1], p.Run)]
    assert (to, run.ids, run.attempt) == (SECOND, [1], 1)


@pytest.mark.parametrize(("status", "is_run_on"), [(p.ERROR, True), (p.VALUE, False)])
def test_a_later_attempt_is_the_one_to_have_also_where_the_earlier_raised(
    status: int, is_run_on: bool
) -> None:
    """Its report comes late, for its worker did not hear that the last broker had it.
    A value is enough, whichever it is.
    """
    bench = RecoveryBench(WORKER, SECOND)
    bench.worker()
    bench.holds(1, 1)
    bench.resumed(WORKER)
    bench.say(WORKER, p.Done(OLD + 1, [0], bytes([status]), [b"value"], 0.5))
    bench.worker(SECOND)
    revoked = bench.holds(2, 1, worker=SECOND, attempt=2)
    assert revoked == ([] if is_run_on else [revoke(2, 0, worker=SECOND)])
    bench.resumed(SECOND)
    bench.client()
    sends = bench.again(1, options=p.Options(retries=3))
    if is_run_on:
        assert sends == []
        sends = bench.value(2, worker=SECOND)
    assert of(sends, p.Results)[0].ids == [1]
    assert runs(sends) == []


def test_attempts_go_on_counting() -> None:
    bench = RecoveryBench(WORKER)
    bench.client()
    bench.again(1)
    bench.worker()
    bench.holds(1, 1, attempt=3)
    bench.resumed(WORKER)
    (run,) = runs(bench.say(WORKER, p.Crashed(OLD + 1, 0, "died")))
    assert run.attempt == 4


def test_an_attempt_that_two_workers_tell_of_counts_once() -> None:
    """The later one comes first; its worker did not hear, as little as the other,
    that its report had arrived.
    """
    bench = RecoveryBench(WORKER, SECOND)
    bench.client()
    bench.again(1)
    sends: list[Any] = []
    for peer, lease, attempt in ((WORKER, 2, 2), (SECOND, 1, 1)):
        bench.worker(peer)
        bench.holds(lease, 1, worker=peer, attempt=attempt)
        sends = bench.say(peer, p.Crashed(OLD + lease, 0, "died"))
        sends += bench.resumed(peer)
    (run,) = runs([*sends, *bench.tick(WINDOW)])
    assert run.attempt == 3


def test_a_held_lease_takes_up_its_slot() -> None:
    bench = RecoveryBench(WORKER)
    bench.client()
    bench.again(1, 2, 3)
    bench.worker()
    bench.holds(1, 1)
    bench.holds(2, 2)
    assert runs(bench.resumed(WORKER)) == []
    assert [run.ids for run in runs(bench.value(1))] == []  # the second lease has the slot now
    assert [run.ids for run in runs(bench.value(2))] == [[3]]


def test_a_blob_that_the_worker_has_is_not_sent_again() -> None:
    bench = RecoveryBench(WORKER)
    bench.client()
    bench.say(CLIENT, p.Blob(0, 1, b"f"))
    bench.say(CLIENT, p.Submit(1, 0, [1, 2], [b"1", b"2"], is_again=True))
    bench.worker(slots=2)
    bench.holds(1, 1, blobs=[1])
    sends = bench.resumed(WORKER)
    assert [run.ids for run in runs(sends)] == [[2]]
    assert of(sends, p.Blob) == []


# --- What nobody wants ----------------------------------------------------------------------------


def test_what_the_client_does_not_ask_for_is_taken_back() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1, 2, 3)
    bench.client()
    bench.again(2)
    assert bench.resumed(CLIENT) == [revoke(1, 0, 2)]
    assert bench.holds(2, 7) == [revoke(2, 0)]  # nor does it later
    assert bench.value(1, 0) == []
    assert bench.value(1, 1) == [results(2)]


def test_two_workers_hold_the_same() -> None:
    """One of them is enough."""
    bench = RecoveryBench(WORKER, SECOND)
    bench.worker()
    bench.worker(SECOND)
    bench.holds(1, 1)
    assert bench.holds(2, 1, worker=SECOND) == [revoke(2, 0, worker=SECOND)]
    bench.client()
    bench.again(1)
    assert bench.holds(3, 1, worker=SECOND, indexes=[0])[-1] == revoke(3, 0, worker=SECOND)


def test_a_client_that_does_not_come_back_is_forgotten() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1, blobs=[4])
    bench.resumed(WORKER)
    assert bench.tick(PATIENCE - 0.1) == []
    assert bench.tick(0.1) == [revoke(1, 0), (WORKER, p.Forget(number(CLIENT), []))]
    bench.say(WORKER, p.Returned(OLD + 1, [0]))
    bench.client()
    assert [run.ids for run in runs(bench.again(1))] == [[1]]
    bench.worker(SECOND)
    assert bench.holds(2, 9, worker=SECOND, client=number("nobody")) == [
        revoke(2, 0, worker=SECOND)
    ]


def test_a_client_that_begins_anew_asks_for_nothing() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    assert revoke(1, 0) in bench.client(is_back=False)


# --- How long is waited ---------------------------------------------------------------------------


def test_tasks_are_held_back_until_all_workers_are_back() -> None:
    bench = RecoveryBench(WORKER, SECOND)
    bench.client()
    bench.again(1)
    bench.worker()
    assert runs(bench.resumed(WORKER)) == []
    bench.worker(SECOND)
    assert bench.holds(1, 1, worker=SECOND) == []
    assert runs(bench.resumed(SECOND)) == []
    assert runs(bench.again(2)) != []


def test_or_for_a_bounded_time() -> None:
    bench = RecoveryBench(WORKER, SECOND)
    bench.client()
    bench.again(1)
    bench.worker()
    bench.resumed(WORKER)
    assert runs(bench.tick(WINDOW - 0.01)) == []
    assert [run.ids for run in runs(bench.tick(0.01))] == [[1]]
    bench.worker(SECOND)
    assert bench.holds(1, 1, worker=SECOND) == [revoke(1, 0, worker=SECOND)]


def test_also_if_nobody_knows_which_workers_there_were() -> None:
    bench = RecoveryBench(is_known=False)
    assert bench.known() is None
    bench.client()
    bench.again(1)
    bench.worker()
    assert runs(bench.resumed(WORKER)) == []
    assert [run.ids for run in runs(bench.tick(WINDOW))] == [[1]]
    assert bench.known() == {number(WORKER)}


def test_a_late_worker_keeps_what_nobody_else_has() -> None:
    bench = RecoveryBench()
    bench.client()
    bench.again(1, 2)
    bench.worker()
    assert bench.holds(1, 2) == []
    assert runs(bench.resumed(WORKER)) == []
    assert [run.ids for run in runs(bench.value(1))] == [[1]]


def test_others_are_not_kept_waiting() -> None:
    """Who submits for the first time has nothing that a worker could hold."""
    bench = RecoveryBench(SECOND)
    bench.client("new", is_back=False)
    bench.worker(is_back=False)
    sends = bench.submit(1, peer="new", fn=0)
    assert [run.ids for run in runs(sends)] == [[1]]


def test_a_broker_that_sleeps_gives_everybody_more_time() -> None:
    bench = RecoveryBench(WORKER)
    bench.client()
    bench.again(1)
    bench.worker(SECOND)
    bench.resumed(SECOND)
    bench.now += WINDOW
    bench.core.amnesty(bench.now)
    assert runs(bench.tick(WINDOW - 0.1)) == []
    assert runs(bench.tick(0.1)) != []


def test_the_workers_that_may_come_back_are_known() -> None:
    """So that a third broker awaits those whom the second did not see."""
    bench = RecoveryBench(WORKER, SECOND)
    assert bench.known() == {number(WORKER), number(SECOND)}
    bench.worker()
    bench.worker("third", is_back=False)
    assert bench.known() == {number(WORKER), number(SECOND), number("third")}
    bench.tick(WINDOW)
    assert bench.known() == {number(WORKER), number("third")}
    bench.leave("third")
    assert bench.known() == {number(WORKER)}


# --- At most once ---------------------------------------------------------------------------------

ONCE = p.Options(at_most_once=True)


def test_what_may_run_once_goes_on_where_it_is_held_and_fails_where_not() -> None:
    bench = RecoveryBench(WORKER)
    bench.client()
    bench.again(1, 2, options=ONCE)
    bench.say(CLIENT, p.Submit(0, 0, [3], [b"3"], options=ONCE))
    bench.worker(slots=2)
    bench.holds(1, 1)
    sends = bench.resumed(WORKER)
    assert of(sends, p.Failed) == [p.Failed(2, p.LOST, [IN_DOUBT])]
    assert [run.ids for run in runs(sends)] == [[3]]
    assert bench.value(1) == [results(1)]
    assert of(bench.again(4, options=ONCE), p.Failed) == [p.Failed(4, p.LOST, [IN_DOUBT])]


# --- Letters --------------------------------------------------------------------------------------


def test_what_is_printed_waits_for_the_client() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    printed = p.Letter(0, 1, number(CLIENT), p.OUTPUT, b"line")
    for _ in range(LETTERS_MAX + 1):
        assert bench.say(WORKER, printed) == []
    assert bench.say(WORKER, p.Letter(0, 1, number(CLIENT), p.IMPORT, b"?")) == []
    letters = of(bench.client(), p.Letter)
    assert [letter.body for letter in letters] == [b"line"] * LETTERS_MAX
    assert len(bench.say(WORKER, printed)) == 1


# --- Who may say it -------------------------------------------------------------------------------


def test_only_who_is_back_tells_what_it_holds() -> None:
    bench = RecoveryBench()
    bench.worker(is_back=False)
    with pytest.raises(ProtocolError, match="only a worker that is back"):
        bench.holds(1, 1)
    with pytest.raises(ProtocolError, match="only a worker that is back"):
        bench.resumed(WORKER)


def test_a_lease_is_an_earlier_brokers_and_told_once() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker(slots=3)
    with pytest.raises(ProtocolError, match="was not made by an earlier broker"):
        bench.holds((2 << 32) - OLD + 1, 1)
    bench.holds(1, 1)
    with pytest.raises(ProtocolError, match="was not made by an earlier broker"):
        bench.holds(1, 1)


def test_more_leases_than_a_worker_can_have_are_taken_back() -> None:
    bench = RecoveryBench(WORKER)
    bench.worker()
    bench.holds(1, 1)
    bench.holds(2, 2)
    assert bench.holds(3, 3) == [revoke(3, 0)]


def test_numbers_are_the_same_for_each_broker_and_never_shared() -> None:
    bench = RecoveryBench()
    bench.client()
    assert number(CLIENT) != number(WORKER)
    assert 1 << 62 <= number(CLIENT) < 1 << 63
    hello = p.ClientHello(incarnation(CLIENT), "client", "0", "3", "copy")
    bench.core.join("copy", hello, bench.now)
    first, second = (client.number for client in bench.core._clients.values())
    assert first == number(CLIENT) != second
