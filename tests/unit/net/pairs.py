"""A ROUTER and a DEALER that are connected over ipc, for tests of `achilles.net.transport`."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

import pytest
import zmq

from achilles.net import pipes, transport
from achilles.net.loop import SocketLoop
from achilles.net.transport import DealerPort, Route, RouterPort

WAIT_SECONDS = 10.0

needs_pipes = pytest.mark.skipif(not pipes.IS_AVAILABLE, reason="there is no /proc here")


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


def can_send(port: DealerPort) -> bool:
    return bool(transport._events(port._socket) & zmq.POLLOUT)


def connect(pair: Pair) -> Route:
    """The route of the pair's DEALER; a ROUTER learns it with the first message."""
    pair.until(lambda: can_send(pair.dealer))
    pair.dealer.send([b"hello"])
    return pair.at_router()[0]


def connect_by_pipes(pair: Pair) -> Route:
    route = connect(pair)
    pair.dealer.offer_pipes()
    pair.until(lambda: route.pipes is not None and pair.dealer._pipes is not None)
    pair.router.send(route, [b"accepted"])
    assert pair.at_dealer() == [[b"accepted"]]
    pair.dealer.send([b"switched"])  # from here on nothing is under way to a socket
    assert pair.at_router() == (route, [b"switched"])
    return route


class Arrived:
    """A frame as far as a ROUTER asks it who sent it; None is what libzmq does not know."""

    def __init__(self, fd: int | None, user: str | None) -> None:
        self._answers: dict[object, Any] = {transport.SRCFD: fd, "User-Id": user}

    def get(self, option: object) -> Any:
        if self._answers[option] is None:
            raise zmq.ZMQError(zmq.EINVAL)
        return self._answers[option]
