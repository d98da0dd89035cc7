"""A broker's attack on its own ports, before it tells anybody where they are.

Each TCP port is tried as strangers would try it: without security, with a key that nobody knows,
with the keys of other roles, and with a frame that is larger than any may be. All at once, over the
network, against the broker's own loop. Only the refusal that belongs to an attempt counts: a port
that cannot be reached proves nothing.
"""

from __future__ import annotations

import contextlib
import socket as sockets
import struct
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any, NamedTuple

import zmq

from achilles.errors import SelfAttackError
from achilles.net.endpoint import MAXMSGSIZE, CurveKeys, Endpoint, dial_as_intruder
from achilles.net.loop import SocketLoop

# For all attempts together; they take some 20 ms,
# and on a machine that is busy with other things much longer
TIMEOUT = 20.0

_EVENT = struct.Struct("=HI")
_REFUSED_KEY, _REFUSED_MECHANISM = (
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH),
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
)
_LET_IN = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)

# ZMTP 3.0: signature, version, mechanism, as-server, filler;
# then a command that says how long it will be.
_MECHANISM = b"CURVE".ljust(20, b"\0")
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + _MECHANISM + bytes(32)
_COMMAND = struct.Struct(">BQ")


class Door(NamedTuple):
    """A TCP port, and the keys that must not open it by what they are called."""

    endpoint: Endpoint
    broker_public: bytes
    others: Mapping[str, tuple[bytes, bytes]]  # public and secret


class _Attempt:
    """One connection that must be refused, by an event of the kind ``wanted``."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: SocketLoop,
        door: Door,
        what: str,
        pair: tuple[bytes, bytes] | None,
    ) -> None:
        self.what = f"{what} at {door.endpoint}"
        self.is_refused = False
        self._wanted = _REFUSED_MECHANISM if pair is None else _REFUSED_KEY
        keys = None if pair is None else CurveKeys(*pair, door.broker_public)
        self._socket, self._monitor = dial_as_intruder(
            context, door.endpoint, keys, _LET_IN | _REFUSED_KEY | _REFUSED_MECHANISM
        )
        self._loop = loop
        loop.register(self._monitor.FD, self._look)
        self._look()  # a descriptor signals only to a reader that has found its socket empty

    def close(self) -> None:
        self._loop.unregister(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _look(self) -> None:
        monitor: Any = self._monitor
        while monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            event, _ = _EVENT.unpack_from(monitor.recv_multipart(zmq.NOBLOCK)[0])
            if event == _LET_IN:
                raise SelfAttackError(_text(f"lets in {self.what}"))
            self.is_refused = self.is_refused or event == self._wanted


def attack(
    context: zmq.Context[zmq.Socket[bytes]],
    doors: list[Door],
    loop: SocketLoop,
    step: Callable[[float], None],
    *,
    frame_max: int = MAXMSGSIZE,
    timeout: float = TIMEOUT,
) -> None:
    """Try every door in every way; ``step`` lets the broker do its part,
    for at most so many seconds.

    Raises:
        SelfAttackError: one was let in, or was not refused within ``timeout`` seconds.
    """
    deadline = monotonic() + timeout
    with contextlib.ExitStack() as leave:
        attempts = []
        for door in doors:
            for what, pair in _strangers(door):
                attempt = _Attempt(context, loop, door, what, pair)
                leave.callback(attempt.close)
                attempts.append(attempt)
        for door in doors:  # libzmq's own thread answers these
            _send_too_large(door.endpoint, frame_max, deadline)
        while left := [one.what for one in attempts if not one.is_refused]:
            if monotonic() > deadline:
                raise SelfAttackError(_text(f"did not refuse within {timeout:g} s: {left[0]}"))
            step(0.05)


def _strangers(door: Door) -> Iterator[tuple[str, tuple[bytes, bytes] | None]]:
    yield "a peer without security", None
    yield "a peer with an unknown key", zmq.curve_keypair()
    for role, pair in door.others.items():
        yield f"a peer with the {role}'s key", pair


def _send_too_large(endpoint: Endpoint, frame_max: int, deadline: float) -> None:
    """Speak the protocol up to a frame that says that it will be too large.

    Raises:
        SelfAttackError: the connection does not end there.
    """

    def seconds() -> float:
        return max(0.01, deadline - monotonic())

    what = f"a frame of more than {frame_max} bytes at {endpoint}"
    try:
        with sockets.create_connection((endpoint.host, endpoint.port), seconds()) as raw:
            raw.sendall(_GREETING)
            greeting = b""
            while len(greeting) < len(_GREETING) and (received := _receive(raw, seconds())):
                greeting += received
            if greeting[12:32] != _MECHANISM:
                raise SelfAttackError(_text(f"does without CURVE at {endpoint}"))
            raw.sendall(_COMMAND.pack(0x06, frame_max + 1))
            while _receive(raw, seconds()):
                pass
    except TimeoutError:
        raise SelfAttackError(_text(f"did not refuse in time: {what}")) from None
    except OSError as error:
        raise SelfAttackError(_text(f"cannot be reached at {endpoint}: {error}")) from None


def _receive(raw: sockets.socket, timeout: float) -> bytes:
    """Some bytes; none where the connection has ended."""
    raw.settimeout(timeout)
    try:
        return raw.recv(len(_GREETING))
    except ConnectionError:
        return b""


def _text(finding: str) -> str:
    return f"the broker attacked its own ports, and {finding}; it ends without having told anybody where it is"
