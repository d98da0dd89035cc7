from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
import zmq

from achilles.core import protocol as p
from achilles.errors import BrokerUnreachableError
from achilles.net.control import Asking, request
from achilles.net.endpoint import Endpoint
from achilles.net.keys import KeyPair, key_pair
from achilles.net.peer import dialer_to
from tests.brokers import RunningBroker, raw_peer


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker


def own_pair(broker: RunningBroker) -> KeyPair:
    return key_pair(broker.home, "admin")


def test_a_status_is_asked_for_and_given(broker: RunningBroker) -> None:
    with raw_peer(broker, "worker") as worker:
        worker.hello("worker", name="alpha", slots=3)
        status = request(dialer_to(broker.join("admin")), p.StatusRequest(), timeout=10)
        assert isinstance(status, p.Status)
        assert [(worker.name, worker.slots) for worker in status.workers] == [("alpha", 3)]


def test_a_shutdown_ends_the_broker_and_its_peers(broker: RunningBroker) -> None:
    with raw_peer(broker, "worker") as worker, raw_peer(broker, "client") as client:
        worker.hello("worker")
        client.hello("client")
        answer = request(dialer_to(broker.join("admin")), p.Shutdown(), timeout=10)
        assert isinstance(answer, p.ShuttingDown)
        assert worker.expect(p.Goodbye).reason == client.expect(p.Goodbye).reason
    broker.stop()
    assert not list((broker.home / "run").iterdir())


@pytest.mark.parametrize("is_far", [False, True])
def test_the_end_is_seen_by_the_connection(broker: RunningBroker, is_far: bool) -> None:
    join = broker.join("admin")
    with Asking(dialer_to(join.for_others(own_pair(broker)) if is_far else join)) as asking:
        asking.ask(p.StatusRequest(), 10)
        assert not asking.sees_the_end(0.0)
    with Asking(dialer_to(join.for_others(own_pair(broker)) if is_far else join)) as asking:
        asking.ask(p.Shutdown(), 10)
        assert asking.sees_the_end(10)
    broker.stop()


@pytest.mark.bad_input(72)
def test_a_key_without_the_role_is_refused(broker: RunningBroker) -> None:
    join = broker.join("client")
    join.ipc = ""  # over ipc, a client may administer: it is the same user
    with pytest.raises(BrokerUnreachableError, match=r"refused this: .* not for the role admin"):
        request(dialer_to(join), p.Shutdown(), timeout=10)


@pytest.mark.bad_input(46)
def test_silence_is_a_named_error_in_time(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker:
        join = broker.join("admin")
    began = monotonic()
    with pytest.raises(BrokerUnreachableError, match="no achilles broker answers at tcp://"):
        request(dialer_to(join), p.StatusRequest(), timeout=0.3)
    assert monotonic() - began < 3


def test_a_broker_that_stops_answering_is_told_apart(achilles_home: Path) -> None:
    achilles_home.chmod(0o700)
    endpoint = Endpoint("ipc", "", 0, str(achilles_home / "x.ipc"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(str(endpoint))
    with RunningBroker(achilles_home) as broker:
        join = broker.join("admin")
    join.ipc = str(endpoint)
    with pytest.raises(BrokerUnreachableError):
        request(dialer_to(join), p.StatusRequest(), timeout=0.2)
    context.destroy(0)
