from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.core import waiting as waiting_module
from achilles.errors import BrokerLostError, BrokerUnreachableError, ConfigError
from achilles.net import client as client_module
from achilles.net.client import connection
from tests.brokers import RawPeer, RunningBroker, raw_peer, wait_for


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker


@pytest.fixture
def worker(broker: RunningBroker) -> Iterator[RawPeer]:
    with raw_peer(broker, "worker") as worker:
        worker.hello("worker")
        yield worker


def test_a_connection_carries_tasks_and_ends(broker: RunningBroker, worker: RawPeer) -> None:
    with DistributedExecutor(address=str(broker.addresses.clients)) as executor:
        assert executor.status()["workers"] == 1
        future = executor.submit(pow, 2, 3)
        run = worker.expect(p.Run)
        assert run.init == 0
        worker.send(p.Crashed(run.lease, 0, "it was killed by a test"))
        for _ in range(2):
            run = worker.expect(p.Run)
            worker.send(p.Crashed(run.lease, 0, "it was killed by a test"))
        assert "killed by a test" in str(future.exception(10))
    assert not [thread for thread in threading.enumerate() if thread.name == "achilles-io"]


@pytest.mark.parametrize("address", ["auto", "tcp://127.0.0.1:9"])
def test_no_broker_is_a_named_error(address: str) -> None:
    with pytest.raises(BrokerUnreachableError, match="start one with: achilles broker"):
        DistributedExecutor(address=address)


def test_a_broker_that_does_not_answer_is_a_named_error_in_time(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunningBroker(achilles_home) as broker:
        copies = {path: path.read_bytes() for path in (achilles_home / "run").glob("*.join")}
        address = str(broker.addresses.clients)
    for path, content in copies.items():
        path.write_bytes(content)  # as if it had been killed, and its number were another's
        path.chmod(0o600)
    monkeypatch.setenv("ACHILLES_CLIENT_CONNECT_TIMEOUT", "200ms")
    began = monotonic()
    with pytest.raises(BrokerUnreachableError, match=f"no achilles broker answers at {address}"):
        DistributedExecutor(address=address)
    assert monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "achilles-io"]


def test_ctrl_c_while_it_connects_ends_its_thread(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which goes on for a moment, and frees itself what it uses."""
    with RunningBroker(achilles_home) as broker:
        copies = {path: path.read_bytes() for path in (achilles_home / "run").glob("*.join")}
        address = str(broker.addresses.clients)
    for path, content in copies.items():
        path.write_bytes(content)
        path.chmod(0o600)
    made = connection(
        address,
        home=achilles_home,
        join=None,
        slots_max=0,
        connect_timeout=60.0,
        broker_timeout=60.0,
    )

    def interrupt(_: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(made._joined, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.start()
    made.discard()  # as the executor's finalizer does
    assert made.thread is not None
    made.thread.join(10)
    assert not made.thread.is_alive()
    assert not caplog.records


def test_an_address_that_cannot_be_is_refused(achilles_home: Path) -> None:
    with pytest.raises(ConfigError, match="'http://x' is not an endpoint"):
        DistributedExecutor(address="http://x")


def test_the_broker_is_found_by_the_environment(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACHILLES_ADDRESS", "auto")
    with DistributedExecutor(3) as executor:
        assert executor.status()["clients"][0]["name"]


def test_a_refusal_is_a_named_error(broker: RunningBroker) -> None:
    with raw_peer(broker, "worker") as worker:
        worker.hello("worker", python="2.7", name="old")
        with pytest.raises(BrokerUnreachableError, match=r"refused this client: Python .* old"):
            DistributedExecutor(address="auto")


def test_the_end_of_the_broker_fails_what_is_open(broker: RunningBroker, worker: RawPeer) -> None:
    executor = DistributedExecutor(address="auto")
    future = executor.submit(pow, 2, 3)
    worker.expect(p.Run)
    broker.stop()
    with pytest.raises(BrokerLostError, match="is gone: the broker was shut down"):
        future.result(10)
    with pytest.raises(BrokerLostError):
        executor.submit(pow, 2, 3)
    executor.shutdown()


@pytest.fixture
def warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """What a client says of tasks that wait, which it says at once."""
    for name in ("FIRST_QUESTION_SECONDS", "QUESTION_SECONDS"):
        monkeypatch.setattr(waiting_module, name, 0.02)
    monkeypatch.setattr(client_module, "OBSTACLE_SECONDS", 0.02)
    monkeypatch.setattr(client_module, "WATCH_SECONDS", 0.01)
    caplog.set_level(logging.WARNING, "achilles")
    return lambda: list(caplog.messages)


Warnings = Callable[[], "list[str]"]


@pytest.mark.bad_input(50)
def test_no_worker_is_one_warning_that_says_how_to_start_one(
    broker: RunningBroker, warnings: Warnings
) -> None:
    address = broker.addresses.clients
    with DistributedExecutor(address="auto") as executor:
        for _ in range(20):
            executor.status()
        assert not warnings(), "nothing waits"
        future = executor.submit(pow, 2, 3)
        wait_for(warnings, "the warning")
        for _ in range(20):
            executor.status()
        (text,) = warnings()
        assert text == (
            f"1 task waits at the broker at {address}: no worker is connected; start one with: achilles worker {address} "
            "(see: achilles status --explain 1)"
        )
        assert future.cancel()


def test_a_tag_that_nobody_offers_is_one_warning(
    broker: RunningBroker, worker: RawPeer, warnings: Warnings
) -> None:
    with DistributedExecutor(address="auto") as executor:
        executor.submit(pow, 2, 3)
        worker.expect(p.Run)
        futures = [executor.with_options(tags="gpu").submit(pow, 2, n) for n in range(3)]
        wait_for(warnings, "the warning")
        text = warnings()[0]
        assert re.match("(1 task waits|[23] tasks wait) at the broker at", text), "as they arrived"
        assert ": no worker offers the tag gpu (what is offered: no tags); start one with: " in text
        assert f"achilles worker {broker.addresses.clients} --tag gpu (see: " in text
        assert repr(futures[0]).startswith("<Future of task 2, pow(), at ")
        executor.kill_workers()


def test_a_connection_says_where_it_goes(broker: RunningBroker, achilles_home: Path) -> None:
    made = connection(
        "auto", home=achilles_home, join=None, slots_max=0, connect_timeout=1, broker_timeout=1
    )
    assert repr(made) == str(broker.addresses.clients)
