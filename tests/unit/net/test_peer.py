from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import NoReturn

import pytest
import zmq

from achilles.core import protocol as p
from achilles.core.link import Packet
from achilles.errors import (
    AuthenticationError,
    BrokerUnreachableError,
    EncryptionMismatchError,
    KeyRefusedError,
    NotABrokerError,
    SilentBrokerError,
    WrongBrokerError,
)
from achilles.net import peer as peer_module
from achilles.net.endpoint import WatchEvent, parse_endpoint
from achilles.net.keys import Join
from achilles.net.loop import SocketLoop
from achilles.net.peer import Peer, dialer_to
from tests.brokers import RunningBroker, hello
from tests.security.zmtp import Relay
from tests.unit.net.pairs import needs_pipes

WAIT_SECONDS = 10.0


class Driven:
    """A peer and the loop that drives it; what it has received is kept."""

    def __init__(self, join: Join, role: str = "client") -> None:
        self.loop = SocketLoop()
        self.received: list[p.Wire] = []
        try:
            self.peer = Peer(
                dialer_to(join),
                self.loop,
                hello(role),
                lambda message, _: self.received.append(message),
            )
        except BaseException:
            self.loop.close()
            raise

    def until(self, holds: Callable[[], object]) -> None:
        deadline = monotonic() + WAIT_SECONDS
        while not holds():
            assert monotonic() < deadline, f"it does not come about; {self.received}"
            self.loop.wait(0.01)
            self.peer.tick(monotonic())

    def until_problem(self, kind: type[Exception]) -> None:
        self.until(lambda: isinstance(self.peer.problem(), kind))

    def close(self) -> None:
        self.peer.close()
        self.loop.close()


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker


@pytest.fixture
def drive() -> Iterator[Callable[..., Driven]]:
    made: list[Driven] = []

    def drive(join: Join, role: str = "client") -> Driven:
        made.append(Driven(join, role))
        return made[-1]

    yield drive
    for each in made:
        each.close()


Drive = Callable[..., Driven]


@pytest.mark.parametrize("tcp", [False, True])
def test_a_peer_joins_and_speaks(broker: RunningBroker, drive: Drive, tcp: bool) -> None:
    join = broker.join("admin")
    if tcp:
        join.ipc = ""
    driven = drive(join, "admin")
    assert not driven.peer.is_joined
    driven.until(lambda: driven.peer.is_joined)
    assert isinstance(driven.received[0], p.Welcome)
    assert driven.peer.silent_for(monotonic()) < WAIT_SECONDS
    driven.peer.send([p.StatusRequest()])
    driven.until(lambda: isinstance(driven.received[-1], p.Status))
    driven.peer.send([p.Goodbye("done")])
    driven.peer.flush(1.0)


def test_what_is_sent_without_a_session_is_dropped(broker: RunningBroker, drive: Drive) -> None:
    driven = drive(broker.join("admin"), "admin")
    driven.peer.send([p.Shutdown()])
    driven.until(lambda: driven.peer.is_joined)
    driven.peer.send([p.StatusRequest()])
    driven.until(lambda: isinstance(driven.received[-1], p.Status))
    assert not any(isinstance(message, p.ShuttingDown) for message in driven.received)


def test_a_refusal_is_received(broker: RunningBroker, drive: Drive) -> None:
    join = broker.join("client")
    join.role, join.worker_ipc = "worker", broker.join("worker").worker_ipc
    driven = drive(join, "client")  # a client at the workers' door
    driven.until(lambda: driven.received)
    assert isinstance(driven.received[0], p.Refused)


@pytest.mark.bad_input(47)
def test_an_unknown_key_is_an_authentication_error(broker: RunningBroker, drive: Drive) -> None:
    join = broker.join("client")
    public, secret = zmq.curve_keypair()
    join.ipc, join.public, join.secret = "", public.decode(), secret.decode()
    driven = drive(join)
    driven.until_problem(AuthenticationError)
    assert "refused this key" in str(driven.peer.problem())


def test_the_key_of_a_role_opens_no_other_door(broker: RunningBroker, drive: Drive) -> None:
    """A client's key at the workers' port, and the reverse."""
    for role, other in (("client", "worker"), ("worker", "client")):
        join, key = broker.join(role), broker.join(other)
        join.ipc = join.worker_ipc = ""
        join.public, join.secret = key.public, key.secret
        driven = drive(join, role)
        driven.until_problem(AuthenticationError)


@pytest.mark.bad_input(47)
def test_another_broker_at_the_place_is_an_authentication_error(
    broker: RunningBroker, drive: Drive
) -> None:
    join = broker.join("client")
    join.ipc, join.broker_public = "", zmq.curve_keypair()[0].decode()
    driven = drive(join)
    driven.until_problem(AuthenticationError)
    assert "does not hold the expected key" in str(driven.peer.problem())


