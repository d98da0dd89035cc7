from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import pytest

from achilles import mailbox
from achilles.core import protocol as p
from achilles.core.submission import Submission
from achilles.errors import (
    BrokerLostError,
    InitializerError,
    ResultUnpickleError,
    SealError,
    TaskCrashedError,
    WorkerLostError,
)
from achilles.futures import MapRun
from achilles.mailbox import FAILED, INIT_BLOB, YIELD_AT, YIELD_EACH, YIELD_SECONDS, Mailbox
from achilles.runtime.allowed import Allowed
from achilles.runtime.seal import CALL_SIZE, Seal, Sealer, seal_result
from achilles.runtime.serialize import dumps, load_outcome
from achilles.runtime.tracebacks import dump_error
from tests.modes import wait_until


def read(status: int, payload: Any) -> tuple[Any, BaseException | None]:
    return (None, payload) if status == FAILED else load_outcome(status, payload)


class Box(Mailbox):
    """A mailbox that counts how often it wakes; this thread is the I/O thread."""

    def __init__(self) -> None:
        self.wakes = 0
        super().__init__(self.wake)
        self.plain = self.group(1, 0, 0)

    def wake(self) -> None:
        self.wakes += 1

    def add(self, name: str = "f") -> Any:
        return self.submit(self.plain, b"blob", b"payload", name)


@pytest.fixture
def box() -> Box:
    return Box()


def values(*ids: int) -> p.Results:
    return p.Results(list(ids), bytes([p.VALUE] * len(ids)), [dumps(id * 10) for id in ids])


def test_what_was_submitted_comes_out_by_group_and_in_order(box: Box) -> None:
    other = box.group(2, INIT_BLOB, 5)
    assert box.group(2, INIT_BLOB, 5) is other
    run = MapRun(read)
    for n in range(4):
        box.submit(box.plain, b"blob", b"%d" % n, "f")
        box.submit_item(other, b"other", b"%d" % n, run, n)
    assert box.unresolved == 8
    assert box.has_mail
    batches, cancels = box.drain()
    assert [(batch.group, batch.blob, batch.ids, batch.payloads) for batch in batches] == [
        (box.plain, b"blob", [1, 3, 5, 7], [b"0", b"1", b"2", b"3"]),
        (other, b"other", [2, 4, 6, 8], [b"0", b"1", b"2", b"3"]),
    ]
    assert cancels == []
    assert not box.has_mail
    assert not box.is_empty


def test_it_wakes_once_until_the_io_thread_looks(box: Box) -> None:
    box.add()
    box.add()
    assert box.wakes == 1
    assert not box.is_idle()
    box.drain()
    assert box.is_idle()
    box.interrupt()
    box.interrupt()
    assert box.wakes == 2


