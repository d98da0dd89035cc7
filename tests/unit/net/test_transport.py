from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import pytest
import zmq

from achilles.net import transport
from achilles.net.endpoint import LOCAL_USER, Endpoint, Gatekeeper, bind_router, dial_dealer
from achilles.net.transport import DealerPort, RouterPort
from achilles.runtime.loop import Loop

WAIT_SECONDS = 10.0
FAR_MORE_THAN_A_SOCKET_TAKES = 5000


class Pair(NamedTuple):
    """A ROUTER and a DEALER, connected, in one loop."""

    loop: Loop
    router: RouterPort
    dealer: DealerPort
    closed: list[bytes]

    def until(self, holds: Callable[[], object]) -> None:
        deadline = monotonic() + WAIT_SECONDS
        while not holds():
            assert monotonic() < deadline, "it does not come about"
            self.loop.wait(0.01)

    def at_router(self) -> tuple[bytes, list[bytes], str]:
        """The next message that has come to the ROUTER."""
        found: list[tuple[bytes, list[bytes], str]] = []

        def look() -> bool:
            for route, frames, user in self.router.receive():
                found.append((route, [bytes(frame) for frame in frames], user))
            return bool(found)

        self.until(look)
        assert len(found) == 1
        return found[0]

    def at_dealer(self, count: int = 1) -> list[list[bytes]]:
        found: list[list[bytes]] = []

        def look() -> bool:
            self.router.flush()
            found.extend([bytes(f) for f in frames] for frames in self.dealer.receive())
            return len(found) >= count

        self.until(look)
        return found


@pytest.fixture
def pair(achilles_home: Path) -> Iterator[Pair]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    loop = Loop()
    gatekeeper = Gatekeeper(context, {})
    loop.register(gatekeeper.socket.FD, gatekeeper.answer)
    gatekeeper.answer()
    endpoint = Endpoint("ipc", "", 0, str(achilles_home / "x.ipc"))
    bound = bind_router(context, tcp=None, ipc=endpoint, domain="d", broker_secret=b"")
    closed: list[bytes] = []
    router = RouterPort(bound.socket, loop, closed.append)
    dialed = dial_dealer(context, endpoint, None)
    dealer = DealerPort(dialed.socket, loop)
    yield Pair(loop, router, dealer, closed)
    dialed.watch.close()
    dealer.close()
    router.close()
    gatekeeper.socket.close(0)
    context.destroy(0)
    loop.close()


def can_send(port: DealerPort) -> bool:
    return bool(transport._events(port._socket) & zmq.POLLOUT)


def connect(pair: Pair) -> bytes:
    """The route of the pair's DEALER; a ROUTER learns it with the first message."""
    pair.until(lambda: can_send(pair.dealer))
    pair.dealer.send([b"hello"])
    return pair.at_router()[0]


def test_a_message_comes_with_its_route_and_user(pair: Pair) -> None:
    pair.until(lambda: can_send(pair.dealer))
    for frames in ([b"one"], [b"two", b"parts"]):
        pair.dealer.send(frames)
        route, got, user = pair.at_router()
        assert (got, user) == (frames, LOCAL_USER)
        pair.router.send(route, frames)
        assert pair.at_dealer() == [frames]


def test_what_is_sent_before_there_is_a_connection_waits(pair: Pair) -> None:
    pair.dealer.send([b"early"])
    if pair.dealer.has_outbox:
        pair.until(lambda: pair.dealer.has_input)
        pair.dealer.receive()
        assert not pair.dealer.has_outbox
    assert pair.at_router()[1] == [b"early"]


def test_what_a_peer_does_not_take_is_kept_in_order(pair: Pair) -> None:
    route = connect(pair)
    body = bytes(1000)
    count = FAR_MORE_THAN_A_SOCKET_TAKES
    for number in range(count):
        pair.router.send(route, [number.to_bytes(4, "big") + body])
    assert pair.router.has_outbox
    got = [int.from_bytes(frames[0][:4], "big") for frames in pair.at_dealer(count)]
    assert got == list(range(count))
    assert not pair.router.has_outbox


def test_an_outbox_has_an_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is lost, as on any connection: the link sends it again."""
    monkeypatch.setattr(transport, "OUTBOX_MAX", 10)
    route = connect(pair)
    for _ in range(FAR_MORE_THAN_A_SOCKET_TAKES):
        pair.router.send(route, [bytes(1000)])
    assert len(pair.router._outboxes[route]) == 10


def test_a_route_that_is_gone_is_told_and_forgotten(pair: Pair, achilles_home: Path) -> None:
    endpoint = Endpoint("ipc", "", 0, str(achilles_home / "x.ipc"))
    dialed = dial_dealer(zmq.Context.instance(), endpoint, None)
    other = DealerPort(dialed.socket, pair.loop)
    pair.until(lambda: can_send(other))
    other.send([b"hello"])
    route = pair.at_router()[0]
    for _ in range(FAR_MORE_THAN_A_SOCKET_TAKES):
        pair.router.send(route, [bytes(1000)])
    dialed.watch.close()
    other.close()
    pair.until(lambda: pair.closed)
    assert pair.closed == [route]
    assert not pair.router.has_outbox
    pair.router.send(route, [b"to nobody"])

    def is_dropped() -> bool:
        pair.router.receive()  # so that libzmq sees the end of what came from there
        pair.router.flush()
        return not pair.router.has_outbox

    pair.until(is_dropped)


def test_routes_that_never_were_are_no_error(pair: Pair) -> None:
    pair.router.send(b"nobody", [b"x"])
    pair.router.flush()
    assert not pair.router.has_outbox


def test_one_call_takes_in_a_bounded_number(pair: Pair) -> None:
    connect(pair)
    for _ in range(2 * transport.RECEIVE_MAX):
        pair.dealer.send([b"x"])
    sizes: list[int] = []

    def look() -> bool:
        sizes.append(len(pair.router.receive()))
        return sum(sizes) == 2 * transport.RECEIVE_MAX

    pair.until(look)
    assert max(sizes) <= transport.RECEIVE_MAX
    assert not pair.router.has_input
