from __future__ import annotations

import os
import select
from functools import partial

import pytest
import zmq

from achilles.net.loop import SocketLoop
from tests.unit.net.pairs import Pair, connect, connect_by_pipes, needs_pipes


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


@needs_pipes
def test_a_socket_that_is_watched_anew_beside_pipes_is_waited_for(pair: Pair) -> None:
    connect_by_pipes(pair)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind("inproc://x")
    other.connect("inproc://x")
    seen: list[bytes] = []
    pair.loop.watch(one, lambda: seen.append(one.recv(zmq.NOBLOCK)))
    for count in (1, 2):
        pair.until(lambda: not pair.loop.uses_sockets)
        other.send(b"x")
        pair.until(partial(lambda count: len(seen) == count, count))
    pair.dealer._drop_pipes()
    pair.until(lambda: not pair.loop.pipes)
    other.send(b"x")
    pair.until(lambda: len(seen) == 3)
    pair.loop.unwatch(one)
    context.destroy(0)
