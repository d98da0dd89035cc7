"""A TCP proxy that can be told to be a bad network: it delays, throttles, holds up, turns bits,
cuts and forgets connections.

One thread serves all proxies of a run. Each peer has a proxy of its own, so that one peer alone can
be in trouble. The broker's address is asked for at each connection:
a restarted broker may listen elsewhere.
"""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from time import monotonic

from tests.chaos.lanes import Lane, Weather

PIECE_BYTES = 16 * 1024
CALL_SECONDS = 10.0

Target = Callable[[], "tuple[str, int] | None"]


@dataclass
class Side:
    """One of a connection's two sockets."""

    socket: socket.socket
    outbox: bytearray = field(default_factory=bytearray)
    has_ended: bool = False  # it sends no more
    was_told: bool = False  # that the other one sends no more
    events: int = 0  # as registered


class Connection:
    """A peer's connection, ``near``, and the one to the broker,
    ``far``, None once the broker has been cut off alone.
    """

    def __init__(self, near: Side, far: Side, up: Lane, down: Lane) -> None:
        self.near = near
        self.far: Side | None = far
        self.up, self.down = up, down
        self.is_connecting = True

    def sides(self) -> list[Side]:
        """Those that are open."""
        return [self.near] if self.far is None else [self.near, self.far]

    def ways(self) -> list[tuple[Lane, Side]]:
        """Each direction that leads anywhere, and where it leads."""
        return [] if self.far is None else [(self.up, self.far), (self.down, self.near)]


class Proxy:
    """A port on loopback that leads to the broker, through the weather."""

    def __init__(self, network: Network, target: Target, seed: int) -> None:
        self.network = network
        self.target = target
        self.up, self.down = Weather(), Weather()  # to and from the broker
        self.is_refusing = False
        self.counts: Counter[str] = Counter()
        self.connections: list[Connection] = []
        self.random = random.Random(seed)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]

    def cut(self) -> int:
        """Reset all connections on both sides; how many there were."""
        return self.network.call(lambda: self._cut())

    def forget(self) -> int:
        """Half-open: the broker sees the connections end, the peer does not."""
        return self.network.call(self._forget)

    def finish(self) -> int:
        """Half-closed: the broker is told that the peer sends no more; the peer is not told."""
        return self.network.call(self._finish)

    def refuse(self, is_refusing: bool) -> None:
        """Whether connections are cut as soon as they are made."""
        self.is_refusing = is_refusing

    def clear(self) -> None:
        """Good weather again; what a half-open connection has left is cut,
        as by a host that comes back.
        """
        self.is_refusing = False
        self.up.clear()
        self.down.clear()
        self.network.call(lambda: self._cut(only_forgotten=True))

    def count(self, name: str) -> int:
        """``delayed`` and ``flipped`` are of bytes and of bits, the others of connections."""
        return self.network.call(lambda: self._counted()[name])

    def _counted(self) -> Counter[str]:
        counts = Counter(self.counts)
        for connection in self.connections:
            for lane in (connection.up, connection.down):
                counts["delayed"] += lane.delayed
                counts["flipped"] += lane.flipped
        return counts

    def _cut(self, *, only_forgotten: bool = False) -> int:
        chosen = [one for one in self.connections if not only_forgotten or one.far is None]
        for connection in chosen:
            self.network.end(self, connection, with_reset=True)
        self.counts["cut"] += len(chosen)
        return len(chosen)

    def _forget(self) -> int:
        count = 0
        for connection in self.connections:
            if connection.far is not None:
                self.network.close(connection.far, with_reset=True)
                connection.far = None
                count += 1
        self.counts["forgotten"] += count
        return count

    def _finish(self) -> int:
        count = 0
        for connection in self.connections:
            if connection.far is not None and not connection.near.has_ended:
                connection.near.has_ended = True
                count += 1
        self.counts["finished"] += count
        return count


