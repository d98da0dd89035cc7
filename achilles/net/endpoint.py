"""The only place where a ZeroMQ socket is made.

Rules
    1. Options are set before bind and connect: libzmq copies them there,
       and CURVE set later protects nothing.
    2. CURVE on every TCP socket, with a ZAP domain, enforced:
       libzmq lets everybody in if one of these is missing.
    3. No routing ids of our own, no handover:
       a reconnected peer with a known id can be silently deaf for ever.
    4. Nothing waits: linger 0, sends without blocking,
       and a monitor that tells what befell a connection.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket as sockets
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import zmq

from achilles.errors import (
    BrokerUnreachableError,
    ConfigError,
    EncryptionMismatchError,
    InsecureBindError,
    KeyRefusedError,
    NotABrokerError,
    SilentBrokerError,
    WrongBrokerError,
)
from achilles.runtime.shared import note_limits

MAXMSGSIZE = 16 * 1024 * 1024
# Seconds between two attempts to reach a broker that is away: it is found that soon when it is back
RECONNECT_MAX = 2.0
IPC_PATH_MAX = 103 if sys.platform == "darwin" else 107
LOCAL_USER = "local"  # the ZAP user of a peer on an ipc socket, whom the file system has let in

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_EVENT = struct.Struct("=HI")

if not zmq.has("curve") or zmq.zmq_version_info() < (4, 3, 5):
    raise ConfigError(
        f"achilles needs ZeroMQ 4.3.5 or later with CURVE, and this is {zmq.zmq_version()} "
        f"{'with' if zmq.has('curve') else 'without'} it; install it with: pip install 'pyzmq>=27'"
    )


class Endpoint(NamedTuple):
    """``tcp://host:port`` or ``ipc://path``; of the other kind the fields are empty."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        if self.scheme == "ipc":
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        if self.scheme == "ipc" or self.host == "localhost":
            return True
        return _is_address(self.host) and ipaddress.ip_address(self.host).is_loopback