def test_a_broker_that_comes_back_is_joined_again(achilles_home: Path, drive: Drive) -> None:
    with RunningBroker(achilles_home) as first:
        join = first.join("client")
        driven = drive(join)
        driven.until(lambda: driven.peer.is_joined)
        first.begin_to_stop()
        driven.until(lambda: any(isinstance(m, p.Goodbye) for m in driven.received))
    with RunningBroker(achilles_home, bind=join.address):
        driven.until(lambda: sum(isinstance(m, p.Welcome) for m in driven.received) == 2)
    kinds = [type(message) for message in driven.received if not isinstance(message, p.Cluster)]
    assert kinds[:4] == [p.Welcome, p.Goodbye, p.Gone, p.Welcome]


def test_a_session_that_is_gone_is_called_for_on_the_same_connection(
    broker: RunningBroker, drive: Drive
) -> None:
    """However old it is: what was sent on it since is not to be sent again."""
    driven = drive(broker.join("client"))
    driven.until(lambda: driven.peer.is_joined)
    peer, dialed = driven.peer, driven.peer._dialed
    peer._opened_at -= 2 * peer_module.WELCOME_SECONDS
    peer._called_at -= 2 * peer_module.WELCOME_SECONDS
    peer._transmit([Packet(p.Header(b"?" * 16, 1, 0), p.Heartbeat())])  # is answered by Gone
    peer._dialer._link.token = b"?" * 16
    driven.until(lambda: any(isinstance(one, p.Gone) for one in driven.received))
    driven.until(lambda: peer.is_joined)
    now = monotonic()
    assert peer.tick(now + peer_module.BACKOFF_MAX) > now
    assert peer._dialed is dialed


def test_a_connection_on_which_nobody_answers_is_replaced(
    broker: RunningBroker, drive: Drive
) -> None:
    driven = drive(broker.join("client"))
    peer, dialed = driven.peer, driven.peer._dialed
    now = monotonic()
    assert peer.tick(now) <= now + peer_module.WELCOME_SECONDS
    assert peer._dialed is dialed
    late = now + 2 * peer_module.WELCOME_SECONDS
    peer.tick(late)
    peer.tick(late + peer_module.BACKOFF_MAX)
    assert peer._dialed is not dialed


