from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
import zmq
from zmq.utils import z85

from achilles.errors import (
    AuthenticationError,
    BrokerUnreachableError,
    ConfigError,
    InsecureBindError,
)
from achilles.net.endpoint import (
    IPC_PATH_MAX,
    LOCAL_USER,
    Bound,
    CurveKeys,
    Dialed,
    Endpoint,
    Gatekeeper,
    bind_router,
    dial_dealer,
    hostname,
    parse_endpoint,
    raise_descriptor_limit,
)
from tests.security.attacks import attack

WAIT_SECONDS = 10.0
FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
LOOPBACK = Endpoint("tcp", "127.0.0.1", 0, "")


@pytest.mark.parametrize(
    "text",
    [
        "tcp://127.0.0.1:5555",
        "tcp://localhost:1",
        "tcp://node-7.cluster.example:65535",
        "tcp://[::1]:5555",
        "ipc:///run/user/1000/x.ipc",
        "ipc:///a path/x.ipc",
    ],
)
def test_an_endpoint_survives_the_way_to_text_and_back(text: str) -> None:
    assert str(parse_endpoint(text)) == text


@pytest.mark.bad_input(43)
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://localhost:80", "'http://localhost:80' is not an endpoint .*tcp://HOST:PORT"),
        ("localhost:5555", "is not an endpoint"),
        ("", "'' is not an endpoint"),
        ("tipc://{1,2}", "is not an endpoint"),
        ("tcp://localhost", "has no port; for example tcp://localhost:5555"),
        ("tcp://[::1]", "has no port"),
        ("tcp://localhost:", "'' in .* is not a port"),
        ("tcp://localhost:99999", "'99999' in .* is not a port; ports go from 1 to 65535"),
        ("tcp://localhost:-1", "'-1' in .* is not a port"),
        ("tcp://localhost:" + "9" * 5000, "is not a port"),
        ("tcp://localhost:\u0665", "is not a port"),
        ("tcp://localhost:0", "port 0 in .* can only be bound to"),
        ("tcp://*:5555", "has no host; name one"),
        ("tcp://:5555", "'' in .* is not a host name"),
        ("tcp://a b:5555", "spaces or control characters"),
        ("tcp://a\n:5555", "spaces or control characters"),
        ("tcp://-x:5555", "'-x' in .* is not a host name"),
        ("tcp://::1:5555", r"needs brackets: tcp://\[::1\]:5555"),
        ("tcp://[zz]:5555", r"\[zz\] in .* is not an IPv6 address"),
        ("tcp://user@host:1", "is not a host name"),
        ("tcp://eth0;tcp://h:1", "is not|needs brackets"),
        ("ipc://@hidden", "abstract socket, which no permissions protect"),
        ("ipc://x.ipc", "must begin with /"),
        ("ipc:///" + "x" * 107, "is 108 bytes long; a socket's path can have 1"),
        ("ipc:///a\x00b", "control characters"),
        (5, "is text like tcp://127.0.0.1:5555, not 5"),
    ],
)
def test_what_cannot_be_an_endpoint_is_refused_by_name(text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        parse_endpoint(text)


def test_port_0_is_for_binding() -> None:
    assert parse_endpoint("tcp://127.0.0.1:0", to_bind=True) == LOOPBACK


def test_an_ipc_endpoint_is_not_for_binding() -> None:
    with pytest.raises(ConfigError, match="makes its ipc sockets itself; bind to tcp://"):
        parse_endpoint("ipc:///x", to_bind=True)


def test_the_longest_ipc_path_is_allowed() -> None:
    path = "/" + "x" * (IPC_PATH_MAX - 1)
    assert parse_endpoint(f"ipc://{path}").path == path


@pytest.mark.parametrize(
    ("text", "is_loopback"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.9.9.9:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///x", True),
        ("tcp://192.168.0.1:1", False),
        ("tcp://[::]:1", False),
        ("tcp://localhost.evil.example:1", False),
        ("tcp://127.1:1", False),
    ],
)
def test_loopback_is_what_nobody_else_can_reach(text: str, is_loopback: bool) -> None:
    assert parse_endpoint(text).is_loopback is is_loopback


@attack("T9")
def test_keys_do_not_show_their_secret() -> None:
    public, secret = zmq.curve_keypair()
    assert secret.decode() not in repr(CurveKeys(public, secret, public))


class Door:
    """A bound ROUTER with a gatekeeper in a thread that lets one key in."""

    def __init__(self, tmp_path: Path, *, tcp: Endpoint | None = LOOPBACK) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.broker_public, broker_secret = zmq.curve_keypair()
        self.public, self.secret = zmq.curve_keypair()
        raw = bytes(z85.decode(self.public))
        self.gatekeeper = Gatekeeper(self.context, {"door": {raw: "someone"}})
        self.ipc = Endpoint("ipc", "", 0, str(tmp_path / "x.ipc"))
        self.bound: Bound = bind_router(
            self.context, tcp=tcp, ipc=self.ipc, domain="door", broker_secret=broker_secret
        )
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while not self._is_over.is_set():
            self.gatekeeper.socket.poll(10)
            self.gatekeeper.answer()
        self.gatekeeper.socket.close(0)

    def keys(self, *, secret_of: tuple[bytes, bytes] | None = None) -> CurveKeys:
        public, secret = secret_of or (self.public, self.secret)
        return CurveKeys(public, secret, self.broker_public)

    def user_of_next(self) -> str:
        assert self.bound.socket.poll(int(WAIT_SECONDS * 1000)), "nothing came"
        frames = self.bound.socket.recv_multipart(copy=False)
        return str(frames[-1].get("User-Id"))

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self.context.destroy(0)


@pytest.fixture
def door(achilles_home: Path) -> Iterator[Door]:
    door = Door(achilles_home)
    yield door
    door.close()


def dial(endpoint: Endpoint, keys: CurveKeys | None) -> Dialed:
    return dial_dealer(zmq.Context.instance(), endpoint, keys)


def hang_up(dialed: Dialed) -> None:
    dialed.watch.close()
    dialed.socket.close(0)


def outcome(dialed: Dialed) -> tuple[BrokerUnreachableError | None, bool]:
    """What befell the connection: None or the problem, and whether it is dead."""
    deadline = monotonic() + WAIT_SECONDS
    problem: BrokerUnreachableError | None = None
    try:
        while monotonic() < deadline:
            for event in dialed.watch.poll():
                if event.is_connected:
                    return None, False
                text = str(event.problem)
                if event.problem is not None and "never spoke" not in text:
                    return event.problem, event.is_dead
                problem = event.problem
            threading.Event().wait(0.01)
        return problem, False
    finally:
        hang_up(dialed)


def test_a_known_key_is_let_in_and_named(door: Door) -> None:
    assert door.bound.tcp is not None
    dialed = dial(door.bound.tcp, door.keys())
    dialed.socket.send(b"hello")
    assert door.user_of_next() == "someone"
    hang_up(dialed)


def test_a_peer_on_the_ipc_socket_is_the_local_user(door: Door) -> None:
    dialed = dial(door.ipc, None)
    dialed.socket.send(b"hello")
    assert door.user_of_next() == LOCAL_USER
    hang_up(dialed)


@attack("T2")
def test_an_unknown_key_is_refused(door: Door) -> None:
    assert door.bound.tcp is not None
    problem, is_dead = outcome(dial(door.bound.tcp, door.keys(secret_of=zmq.curve_keypair())))
    assert isinstance(problem, AuthenticationError)
    assert "refused this key" in str(problem)
    assert is_dead, "libzmq does not try again; somebody must"
    assert door.gatekeeper.refused == 1


@attack("T15")
def test_a_broker_with_another_key_is_an_authentication_error(door: Door) -> None:
    assert door.bound.tcp is not None
    other, _ = zmq.curve_keypair()
    keys = door.keys()._replace(broker_public=other)
    problem, _ = outcome(dial(door.bound.tcp, keys))
    assert isinstance(problem, AuthenticationError)
    assert "does not hold the expected key" in str(problem)


def test_a_peer_without_keys_is_refused_on_tcp(door: Door) -> None:
    assert door.bound.tcp is not None
    bare: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    monitor = bare.get_monitor_socket(FAILED)
    bare.connect(str(door.bound.tcp))
    bare.send(b"hello")
    assert monitor.poll(int(WAIT_SECONDS * 1000)), "the handshake did not fail"
    assert not door.bound.socket.poll(50)
    bare.disable_monitor()
    monitor.close(0)
    bare.close(0)


def test_a_peer_with_keys_is_refused_on_ipc(door: Door) -> None:
    """The mechanisms are bound to their endpoint; neither opens the other's door."""
    curve: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    curve.setsockopt(zmq.CURVE_PUBLICKEY, door.public)
    curve.setsockopt(zmq.CURVE_SECRETKEY, door.secret)
    curve.setsockopt(zmq.CURVE_SERVERKEY, door.broker_public)
    monitor = curve.get_monitor_socket(FAILED)
    curve.connect(str(door.ipc))
    assert monitor.poll(int(WAIT_SECONDS * 1000)), "the handshake did not fail"
    curve.disable_monitor()
    monitor.close(0)
    curve.close(0)


def test_a_peer_of_another_domain_is_refused() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gatekeeper = Gatekeeper(context, {"door": {b"k" * 32: "someone"}})
    asker = context.socket(zmq.REQ)
    asker.connect("inproc://zeromq.zap.01")
    key = [b"CURVE", b"k" * 32]
    for frames, code in (
        ([b"1.0", b"7", b"door", b"127.0.0.1", b"", *key], b"200"),
        ([b"1.0", b"7", b"window", b"127.0.0.1", b"", *key], b"400"),
        ([b"1.0", b"7", b"\xff", b"127.0.0.1", b"", *key], b"400"),
        ([b"2.0", b"7", b"door", b"127.0.0.1", b"", *key], b"400"),
        ([b"1.0", b"7", b"door", b"127.0.0.1", b"", b"CURVE"], b"400"),
        ([b"1.0", b"7", b"door", b"127.0.0.1", b"", b"NULL"], b"400"),
        ([b"1.0", b"7", b"door", b"127.0.0.1", b"", b"PLAIN", b"a", b"b"], b"400"),
        ([b"1.0", b"7", b"door", f"h:{os.getuid()}:0:1".encode(), b"", b"NULL"], b"200"),
        ([b"1.0", b"7", b"door", f"h:{os.getuid() + 1}:0:1".encode(), b"", b"NULL"], b"400"),
        ([b"1.0"], b"400"),
    ):
        asker.send_multipart(frames)
        gatekeeper.socket.poll(int(WAIT_SECONDS * 1000))
        gatekeeper.answer()
        reply = asker.recv_multipart()
        assert reply[2] == code, frames
        assert (reply[4] == b"") == (code == b"400")
    gatekeeper.socket.close(0)
    context.destroy(0)


@pytest.mark.bad_input(46)
def test_nothing_listens_there() -> None:
    public, secret = zmq.curve_keypair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    problem, is_dead = outcome(
        dial(LOOPBACK._replace(port=port), CurveKeys(public, secret, public))
    )
    assert f"no achilles broker answers at tcp://127.0.0.1:{port}" in str(problem)
    assert not is_dead


@pytest.mark.bad_input(46)
@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n"])
def test_something_else_listens_there(greeting: bytes) -> None:
    public, secret = zmq.curve_keypair()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            # libzmq may hang up at any moment after the greeting's first byte.
            with connection, contextlib.suppress(OSError):
                connection.settimeout(WAIT_SECONDS)
                connection.sendall(greeting)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        endpoint = LOOPBACK._replace(port=server.getsockname()[1])
        problem, _ = outcome(dial(endpoint, CurveKeys(public, secret, public)))
        thread.join()
    assert isinstance(problem, BrokerUnreachableError)
    assert str(endpoint) in str(problem)


def test_tcp_without_keys_is_never_made(achilles_home: Path) -> None:
    with pytest.raises(InsecureBindError, match="needs keys"):
        dial(LOOPBACK._replace(port=1), None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for options in ({"domain": "", "broker_secret": b"x"}, {"domain": "d", "broker_secret": b""}):
        with pytest.raises(InsecureBindError, match="needs keys and a ZAP domain"):
            bind_router(context, tcp=LOOPBACK, ipc=None, **options)  # type: ignore[arg-type]
    context.destroy(0)


def test_a_taken_port_is_named_and_the_socket_closed(achilles_home: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    _, secret = zmq.curve_keypair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = LOOPBACK._replace(port=server.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen on {taken}: Address already in use"):
            bind_router(context, tcp=taken, ipc=None, domain="d", broker_secret=secret)
    context.term()  # hangs if a socket is open


def test_ipv6_loopback_works() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    _, secret = zmq.curve_keypair()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    endpoint = Endpoint("tcp", "::1", 0, "")
    bound = bind_router(context, tcp=endpoint, ipc=None, domain="d", broker_secret=secret)
    assert bound.tcp is not None
    assert str(bound.tcp).startswith("tcp://[::1]:")
    context.destroy(0)


def test_the_descriptor_limit_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        raise_descriptor_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_host_has_a_name() -> None:
    assert hostname() == socket.gethostname()
