from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic

import pytest

from achilles import DistributedExecutor
from achilles.errors import BrokerUnreachableError
from achilles.net import worker as worker_module
from achilles.net.keys import code_key
from achilles.net.peer import dialer_to
from achilles.net.worker import Worker, python_version
from tests import tasks
from tests.brokers import RunningBroker, raw_peer, wait_for


class RunningWorker:
    """A `Worker` in a thread, with the two things that signals do to it."""

    def __init__(self, broker: RunningBroker, slots: int = 1) -> None:
        self._end = 0
        self.joined = threading.Event()
        self.given_up = -1
        self.worker = Worker(
            dialer_to(broker.join("worker")),
            code=code_key(broker.home),
            slots=slots,
            name="w",
            tags=["t"],
            connect_timeout=10,
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.joined.wait(10)

    def _run(self) -> None:
        self.given_up = self.worker.run(lambda: self._end, self.joined.set)

    def end(self, how: int) -> None:
        """1: drain, 2: at once."""
        self._end = how
        self.worker.loop.wake()

    def wait(self) -> int:
        """Wait for its end; how many tasks it gave up."""
        self._thread.join(20)
        assert not self._thread.is_alive(), "the worker does not end"
        return self.given_up


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker


def test_no_broker_is_a_named_error_in_time(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker:
        join = broker.join("worker")
    worker = Worker(
        dialer_to(join), code=code_key(broker.home), slots=1, name="w", tags=[], connect_timeout=0.2
    )
    began = monotonic()
    with pytest.raises(BrokerUnreachableError, match="no achilles broker answers"):
        worker.run(lambda: 0, lambda: None)
    assert monotonic() - began < 5


def test_what_is_tried_in_vain_is_said_before_it_is_given_up(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "SILENT_SECONDS", 0.0)
    with RunningBroker(achilles_home) as broker:
        join = broker.join("worker")
    worker = Worker(
        dialer_to(join), code=code_key(broker.home), slots=1, name="w", tags=[], connect_timeout=0.5
    )
    with pytest.raises(BrokerUnreachableError):
        worker.run(lambda: 0, lambda: None)
    (record,) = caplog.records
    assert "no session so far; trying for 0 s: no achilles broker answers" in record.getMessage()


def test_a_refusal_is_a_named_error(broker: RunningBroker) -> None:
    with raw_peer(broker, "client") as client:
        client.hello("client", python="2.7", name="old")
        worker = Worker(
            dialer_to(broker.join("worker")),
            code=code_key(broker.home),
            slots=1,
            name="w",
            tags=[],
            connect_timeout=10,
        )
        with pytest.raises(BrokerUnreachableError, match=r"refused this worker: Python .* 2.7"):
            worker.run(lambda: 0, lambda: None)


def test_it_ends_when_it_is_told_to(broker: RunningBroker) -> None:
    for how in (1, 2):
        worker = RunningWorker(broker)
        worker.end(how)
        assert worker.wait() == 0


def test_a_drain_finishes_what_runs_and_gives_the_rest_back(
    broker: RunningBroker, tmp_path: Path
) -> None:
    worker = RunningWorker(broker)
    log = tmp_path / "log"
    with DistributedExecutor(address="auto") as executor:
        running = executor.submit(tasks.note_and_pause, str(log), "started", 0.3)
        waiting = executor.submit(pow, 2, 3)
        wait_for(log.exists, "the task to start")
        worker.end(1)
        assert worker.wait() == 0
        assert running.result(10) == running.result(10)
        assert not waiting.done()
        other = RunningWorker(broker)
        assert waiting.result(20) == 8
    other.end(1)
    assert other.wait() == 0


def test_an_end_at_once_says_what_it_gave_up(broker: RunningBroker, tmp_path: Path) -> None:
    worker = RunningWorker(broker)
    log = tmp_path / "log"
    executor = DistributedExecutor(address="auto")
    future = executor.submit(tasks.note_and_pause, str(log), "started", 60)
    wait_for(log.exists, "the task to start")
    worker.end(1)
    worker.end(2)
    assert worker.wait() == 1
    assert not future.done(), "another worker may run it yet"
    executor.kill_workers()


def test_it_ends_with_its_broker(broker: RunningBroker) -> None:
    worker = RunningWorker(broker)
    broker.stop()
    assert worker.wait() == 0


def _is_in_log(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


def test_it_says_that_its_broker_is_silent_and_that_it_is_not(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    worker = RunningWorker(broker)
    silence = [11.0]
    monkeypatch.setattr(worker.worker._peer, "silent_for", lambda now: silence[0])
    worker.worker.loop.wake()
    wait_for(partial(_is_in_log, caplog, "nothing heard of the broker for 10 s"), "a warning")
    silence[0] = 0.0
    worker.worker.loop.wake()
    wait_for(partial(_is_in_log, caplog, "is heard again"), "the end of it")
    assert caplog.text.count("nothing heard") == 1
    worker.end(2)
    assert worker.wait() == 0


def test_the_python_version_is_what_pickles_depend_on() -> None:
    assert python_version().count(".") == 1