def test_who_submits_without_a_pause_lets_the_io_thread_in(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever there is as much to do as is being done (not for a few, and ever less often for
    many), and with every so many that it does not get to.
    """
    pauses: list[tuple[int, int]] = []

    def pause(seconds: float) -> None:
        assert seconds == YIELD_SECONDS
        pauses.append((len(box._inbox), len(box._sinks)))
        box.drain()

    monkeypatch.setattr(mailbox, "sleep", pause)
    for _ in range(YIELD_AT - 1):
        box.add()
    assert pauses == []
    run = MapRun(read)
    for index in range(1000):
        box.submit_item(box.plain, b"blob", b"payload", run, index)
    assert pauses == [(8, 0), (16, 8), (32, 24), (64, 56), (128, 120), (256, 248)]
    box.drain()
    waited: list[int] = []
    monkeypatch.setattr(mailbox, "sleep", lambda seconds: waited.append(len(box._inbox)))
    for _ in range(5 * YIELD_EACH):  # it does not get in
        box.add()
    met = YIELD_AT + len(box._sinks)
    assert waited == sorted([*range(YIELD_EACH - 1, 5 * YIELD_EACH, YIELD_EACH), met])


def test_who_closes_before_the_io_thread_waits_is_not_missed(box: Box) -> None:
    box.is_awake = True  # the I/O thread has just seen that nobody wants it to end
    box.finish()
    assert box.wakes == 0
    assert not box.is_idle()


def test_results_resolve_futures_and_items(box: Box) -> None:
    future, run = box.add(), MapRun(read)
    item = box.submit_item(box.plain, b"blob", b"payload", run, 4)
    box.drain()
    assert box.receive(values(1, item, 99)) == []
    assert future.result(0) == 10
    assert run.take(4) == 20
    assert box.is_empty


def test_errors_have_their_cause(box: Box) -> None:
    future = box.add()
    box.drain()
    try:
        raise LookupError("there")
    except LookupError as error:
        box.receive(p.Results([1], bytes([p.ERROR]), [dump_error(error)]))
    assert isinstance(future.exception(0), LookupError)
    assert "LookupError: there" in str(future.exception(0).__cause__)


def test_running_finds_out_what_was_cancelled(box: Box) -> None:
    first, second = box.add(), box.add()
    box.drain()
    assert second.cancel()
    assert box.receive(p.Running([1, 2, 99])) == [2]
    assert first.running()
    assert second.cancelled()
    assert box.drain() == ([], [2])


@pytest.mark.bad_input(52)
def test_given_up_tasks_are_named(box: Box) -> None:
    crashed, lost = box.add("work"), box.add("work")
    run = MapRun(read)
    run.name = "each"
    item = box.submit_item(box.plain, b"blob", b"payload", run, 4)
    box.drain()
    story = ["killed by SIGKILL on worker a", "killed by SIGSEGV on worker b"]
    box.receive(p.Failed(1, p.CRASHED, story))
    box.receive(p.Failed(2, p.LOST, ["worker a vanished"]))
    box.receive(p.Failed(item, p.CRASHED, story))
    box.receive(p.Failed(99, p.CRASHED, story))
    assert type(crashed.exception(0)) is TaskCrashedError
    assert str(crashed.exception(0)).endswith(
        "attempt 1: killed by SIGKILL on worker a; attempt 2: killed by SIGSEGV on worker b"
    )
    assert str(crashed.exception(0)).startswith("work() (task 1)")
    assert type(lost.exception(0)) is WorkerLostError
    with pytest.raises(TaskCrashedError, match=r"each\(\), item 4 of a map \(task 3\)"):
        run.take(4)


def test_what_does_not_run_can_be_cancelled_together(box: Box) -> None:
    running, waiting, run = box.add(), box.add(), MapRun(read)
    items = [box.submit_item(box.plain, b"blob", b"payload", run, index) for index in range(2)]
    box.drain()
    box.receive(p.Running([1, items[0]]))
    assert box.cancel_pending() == [2, items[1]]
    assert running.running()
    assert waiting.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        run.take(1)
    box.drop([2, items[1]])
    box.receive(values(1, items[0]))
    assert run.take(0) == 30
    assert box.is_empty


def test_a_failed_initializer_fails_everything(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    box.init_blob = b"given"
    futures = [box.add() for _ in range(3)]
    box.drain()
    late = box.add()
    done = p.Results([2], bytes([p.INIT_FAILED]), [dump_error(LookupError("at the start"))])
    assert sorted(box.receive(done)) == [1, 2, 3, 4]
    errors = [future.exception(0) for future in [*futures, late]]
    assert {type(error) for error in errors} == {InitializerError}
    assert len(set(map(id, errors))) == 4
    assert isinstance(errors[0].__cause__, LookupError)
    assert "Exception in initializer:" in caplog.text
    with pytest.raises(InitializerError, match="at the start"):
        box.add()
    assert box.is_empty


def test_everything_fails_with_errors_of_its_own(box: Box) -> None:
    first, cancelled, run = box.add(), box.add(), MapRun(read)
    box.submit_item(box.plain, b"blob", b"payload", run, 0)
    cancelled.cancel()
    box.broken = BrokerLostError("gone")
    box.finish()
    assert box.fail_all(lambda: BrokerLostError("gone")) == [1, 2, 3]
    assert isinstance(first.exception(0), BrokerLostError)
    assert cancelled.cancelled()
    with pytest.raises(BrokerLostError):
        run.take(0)
    with pytest.raises(BrokerLostError) as caught:
        box.add()
    assert caught.value is not box.broken


def test_after_finish_nothing_is_taken(box: Box) -> None:
    box.finish()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        box.add()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        box.submit_item(box.plain, b"blob", b"payload", MapRun(read), 0)
    assert box.is_empty


def test_callbacks_leave_the_io_thread(box: Box) -> None:
    box.start(threading.current_thread())
    threads: list[threading.Thread] = []
    future = box.add()
    future.add_done_callback(lambda _: threads.append(threading.current_thread()))
    box.drain()
    box.receive(values(1))
    box.close()
    assert box.callbacks.thread is not None
    box.callbacks.thread.join(10)
    assert threads == [box.callbacks.thread]


def test_callbacks_at_the_interpreters_end(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 starts no thread then."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    threads: list[threading.Thread] = []
    box.start(threading.current_thread())
    future = box.add()
    future.add_done_callback(lambda _: threads.append(threading.current_thread()))
    box.drain()
    box.receive(values(1))
    assert threads == [threading.current_thread()]
    assert box.callbacks.thread is None


def test_submissions_learn_blobs(box: Box) -> None:
    box.init_blob = b"init"
    submission = Submission()
    submission.connect(0)
    group = box.group(5, INIT_BLOB, 0)
    box.submit(group, b"function", b"payload", "f")
    (batch,), _ = box.drain()
    messages = [message for _, message in box.submit_to(submission, batch)]
    assert [message.blob for message in messages if isinstance(message, p.Blob)] == [5, INIT_BLOB]
    assert isinstance(messages[-1], p.Submit)
    submission.check_invariants()


def test_the_clusters_size_is_kept(box: Box) -> None:
    box.receive(p.Cluster(3, 12))
    assert (box.workers, box.slots) == (3, 12)


def test_in_a_forked_child_everything_fails_without_a_lock(box: Box) -> None:
    def make_error() -> BrokerLostError:
        return BrokerLostError("of the parent")

    done, sent, run = box.add(), box.add(), MapRun(read)
    box.submit_item(box.plain, b"", b"", run, 0)
    box.drain()
    box.receive(values(1))
    waiting = box.add()
    box.submit_item(box.plain, b"", b"", run, 1)
    wakes = box.wakes
    with box._lock, sent._condition:  # as if a thread of the parent had held them at the fork
        box.abandon(make_error)
        errors = [future.exception(0) for future in (sent, waiting)]
        assert {type(error) for error in errors} == {BrokerLostError}
        assert errors[0] is not errors[1]
        for _ in range(2):
            with pytest.raises(BrokerLostError, match="of the parent"):
                run.take(run.wait(0))
        box.is_awake = False
        box.cancelled([2, 3])
    assert done.result(0) == 10
    assert box.wakes == wakes


# --- Sealed ---------------------------------------------------------------------------------------


def sealed_values(sealer: Sealer, *ids: int, status: int = p.VALUE) -> p.Results:
    state = Seal(bytes(32)).result(sealer.session)
    payloads: list[Any] = [seal_result(state, id, status, dumps(id * 10)) for id in ids]
    return p.Results(list(ids), bytes([status] * len(ids)), payloads)


def test_calls_are_sealed_and_results_opened(box: Box) -> None:
    box.sealer = sealer = Sealer(Seal(bytes(32)))
    first, second = box.add(), box.add()
    large = box.submit(box.plain, b"blob", memoryview(bytes(p.INLINE_MAX + 1)), "f")
    run = MapRun(read)
    box.submit_item(box.plain, b"blob", b"payload", run, 0)
    (batch,), _ = box.drain()
    sizes = [len(b"payload") + CALL_SIZE, p.INLINE_MAX + 1 + CALL_SIZE]
    assert [p.size_of(one) for one in batch.payloads] == [sizes[0], sizes[0], sizes[1], sizes[0]]
    assert isinstance(batch.payloads[2], p.Parts)
    box.receive(sealed_values(sealer, 1, 3, 4))
    assert (first.result(0), large.result(0), run.take(0)) == (10, 30, 40)
    forged = sealed_values(sealer, 1)
    forged.ids = [2]
    box.receive(forged)
    with pytest.raises(SealError, match="task 2"):
        second.result(0)


def test_a_forged_failure_of_the_initializer_breaks_nothing(box: Box) -> None:
    box.sealer = Sealer(Seal(bytes(32)))
    first, second = box.add(), box.add()
    box.drain()
    for id in (1, 99):
        payload = dump_error(ValueError("forged"))
        box.receive(p.Results([id], bytes([p.INIT_FAILED]), [payload]))
    assert isinstance(first.exception(0), SealError)
    assert box.broken is None
    box.receive(sealed_values(box.sealer, 2))
    assert second.result(0) == 20


def test_results_may_hold_what_is_allowed(box: Box) -> None:
    box.allowed = Allowed(["only.this"])
    first, second = box.add(), box.add()
    box.drain()
    box.receive(values(1))
    box.receive(p.Results([2], b"\0", [dumps(threading.Event)]))
    assert first.result(0) == 10
    with pytest.raises(ResultUnpickleError, match=r"names threading\.Event"):
        second.result(0)


def test_who_was_interrupted_while_it_woke_the_thread_leaves_that_to_the_next(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come anywhere; nobody may wait for ever after it."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert box.is_idle()
    with monkeypatch.context() as patch:
        patch.setattr(box, "_wake", interrupt)
        with pytest.raises(KeyboardInterrupt):
            box.add()
    assert box.wakes == 0
    box.finish()
    assert box.wakes == 1


@pytest.mark.parametrize("then", [Mailbox.is_idle, Mailbox.close])
def test_who_sleeps_is_woken_when_all_is_done_that_can_be_without_a_wait(
    box: Box, then: Callable[[Mailbox], object]
) -> None:
    """A sleeper takes the interpreter, so that it would wait for each of many results anew."""
    first, second = box.add(), box.add()
    box.drain()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(first.result()))
    thread.start()
    wait_until(lambda: first._condition._sleepers)
    box.receive(values(1))
    assert first._condition._sleepers == ()
    assert len(box._sleepers) == 1
    box.receive(values(2))
    assert len(box._sleepers) == 1
    then(box)
    thread.join(10)
    assert (answers, second.result(0), box._sleepers) == ([10], 20, [])


_gate = threading.Event()


def _waits_for_the_gate() -> str:
    return "opened" if _gate.wait(5) else "shut"


class _Result:
    """Its unpickling takes until somebody opens the gate,
    as an import takes until its lock is free.
    """

    def __reduce__(self) -> Any:
        return _waits_for_the_gate, ()


def test_who_sleeps_is_woken_before_a_result_runs_code_that_may_wait_for_it(box: Box) -> None:
    first, second = box.add(), box.add()
    box.drain()

    def wait() -> None:
        first.result()
        _gate.set()

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: first._condition._sleepers)
    payloads: list[p.Payload] = [dumps(10), dumps(_Result())]
    try:
        box.receive(p.Results([1, 2], bytes([p.VALUE] * 2), payloads))
    finally:
        box.close()
        thread.join(10)
    assert second.result(0) == "opened"


def test_a_thread_that_waits_for_what_runs_unheard_sleeps_until_it_is_told(box: Box) -> None:
    """All is resolved; else it would be over, and must not wait for anything."""
    submission = Submission()
    submission.connect(0)
    box.add()
    (batch,) = box.drain()[0]
    box.submit_to(submission, batch)
    box.drop([1])
    submission.cancel([1])
    box.finish()
    box.is_awake = False
    assert [type(send.message) for send in box.ends(submission)] == [p.Finish]
    assert box.is_idle()
    submission.receive(p.Finished(), 0.0)
    assert box.ends(submission) == []
    assert not box.is_idle()
