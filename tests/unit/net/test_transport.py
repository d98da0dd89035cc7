from __future__ import annotations

from errno import ENOMEM, ENOTSOCK
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import zmq

from achilles.core.protocol import FRAMES_MAX
from achilles.net import transport
from achilles.net.endpoint import LOCAL_USER, Endpoint, dial_dealer
from achilles.net.frames import prepared
from achilles.net.transport import DealerPort, Route
from tests.security.attacks import attack
from tests.unit.net.pairs import WAIT_SECONDS, Arrived, Pair, can_send, connect

FAR_MORE_THAN_A_SOCKET_TAKES = 5000


def test_a_message_comes_with_its_route_and_user(pair: Pair) -> None:
    pair.until(lambda: can_send(pair.dealer))
    for frames in ([b"one"], [b"two", b"parts"]):
        pair.dealer.send(frames)
        route, got = pair.at_router()
        assert (got, route.user) == (frames, LOCAL_USER)
        pair.router.send(route, frames)
        assert pair.at_dealer() == [frames]


def test_what_is_sent_before_there_is_a_connection_waits(pair: Pair) -> None:
    pair.dealer.send([b"early"])
    assert pair.at_router()[1] == [b"early"]
    assert not pair.dealer.has_outbox


def test_what_a_peer_does_not_take_is_kept_in_order(pair: Pair) -> None:
    route = connect(pair)
    body = bytes(1000)
    count = FAR_MORE_THAN_A_SOCKET_TAKES
    for number in range(count):
        pair.router.send(route, [number.to_bytes(4, "big") + body])
    assert pair.router.outboxes
    got = [int.from_bytes(frames[0][:4], "big") for frames in pair.at_dealer(count)]
    assert got == list(range(count))
    assert not pair.router.outboxes


def test_an_outbox_has_an_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is lost, as on any connection: the link sends it again."""
    monkeypatch.setattr(transport, "OUTBOX_MAX", 10)
    route = connect(pair)
    for _ in range(FAR_MORE_THAN_A_SOCKET_TAKES):
        pair.router.send(route, [bytes(1000)])
    assert len(pair.router.outboxes[route]) == 10


def test_what_there_is_no_memory_for_is_lost_as_a_whole(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link sends it again; half a message would make nonsense of the next one."""
    route = connect(pair)
    monkeypatch.setattr(
        transport, "prepared", lambda frames: None if b"too much" in frames else prepared(frames)
    )
    for frames in ([b"head", b"too much", b"tail"], [b"next", b"one"]):
        pair.dealer.send(frames)
        pair.router.send(route, frames)
    assert pair.at_router() == (route, [b"next", b"one"])
    assert pair.at_dealer() == [[b"next", b"one"]]
    assert not pair.dealer.has_outbox
    assert not pair.router.outboxes


