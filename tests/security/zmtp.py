"""The wire below ZeroMQ: greetings by hand,
and a relay between a peer and its broker that records or changes bytes.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable

from achilles.net.endpoint import Endpoint

WAIT_SECONDS = 10.0

Change = Callable[[int, bytes], bytes]  # (connection, bytes of one side) -> bytes for the other


def as_it_is(number: int, data: bytes) -> bytes:
    return data


def greeting(mechanism: bytes, *, version: bytes = b"\3\1") -> bytes:
    """The 64 bytes with which a peer of ZMTP 3 begins."""
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + version + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes) -> bytes:
    """A command frame."""
    content = bytes([len(name)]) + name + body
    return b"\x06" + struct.pack(">Q", len(content)) + content


def frame(body: bytes) -> bytes:
    """A message frame."""
    return b"\2" + struct.pack(">Q", len(body)) + body


def ready(kind: bytes = b"DEALER") -> bytes:
    """The command that ends a handshake without security."""
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind)


def connect(endpoint: Endpoint) -> socket.socket:
    """A bare TCP connection."""
    return socket.create_connection((endpoint.host, endpoint.port), timeout=WAIT_SECONDS)


def send_until_closed(connection: socket.socket, *pieces: bytes) -> int:
    """Send the pieces and wait for the other side to close; how many bytes of them were taken."""
    sent = 0
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                done = connection.send(view)
                sent += done
                view = view[done:]
        while connection.recv(65536):
            pass
    except (ConnectionResetError, BrokenPipeError):
        pass
    return sent


class Relay:
    """Between peers and a broker, over TCP; a context manager.

    What peers send goes through ``change``, and what the broker answers through ``back``.
    """

    def __init__(self, endpoint: Endpoint, change: Change, back: Change = as_it_is) -> None:
        self._endpoint = endpoint
        self._changes = (change, back)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []
        self._is_over = False

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return  # closed, by us
            try:
                far = connect(self._endpoint)
            except OSError:
                near.close()  # as if it had been cut at once
                continue
            ways = zip((near, far), (far, near), self._changes, strict=True)
            for one, other, change in ways:
                one.settimeout(None)
                thread = threading.Thread(target=self._pump, args=(one, other, change, number))
                self._threads.append(thread)
                thread.start()
            self._sockets += [near, far]
            number += 1

    def _pump(self, one: socket.socket, other: socket.socket, change: Change, number: int) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(change(number, data))
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._threads[0].join(WAIT_SECONDS)
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "the relay does not end"
        for end in self._sockets:
            end.close()


class Flips:
    """Flips bits of each connection from some byte on: one bit of every second connection,
    one a byte of the others.
    """

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._left: dict[int, int] = {}  # bytes of each connection that pass as they are
        self.count = 0
        self.connections = 0

    def __call__(self, number: int, data: bytes) -> bytes:
        left = self._left.setdefault(number, self._chance.randrange(500, 1_000_000))
        self._left[number] = left - len(data)
        is_first = 0 <= left < len(data)
        is_single = number % 2 == 0
        self.connections += is_first
        if left >= len(data) or (is_single and not is_first):
            return data
        changed = bytearray(data)
        at = max(0, left)
        for index in [at] if is_single else range(at, len(data)):
            changed[index] ^= 1 << self._chance.randrange(8)
            self.count += 1
        return bytes(changed)
