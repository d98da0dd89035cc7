from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from achilles.core import protocol as p
from achilles.core.link import Link
from tests.brokers import RunningBroker, answer_one, hello, raw_peer, wait_for
from tests.security.attacks import attack


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker


def status_of(broker: RunningBroker) -> p.Status:
    with raw_peer(broker, "admin") as admin:
        admin.hello("admin")
        admin.send(p.StatusRequest())
        status = admin.expect(p.Status)
        admin.send(p.Goodbye("done"))
    return status


def test_a_task_goes_to_a_worker_and_its_result_back(broker: RunningBroker) -> None:
    with raw_peer(broker, "client") as client, raw_peer(broker, "worker") as worker:
        client.hello("client")
        worker.hello("worker")
        for number in range(1, 4):
            answer_one(client, worker, number)
    assert status_of(broker).done == 3


def test_payloads_of_many_parts_pass_through(broker: RunningBroker) -> None:
    large = bytes(p.INLINE_MAX + 1)
    with raw_peer(broker, "client") as client, raw_peer(broker, "worker") as worker:
        client.hello("client")
        worker.hello("worker")
        payload = p.Parts((large, large))
        client.send(p.Submit(0, 0, [1], [payload]))
        run = worker.expect(p.Run)
        assert p.size_of(run.payloads[0]) == 2 * len(large)
        worker.send(p.Done(run.lease, [0], b"\0", [large], 0.1))
        assert p.size_of(client.expect(p.Results).payloads[0]) == len(large)


def test_a_repeated_hello_gets_the_same_answer(broker: RunningBroker) -> None:
    with raw_peer(broker, "client") as client:
        message = hello("client")
        for _ in range(2):
            client.send(message, Link(p.NO_TOKEN))
        assert client.expect(p.Welcome).token == client.expect(p.Welcome).token


def test_a_heartbeat_is_answered(broker: RunningBroker) -> None:
    with raw_peer(broker, "worker") as worker:
        worker.hello("worker")
        worker.send(p.Heartbeat())
        worker.expect(p.Heartbeat)


def test_an_unknown_token_is_told_so(broker: RunningBroker) -> None:
    with raw_peer(broker, "client") as client:
        client.send(p.StatusRequest(), Link(b"x" * 16))
        client.expect(p.Gone)


def test_a_closed_connection_is_seen_at_once(broker: RunningBroker) -> None:
    """Its session has the grace to come back; it is its worker's silence that begins to count."""
    with raw_peer(broker, "worker") as worker:
        worker.hello("worker")
        assert len(status_of(broker).workers) == 1
    routes = broker.broker._sessions._by_route
    wait_for(lambda: not routes, "the broker to see it")


def test_a_session_goes_on_over_another_connection(broker: RunningBroker) -> None:
    with raw_peer(broker, "worker") as worker, raw_peer(broker, "client") as client:
        worker.hello("worker")
        with raw_peer(broker, "client") as first:
            first.hello("client")
            first.send(p.Submit(0, 0, [1], [b"call"]))
            run = worker.expect(p.Run)
            client.link = first.link
        client.send(p.Heartbeat())
        client.expect(p.Heartbeat)
        worker.send(p.Done(run.lease, [0], b"\0", [b"value"], 0.1))
        assert client.expect(p.Results).ids == [1]


def test_the_end_is_said_and_open_tasks_are_counted(broker: RunningBroker) -> None:
    with raw_peer(broker, "client") as client, raw_peer(broker, "worker") as worker:
        client.hello("client")
        worker.hello("worker")
        client.send(p.Submit(0, 0, [1, 2], [b"a", b"b"]))
        worker.expect(p.Run)
        broker.begin_to_stop()
        assert "shut down" in client.expect(p.Goodbye).reason
        worker.expect(p.Goodbye)
        broker.stop()
        assert broker.open_tasks == 2


@attack("T29")
def test_who_does_not_read_does_not_hold_up_others(broker: RunningBroker) -> None:
    """Results for a client that reads nothing pile up in its own outbox."""
    large = bytes(p.INLINE_MAX)
    with (
        raw_peer(broker, "client") as deaf,
        raw_peer(broker, "client") as client,
        raw_peer(broker, "worker") as worker,
    ):
        deaf.hello("client")
        client.hello("client")
        worker.hello("worker")
        for number in range(1, 200):
            deaf.send(p.Submit(0, 0, [number], [b"call"]))
            run = worker.expect(p.Run)
            worker.send(p.Done(run.lease, [0], b"\0", [large], 0.1))
        answer_one(client, worker, 1)


def test_python_versions_do_not_mix(broker: RunningBroker) -> None:
    with raw_peer(broker, "worker") as worker, raw_peer(broker, "client") as client:
        worker.hello("worker", name="alpha")
        client.send(hello("client", python="2.7"))
        assert "Python 2.7 cannot exchange pickles" in client.expect(p.Refused).reason
