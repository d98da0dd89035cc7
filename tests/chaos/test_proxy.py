"""The proxy, between a socket of the test and one that it leads to. Waits for conditions only."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Network, Proxy
from tests.modes import wait_until

WAIT_SECONDS = 20.0


class Bench:
    """A listener, a proxy to it, and connections through it."""

    def __init__(self, network: Network, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.settimeout(WAIT_SECONDS)
        self.place: tuple[str, int] | None = self.listener.getsockname()
        self.proxy: Proxy = network.add(lambda: self.place)

    def dial(self) -> socket.socket:
        """The near end of a new connection."""
        near = socket.create_connection(("127.0.0.1", self.proxy.port), WAIT_SECONDS)
        return self._stack.enter_context(near)

    def is_refused(self) -> bool:
        """Whether a new connection is cut, which may be before it is there."""
        try:
            return is_reset(self.dial())
        except ConnectionResetError:
            return True

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection."""
        near = self.dial()
        far, _ = self.listener.accept()
        far.settimeout(WAIT_SECONDS)
        return near, self._stack.enter_context(far)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.ExitStack() as stack, Network() as network:
        yield Bench(network, stack)


def receive(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        assert more, "it ended"
        data += more
    return data


def is_reset(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def test_bytes_pass_both_ways(bench: Bench) -> None:
    near, far = bench.connect()
    near.sendall(b"question")
    assert receive(far, 8) == b"question"
    far.sendall(b"answer")
    assert receive(near, 6) == b"answer"


def test_many_bytes_pass_unchanged(bench: Bench) -> None:
    near, far = bench.connect()
    data = bytes(range(256)) * 40
    for _ in range(100):
        near.sendall(data)
        assert receive(far, len(data)) == data


def test_an_end_is_passed_on(bench: Bench) -> None:
    near, far = bench.connect()
    near.sendall(b"last")
    near.close()
    assert receive(far, 4) == b"last"
    assert far.recv(1) == b""
    far.close()
    wait_until(lambda: not bench.proxy.connections, "it forgets the connection")


def test_a_cut_is_seen_by_both(bench: Bench) -> None:
    near, far = bench.connect()
    assert bench.proxy.cut() == 1
    assert is_reset(near)
    assert is_reset(far)
    assert bench.proxy.cut() == 0
    assert bench.proxy.count("cut") == 1


def test_a_black_hole_swallows_until_it_is_healed(bench: Bench) -> None:
    near, far = bench.connect()
    bench.proxy.up.is_open = False
    near.sendall(b"held")
    wait_until(lambda: bench.proxy.count("delayed") == 4, "it is in the proxy")
    far.sendall(b"the other way")
    assert receive(near, 13) == b"the other way"
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    far.settimeout(WAIT_SECONDS)
    bench.proxy.clear()
    assert receive(far, 4) == b"held"


def test_half_open_is_seen_by_the_far_end_alone(bench: Bench) -> None:
    near, far = bench.connect()
    assert bench.proxy.forget() == 1
    assert is_reset(far)
    near.sendall(b"into nothing")
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        near.recv(1)
    near.settimeout(WAIT_SECONDS)
    bench.proxy.clear()
    assert is_reset(near)


def test_half_closed_still_speaks_the_other_way(bench: Bench) -> None:
    near, far = bench.connect()
    assert bench.proxy.finish() == 1
    assert far.recv(1) == b""
    far.sendall(b"still here")
    assert receive(near, 10) == b"still here"


def test_late_bytes_arrive(bench: Bench) -> None:
    near, far = bench.connect()
    bench.proxy.up.delay = 0.05
    near.sendall(b"late")
    assert receive(far, 4) == b"late"
    assert bench.proxy.count("delayed") == 4


def test_a_turned_bit_arrives(bench: Bench) -> None:
    near, far = bench.connect()
    bench.proxy.up.flips = 1
    near.sendall(bytes(50))
    assert sum(byte.bit_count() for byte in receive(far, 50)) == 1
    assert bench.proxy.count("flipped") == 1


def test_refused_while_it_refuses_and_where_it_leads_nowhere(bench: Bench) -> None:
    bench.proxy.refuse(True)
    assert bench.is_refused()
    bench.proxy.clear()
    place, bench.place = bench.place, None
    assert bench.is_refused()
    bench.place = place
    near, far = bench.connect()
    near.sendall(b"again")
    assert receive(far, 5) == b"again"
    assert bench.proxy.count("refused") == 2


def test_nobody_listens_where_it_leads(bench: Bench) -> None:
    bench.listener.close()
    assert bench.is_refused()


def test_one_proxys_trouble_is_not_anothers() -> None:
    with contextlib.ExitStack() as stack, Network() as network:
        one, other = Bench(network, stack), Bench(network, stack)
        near, far = other.connect()
        one.connect()
        one.proxy.up.is_open = False
        assert one.proxy.cut() == 1
        near.sendall(b"unharmed")
        assert receive(far, 8) == b"unharmed"
