"""`python -m tests.reliability.storm`: many sessions find the next broker when theirs is killed
(R20).

All of them are in this process, over TCP with CURVE;
most of what is measured is this process's own work.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

import psutil
import zmq

from achilles.core import protocol as p
from achilles.core.dialer import JOINED, Dialer
from achilles.core.link import Packet
from achilles.net.endpoint import Dialed, dial_dealer, parse_endpoint, raise_descriptor_limit
from achilles.net.keys import Join
from tests.brokers import hello
from tests.chaos.rig import Rig
from tests.reliability import measure

BACK_SECONDS = 10.0
WAIT_SECONDS = 60.0
IDLE_SHARE = 0.5  # of a core, at most, that an idle broker takes afterwards


class Session:
    """A client's, that says nothing but what keeps it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], number: int) -> None:
        message = hello("client", name=f"session-{number}")
        assert isinstance(message, p.ClientHello)
        self.dialer = Dialer(message)
        self._context = context
        self._dialed: Dialed | None = None

    def dial(self, join: Join, poller: zmq.Poller) -> zmq.Socket[bytes]:
        """Connect, anew if need be; the socket."""
        self.close(poller)
        self._dialed = dial_dealer(self._context, parse_endpoint(join.address), join.keys)
        poller.register(self._dialed.socket, zmq.POLLIN)
        self.send(self.dialer.start(time.monotonic()))
        return self._dialed.socket

    def send(self, packets: list[Packet]) -> None:
        """As far as the socket takes it."""
        assert self._dialed is not None
        for packet in packets:
            try:
                self._dialed.socket.send_multipart(p.encode(*packet), zmq.NOBLOCK)
            except zmq.Again:
                return

    def receive(self) -> None:
        """All that is there."""
        assert self._dialed is not None
        while True:
            try:
                frames = self._dialed.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.send(self.dialer.receive(Packet(*p.decode(frames)), time.monotonic()).packets)

    def close(self, poller: zmq.Poller) -> None:
        """Without a word."""
        if self._dialed is not None:
            poller.unregister(self._dialed.socket)
            self._dialed.watch.close()
            self._dialed.socket.close(0)
            self._dialed = None


def main() -> int:
    """Start them, kill the broker, and wait for all to be back."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.storm")
    parser.add_argument("--sessions", type=int, default=1000)
    options = parser.parse_args()
    raise_descriptor_limit()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4 * options.sessions + 100)
    with measure.rig(1, 1, measure.SHIPPED) as rig:
        poller = zmq.Poller()
        sessions = [Session(context, number) for number in range(options.sessions)]
        try:
            first = _join(rig, sessions, poller)
            before = rig.serving_pid()
            assert before is not None
            is_supervised = rig.is_supervised()
            os.kill(before, signal.SIGKILL)
            killed_at = time.monotonic()
            if not is_supervised:
                assert rig.broker is not None
                rig.broker.wait()
                rig.start_broker()
            else:
                rig.await_broker(before)
            up_at = time.monotonic()
            _join(rig, sessions, poller)
            back = time.monotonic() - up_at
            share = _load(rig)
        finally:
            for session in sessions:
                session.close(poller)
            context.destroy(0)
    failures = [] if back <= BACK_SECONDS else [f"{back:.1f} s until all were back"]
    failures += [] if share <= IDLE_SHARE else [f"an idle broker takes {share:.2f} of a core"]
    return measure.finish(
        f"{len(sessions)} sessions back {back:.1f} s after the next broker served (it did {up_at - killed_at:.1f} s after the "
        f"kill; the first time all took {first:.1f} s); the broker then takes {share:.2f} of a core",
        failures,
    )


def _join(rig: Rig, sessions: list[Session], poller: zmq.Poller) -> float:
    """Connect all to the present broker, and wait until all have a session; seconds.

    Raises:
        TimeoutError: some have none.
    """
    join = rig.join("client")
    assert join is not None
    began = time.monotonic()
    sockets = {session.dial(join, poller): session for session in sessions}
    while True:
        now = time.monotonic()
        left = [session for session in sessions if session.dialer.state != JOINED]
        if not left:
            return now - began
        if now - began > WAIT_SECONDS:
            raise TimeoutError(f"{len(left)} of {len(sessions)} sessions have no broker")
        for socket, _ in poller.poll(100):
            sockets[socket].receive()
        for session in left:
            due = session.dialer.next_deadline()
            if due is not None and due <= now:
                session.send(session.dialer.tick(now))


def _load(rig: Rig) -> float:
    """The broker's share of a core, for two seconds."""
    pid = rig.serving_pid()
    assert pid is not None
    return psutil.Process(pid).cpu_percent(2.0) / 100


if __name__ == "__main__":
    sys.exit(main())