def _is_address(host: str) -> bool:
    """Whether it is an address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class CurveKeys(NamedTuple):
    """What a peer needs to meet a broker over TCP; keys are Z85 text."""

    public: bytes
    secret: bytes
    broker_public: bytes

    def __repr__(self) -> str:
        return f"<CurveKeys {self.public[:8].decode('ascii', 'replace')}…>"


def parse_endpoint(text: str, *, to_bind: bool = False) -> Endpoint:
    """The endpoint that ``text`` names; ``to_bind`` allows port 0, and TCP alone.

    Raises:
        ConfigError: it cannot be one; the text says which part, and shows one that works.
    """
    if not isinstance(text, str):
        raise ConfigError(f"an endpoint is text like tcp://127.0.0.1:5555, not {text!r}")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("tcp", "ipc"):
        raise ConfigError(
            f"{text!r} is not an endpoint that achilles knows: "
            "use tcp://HOST:PORT, for example tcp://127.0.0.1:5555"
        )
    if not text.isprintable() or (scheme == "tcp" and " " in text):
        raise ConfigError(
            f"the endpoint {text!r} has spaces or control characters in it; one that works is tcp://127.0.0.1:5555"
        )
    if scheme == "ipc" and to_bind:
        raise ConfigError(
            f"{text!r}: a broker makes its ipc sockets itself; bind to tcp://127.0.0.1:5555"
        )
    if scheme == "ipc":
        return _parse_ipc(text, rest)
    host, separator, port_text = rest.rpartition(":")
    if not separator or host.endswith(":") or (host.startswith("[") and not host.endswith("]")):
        raise ConfigError(f"the endpoint {text!r} has no port; for example tcp://{rest}:5555")
    if not re.fullmatch("[0-9]{1,5}", port_text) or int(port_text) > 65535:
        first = 0 if to_bind else 1
        raise ConfigError(
            f"{port_text!r} in {text!r} is not a port; ports go from {first} to 65535"
        )
    if int(port_text) == 0 and not to_bind:
        raise ConfigError(f"port 0 in {text!r} can only be bound to; ports go from 1 to 65535")
    return Endpoint("tcp", _parse_host(text, host), int(port_text), "")


def _parse_ipc(text: str, path: str) -> Endpoint:
    if path.startswith("@"):
        raise ConfigError(
            f"{text!r} is an abstract socket, which no permissions protect; "
            "use a path, for example ipc:///run/user/1000/achilles"
        )
    if not path.startswith("/"):
        raise ConfigError(
            f"the path in {text!r} must begin with /, for example ipc:///run/user/1000/achilles"
        )
    if len(os.fsencode(path)) > IPC_PATH_MAX:
        raise ConfigError(
            f"the path in {text!r} is {len(os.fsencode(path))} bytes long; "
            f"a socket's path can have {IPC_PATH_MAX}"
        )
    return Endpoint("ipc", "", 0, path)


def _parse_host(text: str, host: str) -> str:
    if host == "*":
        raise ConfigError(
            f"{text!r} has no host; name one, for example tcp://127.0.0.1:5555, or the address that stands for all interfaces"
        )
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise ConfigError(
                f"{host} in {text!r} is not an IPv6 address; one that works is tcp://[::1]:5555"
            ) from None
    if ":" in host:
        raise ConfigError(f"an IPv6 address needs brackets: tcp://[{host}]:5555, not {text!r}")
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise ConfigError(
            f"{host!r} in {text!r} is not a host name or address; one that works is tcp://127.0.0.1:5555"
        )
    return host


# --- Making sockets -------------------------------------------------------------------------------


def _prepare(socket: zmq.Socket[bytes]) -> None:
    """The options that all sockets share (research: ZeroMQ traps, 3.1)."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAXMSGSIZE)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 1000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 15_000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 6)
    socket.setsockopt(zmq.BACKLOG, 1024)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, int(1000 * RECONNECT_MAX))


class Bound(NamedTuple):
    """A bound ROUTER, and where it listens."""

    socket: zmq.Socket[bytes]
    tcp: Endpoint | None
    ipc: Endpoint | None


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]],
    *,
    tcp: Endpoint | None,
    ipc: Endpoint | None,
    domain: str,
    broker_secret: bytes,
    frame_max: int = MAXMSGSIZE,
) -> Bound:
    """A ROUTER on a TCP endpoint (with CURVE), on an ipc path (behind file permissions), or both.

    A ZAP handler must be running in the context: ``domain`` makes libzmq ask it about everybody.
    The caller must hold the directory of the ipc path (`net.private.BrokerLock`): libzmq lets a
    second socket steal it without a word.

    Raises:
        InsecureBindError: TCP without keys.
        ConfigError: the endpoint is taken, or cannot be bound to.
    """
    if not domain or (tcp is not None and not broker_secret):
        raise InsecureBindError(
            f"{tcp} needs keys and a ZAP domain; a TCP port without them is never made"
        )
    socket = context.socket(zmq.ROUTER)
    try:
        _prepare(socket)
        socket.setsockopt(zmq.MAXMSGSIZE, frame_max)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if ipc is not None:
            if hasattr(zmq, "IPC_FILTER_UID") and sys.platform == "linux":
                socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
            _bind(socket, ipc)
        if tcp is not None:
            # libzmq copies the options at each bind, so what follows is for this endpoint alone.
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, broker_secret)
            if ":" in tcp.host:
                socket.setsockopt(zmq.IPV6, 1)
            _bind(socket, tcp)
            last = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            tcp = tcp._replace(port=int(last.rpartition(":")[2]))
        return Bound(socket, tcp, ipc)
    except BaseException:
        socket.close(0)
        raise