def test_what_cannot_be_replaced_for_want_of_descriptors_stays_until_it_can(
    broker: RunningBroker, drive: Drive
) -> None:
    driven = drive(broker.join("client"))
    driven.until(lambda: driven.peer.is_joined)
    peer, dialed, dial = driven.peer, driven.peer._dialed, driven.peer._dial
    shortage = BrokerUnreachableError("there are no descriptors")

    def fail() -> NoReturn:
        raise shortage

    peer._dial = fail
    late = monotonic() + 2 * peer_module.SILENCE_SECONDS
    assert late < peer.tick(late) <= late + peer_module.BACKOFF_MAX
    assert peer._dialed is dialed
    assert peer.problem() is shortage
    peer._dial = dial
    peer.tick(late + peer_module.BACKOFF_MAX)
    assert peer._dialed is not dialed
    peer.send([p.StatusRequest(is_brief=True)])
    driven.until(lambda: isinstance(driven.received[-1], p.Status))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_socket_for_want_of_descriptors_is_a_named_error(
    broker: RunningBroker, drive: Drive, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> NoReturn:
        raise zmq.ZMQError(number)

    monkeypatch.setattr(peer_module, "dial_dealer", fail)
    with pytest.raises(BrokerUnreachableError, match=re.escape(os.strerror(number))):
        drive(broker.join("client"))


def test_no_context_begins_without_room_for_it(
    broker: RunningBroker, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq would end the process."""
    monkeypatch.setattr(peer_module, "_contexts", {})
    monkeypatch.setattr(peer_module, "has_room", lambda: False)
    with pytest.raises(BrokerUnreachableError, match="too few descriptors or threads"):
        drive(broker.join("client"))
    assert not peer_module._contexts


def test_other_errors_of_sockets_are_not_taken_for_a_shortage(
    broker: RunningBroker, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise zmq.ZMQError(errno.EINVAL)

    monkeypatch.setattr(peer_module, "dial_dealer", fail)
    with pytest.raises(zmq.ZMQError):
        drive(broker.join("client"))


def test_a_connection_that_has_fallen_silent_is_replaced(
    broker: RunningBroker, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells of it: the network swallows what is sent. The session goes on,
    and nothing is lost.
    """
    monkeypatch.setattr(peer_module, "SILENCE_SECONDS", 2.0)
    is_dead = threading.Event()
    join = broker.join("client")
    with Relay(
        parse_endpoint(join.address),
        lambda number, data: b"" if number == 0 and is_dead.is_set() else data,
    ) as relay:
        join.address, join.ipc = relay.address, ""
        driven = drive(join)
        driven.until(lambda: driven.peer.is_joined)
        is_dead.set()
        driven.peer.send([p.StatusRequest()])
        driven.until(lambda: any(isinstance(one, p.Status) for one in driven.received))
        assert sum(isinstance(one, p.Welcome) for one in driven.received) == 1


@needs_pipes
def test_on_one_host_all_goes_through_pipes_as_soon_as_there_is_a_connection(
    broker: RunningBroker, drive: Drive
) -> None:
    driven = drive(broker.join("client"))
    driven.until(lambda: driven.peer.is_joined and driven.peer._port._pipes is not None)
    far = broker.join("client")
    far.ipc = ""
    other = drive(far)
    other.until(lambda: other.peer.is_joined)
    assert other.peer._port._pipes is None


@needs_pipes
def test_what_was_in_pipes_that_end_is_sent_again_at_once(
    broker: RunningBroker, drive: Drive
) -> None:
    """No heartbeat has to tell of it, and the session goes on."""
    driven = drive(broker.join("client"))
    peer = driven.peer
    driven.until(lambda: peer.is_joined and peer._port._pipes is not None)
    peer._dialer._next_at = monotonic() + 1000.0
    lost, peer._port._pipes = peer._port._pipes, Swallows()  # type: ignore[assignment]
    peer.send([p.StatusRequest(), p.StatusRequest()])
    peer._port._pipes = lost
    peer._port._lost(None)
    driven.until(lambda: sum(isinstance(one, p.Status) for one in driven.received) == 2)
    assert sum(isinstance(one, p.Welcome) for one in driven.received) == 1
    assert peer._port._pipes is None


@needs_pipes
def test_a_new_connection_has_new_pipes(broker: RunningBroker, drive: Drive) -> None:
    driven = drive(broker.join("client"))
    peer = driven.peer
    driven.until(lambda: peer.is_joined and peer._port._pipes is not None)
    first = peer._port._pipes
    peer.tick(monotonic() + 2 * peer_module.SILENCE_SECONDS)
    driven.until(lambda: peer._port._pipes not in (None, first))
    assert first is not None
    assert first.is_closed
    peer.send([p.StatusRequest()])
    driven.until(lambda: isinstance(driven.received[-1], p.Status))


class Swallows:
    """Pipes in which everything is lost."""

    has_outbox = False

    def send(self, frames: list[p.Buffer]) -> None:
        pass


@pytest.mark.bad_input(46)
def test_nobody_there_is_a_problem_with_the_address(achilles_home: Path, drive: Drive) -> None:
    with RunningBroker(achilles_home) as broker:
        join = broker.join("client")
    driven = drive(join)
    driven.until(lambda: "nothing listens there" in str(driven.peer.problem()))
    assert isinstance(driven.peer.problem(), BrokerUnreachableError)
    assert join.address in str(driven.peer.problem())


def test_a_malformed_message_from_a_broker_is_passed_over(
    achilles_home: Path, drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    path = achilles_home / "x.ipc"
    router.bind(f"ipc://{path}")
    with RunningBroker(achilles_home) as broker:
        join = broker.join("client")
    join.ipc = f"ipc://{path}"
    driven = drive(join)
    driven.until(lambda: router.poll(0))
    route, _ = router.recv_multipart()
    for frames in ([b""], [b"x" * 100], [bytes(40), b"more"]):
        router.send_multipart([route, *frames])
    driven.until(lambda: len(caplog.records) >= 3)
    assert not driven.received
    assert not driven.peer.is_joined
    context.destroy(0)


def test_the_programs_own_context_is_not_ours() -> None:
    """It may end that one, which waits for all sockets of it;
    and a forked child needs another one.
    """
    ours = peer_module._context()
    assert ours is peer_module._context()
    assert ours is not zmq.Context.instance()


def test_what_was_told_stays_whatever_a_later_attempt_looks_like(achilles_home: Path) -> None:
    """A connection that ends during the handshake may do so for many reasons;
    only one that succeeds is news.
    """
    with RunningBroker(achilles_home) as broker:
        driven = Driven(broker.join("client"))
    peer = driven.peer
    ended = WrongBrokerError("it ended the handshake")
    for told in (EncryptionMismatchError("one side is encrypted"), KeyRefusedError("refused")):
        peer._note(WatchEvent(True, SilentBrokerError("it does not answer"), False), monotonic())
        for problem in (ended, told, ended, NotABrokerError("it is none")):
            peer._note(WatchEvent(False, problem, False), monotonic())
        assert peer.problem() is told
    peer._note(WatchEvent(True, SilentBrokerError("it does not answer"), False), monotonic())
    assert isinstance(peer.problem(), SilentBrokerError)
    driven.close()
