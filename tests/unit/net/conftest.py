"""Fixtures that several tests of the net share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from achilles.net.endpoint import Endpoint, Gatekeeper, bind_router, dial_dealer
from achilles.net.loop import SocketLoop
from achilles.net.transport import DealerPort, Route, RouterPort
from tests.unit.net.pairs import Pair


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
        dialed.socket,
        loop,
        lambda frames: to_dealer.append([bytes(frame) for frame in frames]),
        is_local=True,
    )
    yield Pair(loop, router, dealer, closed, to_router, to_dealer)
    dialed.watch.close()
    dealer.close()
    router.close()
    gatekeeper.socket.close(0)
    context.destroy(0)
    loop.close()