def _bind(socket: zmq.Socket[bytes], endpoint: Endpoint) -> None:
    try:
        socket.bind(str(endpoint))
    except zmq.ZMQError as error:
        reason, hint = error.strerror or str(error), ""
        if error.errno == errno.EADDRINUSE:
            hint = "; port 0 takes any free one"
        elif error.errno == errno.ENODEV:  # libzmq says so of a name that it cannot resolve, too
            reason = "no interface of this host has that name or address"
        raise ConfigError(f"cannot listen on {endpoint}: {reason}{hint}") from None


class Dialed(NamedTuple):
    """A DEALER on its way to a broker, and the watch that tells how it fares."""

    socket: zmq.Socket[bytes]
    watch: Watch
    endpoint: str


def dial_dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: Endpoint,
    keys: CurveKeys | None,
    pid: int = 0,
) -> Dialed:
    """A DEALER that connects to ``endpoint``; TCP needs keys. ``pid``: the broker,
    where it is known to run on this host.

    Raises:
        InsecureBindError: TCP without keys.
        zmq.ZMQError: this process may have no more sockets.
    """
    if endpoint.scheme == "tcp" and keys is None:
        raise InsecureBindError(
            f"{endpoint} needs keys; a TCP connection without them is never made"
        )
    with contextlib.ExitStack() as leave:
        socket = context.socket(zmq.DEALER)
        leave.callback(socket.close, 0)
        _prepare(socket)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing piles up for a broker that is not there
        _take_keys(socket, endpoint, keys)
        watch = Watch(socket, str(endpoint), pid)
        leave.callback(watch.close)
        socket.connect(str(endpoint))
        leave.pop_all()
    return Dialed(socket, watch, str(endpoint))