class Network(threading.Thread):
    """The thread; a context manager that ends it and closes all."""

    def __init__(self) -> None:
        super().__init__(name="chaos-network", daemon=True)
        self.proxies: list[Proxy] = []
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._selector.register(self._near, selectors.EVENT_READ, None)
        self._is_over = False

    def add(self, target: Target, seed: int = 0) -> Proxy:
        """A new proxy."""
        proxy = Proxy(self, target, seed)

        def listen() -> int:
            self._selector.register(proxy.listener, selectors.EVENT_READ, proxy)
            self.proxies.append(proxy)
            return 0

        self.call(listen)
        return proxy

    def call(self, function: Callable[[], int]) -> int:
        """Have the thread call a function; its answer.

        Raises:
            TimeoutError: the thread does not answer, which is a bug of ours.
        """
        answers: list[int] = []
        is_done = threading.Event()

        def run() -> None:
            answers.append(function())
            is_done.set()

        self._calls.append(run)
        self._far.send(b".")
        if not is_done.wait(CALL_SECONDS):
            raise TimeoutError("the proxies' thread does not answer")
        return answers[0]

    def __enter__(self) -> Network:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        def stop() -> int:
            self._is_over = True
            return 0

        if self.is_alive():
            self.call(stop)
            self.join(CALL_SECONDS)
        self._far.close()

    # --- In the thread ----------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._is_over:
                for key, _ in self._selector.select(self._wait_seconds()):
                    if key.fileobj is self._near:
                        self._near.recv(4096)
                    elif isinstance(key.data, Proxy):
                        self._accept(key.data)
                while self._calls:
                    self._calls.popleft()()
                for proxy in self.proxies:
                    for connection in list(proxy.connections):
                        self._serve(proxy, connection)
        finally:
            for proxy in self.proxies:
                for connection in list(proxy.connections):
                    self.end(proxy, connection, with_reset=False)
                proxy.listener.close()
            self._selector.close()
            self._near.close()

    def _wait_seconds(self) -> float | None:
        due = inf
        for proxy in self.proxies:
            for connection in proxy.connections:
                for lane, sink in connection.ways():
                    deadline = lane.next_deadline()
                    if deadline is not None and len(sink.outbox) < PIECE_BYTES:
                        due = min(due, deadline)
        return None if due == inf else max(0.0, due - monotonic())

    def _accept(self, proxy: Proxy) -> None:
        try:
            accepted, _ = proxy.listener.accept()
        except OSError:
            return  # whoever called has gone again
        near = Side(accepted)
        accepted.setblocking(False)
        place = None if proxy.is_refusing else proxy.target()
        if place is None:
            proxy.counts["refused"] += 1
            self.close(near, with_reset=True)
            return
        far = Side(socket.socket())
        far.socket.setblocking(False)
        far.socket.connect_ex(place)
        for side in (near, far):
            side.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lanes = [Lane(weather, proxy.random) for weather in (proxy.up, proxy.down)]
        proxy.connections.append(Connection(near, far, *lanes))
        proxy.counts["accepted"] += 1

    def _serve(self, proxy: Proxy, connection: Connection) -> None:
        """Move what can be moved, and ask to be called when more can."""
        near, far = connection.near, connection.far
        if far is None:
            self._watch(near, 0)
            return
        try:
            if connection.is_connecting and not self._has_connected(far):
                self._watch(far, selectors.EVENT_WRITE)
                return
            connection.is_connecting = False
            now = monotonic()
            self._move(near, far, connection.up, now)
            self._move(far, near, connection.down, now)
        except OSError:
            self.end(proxy, connection, with_reset=True)
            return
        if near.was_told and far.was_told:
            self.end(proxy, connection, with_reset=False)
            return
        for side, lane in ((near, connection.up), (far, connection.down)):
            reads = not side.has_ended and not lane.is_full
            events = selectors.EVENT_READ if reads else 0
            self._watch(side, events | (selectors.EVENT_WRITE if side.outbox else 0))

    def _has_connected(self, far: Side) -> bool:
        """Whether there is a connection by now.

        Raises:
            OSError: there will be none.
        """
        error = far.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "no connection")
        try:
            far.socket.getpeername()
        except OSError:
            return False
        return True

    def _move(self, source: Side, sink: Side, lane: Lane, now: float) -> None:
        """Read, let pass, and write.

        Raises:
            OSError: one of the two is gone.
        """
        while not source.has_ended and not lane.is_full:
            try:
                data = source.socket.recv(PIECE_BYTES)
            except BlockingIOError:
                break
            if not data:
                source.has_ended = True
                break
            lane.push(data, now)
        if len(sink.outbox) < PIECE_BYTES:
            sink.outbox += lane.pop(now)
        if sink.outbox:
            try:
                del sink.outbox[: sink.socket.send(sink.outbox)]
            except BlockingIOError:
                pass
        if source.has_ended and not lane.size and not sink.outbox and not sink.was_told:
            sink.was_told = True
            sink.socket.shutdown(socket.SHUT_WR)

    def _watch(self, side: Side, events: int) -> None:
        if events == side.events:
            return
        if not events:
            self._selector.unregister(side.socket)
        elif side.events:
            self._selector.modify(side.socket, events, side)
        else:
            self._selector.register(side.socket, events, side)
        side.events = events

    def end(self, proxy: Proxy, connection: Connection, *, with_reset: bool) -> None:
        """Close both sockets."""
        for side in connection.sides():
            self.close(side, with_reset=with_reset)
        for lane in (connection.up, connection.down):
            proxy.counts["delayed"] += lane.delayed
            proxy.counts["flipped"] += lane.flipped
        proxy.connections.remove(connection)

    def close(self, side: Side, *, with_reset: bool) -> None:
        """Close one socket; ``with_reset``: at once, and the other end is told by RST."""
        self._watch(side, 0)
        if with_reset:
            linger = struct.pack("ii", 1, 0)
            side.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        side.socket.close()
