from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import pytest
import zmq

from achilles.net import transport
from achilles.net.endpoint import LOCAL_USER, Endpoint, Gatekeeper, bind_router, dial_dealer
from achilles.net.transport import DealerPort, Route, RouterPort, SocketLoop

WAIT_SECONDS = 10.0
FAR_MORE_THAN_A_SOCKET_TAKES = 5000


class Pair(NamedTuple):
    """A ROUTER and a DEALER, connected, in one loop, and what has come to each."""

    loop: SocketLoop
    router: RouterPort
    dealer: DealerPort
    closed: list[Route]
    to_router: list[tuple[Route, list[bytes]]]
    to_dealer: list[list[bytes]]

    def until(self, holds: Callable[[], object]) -> None:
        deadline = monotonic() + WAIT_SECONDS
        while not holds():
            assert monotonic() < deadline, "it does not come about"
            self.loop.wait(0.01)
            self.router.flush()

    def at_router(self) -> tuple[Route, list[bytes]]:
        """The next message that comes to the ROUTER."""
        self.until(lambda: self.to_router)
        (found,) = self.to_router
        self.to_router.clear()
        return found

    def at_dealer(self, count: int = 1) -> list[list[bytes]]:
        """The next messages that come to the DEALER."""
        self.until(lambda: len(self.to_dealer) >= count)
        found = list(self.to_dealer)
        self.to_dealer.clear()
        return found


@pytest.fixture
def pair(achilles_home: Path) -> Iterator[Pair]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    loop = SocketLoop()
    gatekeeper = Gatekeeper(context, {})
    loop.register(gatekeeper.socket.FD, gatekeeper.answer)
    gatekeeper.answer()
    endpoint = Endpoint("ipc", "", 0, str(achilles_home / "x.ipc"))
    bound = bind_router(context, tcp=None, ipc=endpoint, domain="d", broker_secret=b"")
    closed: list[Route] = []
    to_router: list[tuple[Route, list[bytes]]] = []
    to_dealer: list[list[bytes]] = []
    router = RouterPort(
        bound.socket,
        loop,
        lambda route, frames: to_router.append((route, [bytes(frame) for frame in frames])),
        closed.append,
    )
    dialed = dial_dealer(context, endpoint, None)
    dealer = DealerPort(
        dialed.socket, loop, lambda frames: to_dealer.append([bytes(frame) for frame in frames])
    )
    yield Pair(loop, router, dealer, closed, to_router, to_dealer)
    dialed.watch.close()
    dealer.close()
    router.close()
    gatekeeper.socket.close(0)
    context.destroy(0)
    loop.close()


def can_send(port: DealerPort) -> bool:
    return bool(transport._events(port._socket) & zmq.POLLOUT)


def connect(pair: Pair) -> Route:
    """The route of the pair's DEALER; a ROUTER learns it with the first message."""
    pair.until(lambda: can_send(pair.dealer))
    pair.dealer.send([b"hello"])
    return pair.at_router()[0]


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


def test_a_busy_socket_does_not_hold_up_descriptors(pair: Pair) -> None:
    """However much waits at a socket, each wait looks at everything."""
    connect(pair)
    read, write = os.pipe()
    for _ in range(10):
        pair.dealer.send([b"x"])
    seen: list[int] = []
    pair.loop.register(read, lambda: seen.append(len(pair.to_router)))
    os.write(write, b"x")
    pair.until(lambda: len(pair.to_router) == 10)
    pair.loop.unregister(read)
    os.close(read)
    os.close(write)
    assert seen
    assert seen[0] <= 1


def test_a_socket_that_was_closed_by_an_earlier_callback_is_passed_over(pair: Pair) -> None:
    """Both have input in the same wait; the first to be called ends the other."""
    route = connect(pair)
    pair.dealer.send([b"to the router"])
    pair.router.send(route, [b"to the dealer"])
    assert pair.router._socket.poll(10_000)
    assert pair.dealer._socket.poll(10_000)
    called: list[str] = []

    def end(name: str) -> None:
        called.append(name)
        for port in (pair.router, pair.dealer):
            pair.loop.unwatch(port._socket)

    pair.loop.watch(pair.router._socket, lambda: end("router"))
    pair.loop.watch(pair.dealer._socket, lambda: end("dealer"))
    pair.loop.wait(5)
    assert len(called) == 1


@pytest.mark.bad_input(76)
def test_without_epoll_descriptors_are_waited_for_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    loop = SocketLoop()
    read, write = os.pipe()
    seen: list[str] = []
    loop.register(read, lambda: seen.append("readable"))
    loop.register(write, lambda: seen.append("writable"), write=True)
    loop.wait(5)
    assert seen == ["writable"]
    loop.unregister(write)
    os.write(write, b"x")
    loop.wait(5)
    loop.unregister(read)
    assert seen == ["writable", "readable"]
    loop.wake()
    loop.wait(30)
    loop.close()
    os.close(read)
    os.close(write)