def dial_as_intruder(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: Endpoint,
    keys: CurveKeys | None,
    events: int,
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A DEALER that should not be let in, keys or none,
    and the monitor that tells whether it was; it says nothing.
    """
    socket = context.socket(zmq.DEALER)
    _prepare(socket)
    _take_keys(socket, endpoint, keys)
    monitor: Any = socket.get_monitor_socket(events)
    socket.connect(str(endpoint))
    return socket, monitor


def _take_keys(socket: zmq.Socket[bytes], endpoint: Endpoint, keys: CurveKeys | None) -> None:
    if endpoint.scheme == "tcp" and keys is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.broker_public)
    if ":" in endpoint.host:
        socket.setsockopt(zmq.IPV6, 1)


# --- What befalls a connection --------------------------------------------------------------------


class WatchEvent(NamedTuple):
    """The handshake succeeded, or there is a problem; ``is_dead``: libzmq will not try again."""

    is_connected: bool
    problem: BrokerUnreachableError | None
    is_dead: bool


class Watch:
    """A DEALER's monitor, which turns ZeroMQ's silence into named errors."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str, pid: int = 0) -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._pid = pid
        host = parse_endpoint(endpoint).host
        self._nobody = (
            f"nothing listens there, or {host!r} is the name of no host"
            if host and not _is_address(host)
            else "nothing listens there"
        )
        self._monitor: Any = socket.get_monitor_socket(
            zmq.EVENT_CONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_CONNECT_RETRIED
        )
        self._is_past_handshake = False
        self.fd: int = self._monitor.FD

    @property
    def has_input(self) -> bool:
        """Whether `poll` would give something."""
        return bool(self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN)

    def poll(self) -> list[WatchEvent]:
        """What has happened since the last call."""
        events: list[WatchEvent] = []
        while self.has_input:
            frame, *_ = self._monitor.recv_multipart(zmq.NOBLOCK)
            event = self._interpret(*_EVENT.unpack_from(frame))
            if event is not None:
                events.append(event)
        return events

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        self._socket.disable_monitor()
        self._monitor.close(0)

    def _interpret(self, event: int, value: int) -> WatchEvent | None:
        at = f"at {self._endpoint}"
        broker = f"the broker {at} (pid {self._pid})" if self._pid else f"the broker {at}"
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_past_handshake = True
            text = f"{broker} took this key, but does not answer; is it overloaded, or stopped?"
            return WatchEvent(True, SilentBrokerError(text), False)
        if event == zmq.EVENT_CONNECTED:
            text = f"what listens {at} was reached, but it never spoke our protocol"
            if self._pid:
                text = f"{broker} was reached, but does not answer; is it overloaded, or stopped?"
            return WatchEvent(False, SilentBrokerError(text), False)
        if event == zmq.EVENT_CONNECT_RETRIED:
            text = (
                f"no achilles broker answers {at} ({self._nobody}); start one with: achilles broker"
            )
            return WatchEvent(False, BrokerUnreachableError(text), False)
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            text = f"the broker {at} refused this key; is it in the broker's authorized keys?"
            return WatchEvent(False, KeyRefusedError(text), True)
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                text = f"what listens {at} speaks ZeroMQ, but one side is encrypted and the other is not"
                return WatchEvent(False, EncryptionMismatchError(text), True)
            text = f"what listens {at} does not speak our protocol"
            return WatchEvent(False, NotABrokerError(text), True)
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            text = (
                f"what listens {at} ended the handshake: it does not hold the expected key (a stale join file, "
                "or somebody else's broker), or it closes every connection"
            )
            return WatchEvent(False, WrongBrokerError(text), False)
        was_past_handshake, self._is_past_handshake = self._is_past_handshake, False
        if event == zmq.EVENT_DISCONNECTED and not was_past_handshake:
            text = f"what listens {at} is not an achilles broker"
            return WatchEvent(False, NotABrokerError(text), True)
        return None


class Gatekeeper:
    """The ZAP handler: answers libzmq's question who may connect, from the broker's own loop.

    ``users`` maps a domain to the users of its public keys; whoever is in none is refused. On ipc
    sockets the file system has decided already.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        users: Mapping[str, Mapping[bytes, str]],
    ) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")
        self.users = users  # replaced as a whole when keys come and go
        self.refused = 0
        # Called with address and reason
        self.on_refused: Callable[[str, str], object] | None = None

    @property
    def has_input(self) -> bool:
        """Whether a question waits."""
        events: int = self.socket.getsockopt(zmq.EVENTS)  # type: ignore[assignment]
        return bool(events & zmq.POLLIN)

    def answer(self) -> None:
        """Answer all questions that wait."""
        while self.has_input:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            request = frames[1] if len(frames) > 1 else b""
            user = self._user(frames)
            if user:
                reply = [b"1.0", request, b"200", b"OK", user.encode(), b""]
            else:
                self._refuse(frames)
                reply = [b"1.0", request, b"400", b"not allowed", b"", b""]
            self.socket.send_multipart(reply)

    def _refuse(self, frames: list[bytes]) -> None:
        self.refused += 1
        if self.on_refused is not None and len(frames) > 5:
            address = frames[3].decode("utf-8", "replace")
            is_curve = frames[5] == b"CURVE"
            why = "its key is not allowed" if is_curve else "it is not a process of this user's"
            self.on_refused(address, why)

    def _user(self, frames: list[bytes]) -> str:
        if len(frames) < 6 or frames[0] != b"1.0":
            return ""
        _, _, domain, address, _, mechanism, *credentials = frames
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            return self.users.get(domain.decode("ascii", "replace"), {}).get(credentials[0], "")
        if mechanism == b"NULL" and _is_own_process(address):
            return LOCAL_USER
        return ""


def _is_own_process(address: bytes) -> bool:
    """Whether a ZAP address is that of an ipc peer of this user: host:uid:gid:pid,
    or empty where that is unknown.
    """
    match = re.fullmatch(rb"[^:]*:(\d+):\d+:\d+", address)
    return not address if match is None else int(match[1]) == os.getuid()


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may; each peer costs one."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    note_limits()


def hostname() -> str:
    """This host's name."""
    return sockets.gethostname()