def test_a_small_message_that_there_is_no_memory_for_leaves_the_next_one_whole(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ROUTER has begun it then; it ends as one that the codec refuses."""
    route = connect(pair)
    send_one = transport._send_one

    def send(socket: zmq.Socket[bytes], data: Any, flags: int) -> Any:
        if data == b"too much":
            raise zmq.ZMQError(ENOMEM)
        return send_one(socket, data, flags)

    monkeypatch.setattr(transport, "_send_one", send)
    for frames in ([b"too much"], [b"next"]):
        pair.dealer.send(frames)
        pair.router.send(route, frames)
    assert pair.at_router() == (route, [b"next"])
    assert pair.at_dealer(2) == [[b""], [b"next"]]


def test_other_errors_of_a_socket_are_not_passed_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(pair)

    def send(socket: zmq.Socket[bytes], data: Any, flags: int) -> Any:
        raise zmq.ZMQError(ENOTSOCK)

    monkeypatch.setattr(transport, "_send_one", send)
    with pytest.raises(zmq.ZMQError):
        pair.dealer.send([b"message"])


def test_a_route_that_is_gone_is_told_and_forgotten(pair: Pair, achilles_home: Path) -> None:
    endpoint = Endpoint("ipc", "", 0, str(achilles_home / "x.ipc"))
    dialed = dial_dealer(zmq.Context.instance(), endpoint, None)
    other = DealerPort(dialed.socket, pair.loop, lambda _: None)
    pair.until(lambda: can_send(other))
    other.send([b"hello"])
    route = pair.at_router()[0]
    for _ in range(FAR_MORE_THAN_A_SOCKET_TAKES):
        pair.router.send(route, [bytes(1000)])
    dialed.watch.close()
    other.close()
    pair.until(lambda: pair.closed)
    assert pair.closed == [route]
    assert not pair.router.outboxes
    pair.router.send(route, [b"to nobody"])
    pair.until(lambda: not pair.router.outboxes)


def test_routes_that_never_were_are_no_error(pair: Pair) -> None:
    pair.router.send(Route(pair.router, b"nobody", ""), [b"x"])
    pair.router.flush()
    assert not pair.router.outboxes


# --- Whose message it is --------------------------------------------------------------------------


@attack("T18")
def test_a_routing_id_is_no_identity(pair: Pair) -> None:
    """Another connection, or another user, is another route, whatever it calls itself."""
    route = pair.router._route(b"id", Arrived(900, "client/a"))
    assert pair.router._route(b"id", Arrived(900, "client/a")) is route
    other = pair.router._route(b"id", Arrived(901, "client/b"))
    assert (other.user, other.fd) == ("client/b", 901)
    assert pair.closed == [route]
    again = pair.router._route(b"id", Arrived(901, "client/c"))
    assert again.user == "client/c"
    assert pair.closed == [route, other]
    assert pair.router._route(b"id", Arrived(901, None)).user == ""


def test_a_descriptor_that_is_used_again_ends_the_route_that_had_it(pair: Pair) -> None:
    first = pair.router._route(b"first", Arrived(900, "u"))
    second = pair.router._route(b"second", Arrived(900, "u"))
    assert pair.closed == [first]
    assert pair.router._route(b"second", Arrived(900, "u")) is second
    assert pair.router._route(b"first", Arrived(901, "u")) is not first
    assert pair.closed == [first], "a route ends once"


def test_routes_without_a_descriptor_do_not_share_one(pair: Pair) -> None:
    routes = [pair.router._route(name, Arrived(None, "u")) for name in (b"one", b"two")]
    assert [pair.router._route(one.identity, Arrived(None, "u")) for one in routes] == routes
    assert not pair.closed
    pair.router.send(routes[0], [b"x"])  # nobody is there
    assert pair.router._route(b"one", Arrived(None, "u")) is not routes[0]
    assert pair.router._route(b"two", Arrived(None, "u")) is routes[1]


@attack("T18")
def test_whoever_takes_the_routing_id_of_one_that_has_gone_is_somebody_else(
    pair: Pair, achilles_home: Path
) -> None:
    """As on the wire, and before the monitor is asked who has gone."""
    endpoint = Endpoint("ipc", "", 0, str(achilles_home / "x.ipc"))
    dialed = dial_dealer(zmq.Context.instance(), endpoint, None)
    other = DealerPort(dialed.socket, pair.loop, lambda _: None)
    pair.until(lambda: can_send(other))
    other.send([b"hello"])
    route = pair.at_router()[0]
    pair.loop.unregister(pair.router._monitor.FD)
    dialed.watch.close()
    other.close()
    deadline = monotonic() + WAIT_SECONDS
    while not pair.to_router:  # until the ROUTER has given the id free
        assert monotonic() < deadline, "the id cannot be taken"
        thief: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        thief.setsockopt(zmq.ROUTING_ID, route.identity)
        thief.connect(str(endpoint))
        thief.send(b"it is me")
        attempt_ends = monotonic() + 0.2
        while not pair.to_router and monotonic() < attempt_ends:
            pair.loop.wait(0.01)
        thief.close(0)
    (taken, frames), *_ = pair.to_router
    assert frames == [b"it is me"]
    assert taken.identity == route.identity
    assert taken is not route
    assert pair.closed == [route]


def test_a_message_without_an_end_is_cut_off_and_the_next_one_is_whole(pair: Pair) -> None:
    connect(pair)
    surplus = FRAMES_MAX + 2 * transport.DROPPED_AT_ONCE
    pair.dealer.send([b"x"] * surplus)
    pair.dealer.send([b"next"])
    assert len(pair.at_router()[1]) == FRAMES_MAX + 1, "one more than the codec takes"
    assert pair.at_router()[1] == [b"next"]
    pair.router.send(connect(pair), [b"y"] * surplus)
    assert len(pair.at_dealer()[0]) == FRAMES_MAX + 1
    pair.router.send(connect(pair), [b"next"])
    assert pair.at_dealer() == [[b"next"]]
