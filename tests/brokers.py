"""A broker in a thread of the test, and peers that speak to it message by message,
honestly or not.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import zmq

from achilles.core import protocol as p
from achilles.core.budget import Limits
from achilles.core.link import Link, Packet
from achilles.core.liveness import Timings
from achilles.net.broker import Broker
from achilles.net.endpoint import CurveKeys, Endpoint, dial_dealer, parse_endpoint
from achilles.net.keys import Join, join_path, read_join
from achilles.net.serve import Addresses, serve
from achilles.net.worker import python_version

WAIT_SECONDS = 10.0
DEFAULT_LIMITS = Limits()

T = TypeVar("T")


class RunningBroker:
    """`serve` in a thread; a context manager that ends it."""

    def __init__(
        self,
        home: Path,
        *,
        bind: str = "tcp://127.0.0.1:0",
        ipc: bool = True,
        credit: int = 1000,
        limits: Limits = DEFAULT_LIMITS,
        advertise: str | None = None,
    ) -> None:
        self.home = home
        self.addresses: Addresses
        self.broker: Broker
        self.open_tasks = -1
        self._options: dict[str, Any] = {
            "home": home,
            "timings": Timings(),
            "credit": credit,
            "limits": limits,
            "with_ipc": ipc,
            "advertise": advertise,
        }
        self._bind = bind
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="broker")

    def _run(self) -> None:
        try:
            self.open_tasks = serve(
                self._bind,
                on_ready=self._note,
                is_stopping=self._stopping.is_set,
                **self._options,
            )
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    def _note(self, addresses: Addresses, broker: Broker) -> None:
        self.addresses, self.broker = addresses, broker
        self._ready.set()

    def join(self, role: str) -> Join:
        """The running broker's join file for a role."""
        return read_join(join_path(self.home, role))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def begin_to_stop(self) -> None:
        """Ask it to end."""
        self._stopping.set()
        if self._thread.is_alive() and hasattr(self, "broker"):
            self.broker.loop.wake()

    def stop(self) -> None:
        """End it, and raise what it raised."""
        self.begin_to_stop()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive(), "the broker does not end"
        if self._error is not None:
            raise self._error

    def __enter__(self) -> RunningBroker:
        self._thread.start()
        assert self._ready.wait(WAIT_SECONDS)
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class RawPeer:
    """A DEALER that sends whatever it is told to; a context manager."""

    def __init__(self, endpoint: Endpoint, keys: CurveKeys | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dialed = dial_dealer(self._context, endpoint, keys)
        self.socket, self._watch = dialed.socket, dialed.watch
        self.link = Link(p.NO_TOKEN)

    def send_frames(self, *frames: p.Buffer) -> None:
        """Send these frames as they are, once there is a connection."""
        assert self.socket.poll(int(WAIT_SECONDS * 1000), zmq.POLLOUT), "no connection"
        self.socket.send_multipart(frames)

    def send(self, message: p.Wire, link: Link | None = None) -> None:
        """Send a message of the session."""
        self.send_frames(*p.encode(*(link or self.link).wrap(message)))

    def receive(self, seconds: float = WAIT_SECONDS) -> p.Wire | None:
        """The next message; None if there is none in time."""
        if not self.socket.poll(int(seconds * 1000)):
            return None
        packet = Packet(*p.decode(self.socket.recv_multipart()))
        if packet.header.token == self.link.token != p.NO_TOKEN:
            for answer in self.link.receive(packet, monotonic())[1]:
                self.send_frames(*p.encode(*answer))
        return packet.message

    def expect(self, kind: type[T]) -> T:
        """The next message of that kind; others are passed over."""
        deadline = monotonic() + WAIT_SECONDS
        seen: list[object] = []
        while monotonic() < deadline:
            message = self.receive(max(0.0, deadline - monotonic()))
            if isinstance(message, kind):
                return message
            seen.append(message)
        raise AssertionError(f"no {kind.__name__} came, but {seen}")

    def hello(self, role: str, **fields: Any) -> p.Welcome:
        """Begin a session."""
        self.link = Link(p.NO_TOKEN)
        self.send(hello(role, **fields))
        welcome = self.expect(p.Welcome)
        self.link = Link(welcome.token)
        return welcome

    def close(self) -> None:
        """End without a word."""
        self._watch.close()
        self._context.destroy(0)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def hello(role: str, **fields: Any) -> p.ClientHello | p.WorkerHello:
    """A hello as an honest peer of that role says it, but for ``fields``."""
    values: dict[str, Any] = {
        "incarnation": secrets.token_bytes(16),
        "version": "0",
        "python": python_version(),
        "name": f"test-{role}",
    }
    if role == "worker":
        return p.WorkerHello(**{**values, "slots": 1, "pid": 1, **fields})
    return p.ClientHello(**{**values, "role": role, **fields})


def raw_peer(broker: RunningBroker, role: str, *, tcp: bool = False) -> RawPeer:
    """A connection in that role, not yet a session."""
    join = broker.join(role)
    if tcp:
        address = join.worker_address if role == "worker" else join.address
        return RawPeer(parse_endpoint(address), join.keys)
    return RawPeer(join.endpoint(), join.keys)


def answer_one(client: RawPeer, worker: RawPeer, number: int) -> None:
    """A task of the client goes to the worker, and its result comes back;
    so do those of others before it.
    """
    call = b"call %d" % number
    client.send(p.Submit(0, 0, [number], [call]))
    payloads: list[p.Payload] = []
    while call not in payloads:
        run = worker.expect(p.Run)
        payloads = list(run.payloads)
        count = len(payloads)
        statuses = bytes([p.VALUE]) * count
        values: list[p.Payload] = [b"of " + call] * count
        worker.send(p.Done(run.lease, list(range(count)), statuses, values, 0.001))
    results = client.expect(p.Results)
    assert (results.ids, list(results.payloads)) == ([number], [b"of " + call])


def wait_for(holds: Callable[[], object], what: str) -> None:
    """Wait for a condition, with a bound."""
    deadline = monotonic() + WAIT_SECONDS
    pause = threading.Event()
    while not holds():
        assert monotonic() < deadline, f"not within {WAIT_SECONDS:g} s: {what}"
        pause.wait(0.005)


def frames_of(message: p.Wire, token: bytes = p.NO_TOKEN, seq: int = 0) -> Sequence[p.Buffer]:
    """The frames of a message with a header of one's choice."""
    return p.encode(p.Header(token, seq, 0), message)
