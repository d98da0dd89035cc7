"""Many real sessions in one process: ``net.peer`` on real sockets, over ipc or over TCP with CURVE.

    python -m benchmarks.fleet HOME COUNT

are COUNT workers of one slot of the broker in HOME, which answer each task at once. It prints the
seconds until all had a session, and serves until its standard input ends;
then it prints how many tasks it has had.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from achilles.core import protocol as p
from achilles.net.endpoint import Dialed, dial_dealer, raise_descriptor_limit
from achilles.net.keys import Join, join_path, read_join
from achilles.net.loop import POLLIN, POLLOUT, SocketLoop
from achilles.net.peer import Peer
from achilles.net.transport import EVENTS
from achilles.runtime.loop import Loop
from benchmarks.fakes import Answerer, Asker, Load, hello

JOIN_SECONDS = 60.0
TICK_SECONDS = 0.1
READ_AT_ONCE = 100  # of one socket, while others wait
TOGETHER = 1000  # tasks of one message
TASKS_MAX = 8  # open ones of those that are large


class FdLoop(SocketLoop):
    """Waits for its sockets' descriptors: one poll of hundreds of sockets costs more than what it
    finds.

    A descriptor only tells of changes, and any call on its socket can use a change up: so a socket
    is read until it has nothing more, and `look` looks at all of them after something else was done
    with them.
    """

    def __init__(self) -> None:
        self._watched: dict[Any, tuple[Callable[[], object], int]] = {}
        self._unread: set[Any] = set()
        super().__init__()

    def watch(
        self, socket: zmq.Socket[bytes], callback: Callable[[], object], *, write: bool = False
    ) -> None:
        self._watched[socket] = callback, POLLIN | POLLOUT if write else POLLIN
        self.register(socket.FD, partial(self._read, socket))
        self._unread.add(socket)

    def unwatch(self, socket: zmq.Socket[bytes]) -> None:
        if self._watched.pop(socket, None) is not None:
            self.unregister(socket.FD)

    def wait(self, timeout: float | None) -> None:
        unread, self._unread = self._unread, set()
        for socket in unread:
            self._read(socket)
        Loop.wait(self, 0.0 if self._unread else timeout)

    def look(self) -> None:
        """Read what came while others used the sockets."""
        self._unread.update(self._watched)

    def _read(self, socket: Any) -> None:
        for _ in range(READ_AT_ONCE):
            watched = self._watched.get(socket)
            if watched is None or not socket.getsockopt(EVENTS) & watched[1]:
                return
            watched[0]()
        self._unread.add(socket)

    def _watch_files(self) -> None:
        """Nothing else polls them."""


class Fleet:
    """Sessions with one broker, in one thread; a context manager."""

    def __init__(self, sessions: int) -> None:
        raise_descriptor_limit()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4 * sessions + 100)  # with a monitor's two
        self.loop = FdLoop()
        self.peers: list[Peer] = []
        self._tick_at = 0.0
        self._is_whole = False  # all have had a session, and none may lose it

    def add(self, join: Join, role: str, answer: Callable[[p.Wire], list[p.Wire]]) -> Peer:
        """One more session."""

        def dial() -> Dialed:
            return dial_dealer(self._context, join.endpoint(), join.keys)

        def on_message(message: p.Wire, _: float) -> None:
            if isinstance(message, p.Gone) and not self._is_whole:
                return  # its connection was one of too many at once; it says hello again
            answers = answer(message)
            if answers:
                peer.send(answers)

        said = hello(role, f"{role}-{len(self.peers)}")
        peer = Peer(dial, self.loop, said, on_message)
        self.peers.append(peer)
        return peer

    def step(self, timeout: float = TICK_SECONDS) -> None:
        """Wait, and handle what there is."""
        now = time.monotonic()
        if now >= self._tick_at:
            self._tick_at = now + TICK_SECONDS
            for peer in self.peers:
                peer.tick(now)
            self.loop.look()
        self.loop.wait(min(timeout, max(0.0, self._tick_at - now)))

    def join(self) -> None:
        """Wait until all have a session.

        Raises:
            TimeoutError: some have none.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        while left := sum(not peer.is_joined for peer in self.peers):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} of {len(self.peers)} sessions have no broker")
            self.step()
        self._is_whole = True

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        for peer in self.peers:
            peer.close()
        self.loop.close()
        self._context.destroy(0)


class Client:
    """A fleet of one client."""

    def __init__(self, home: str) -> None:
        self.fleet = Fleet(1)
        self.asker = Asker()
        self._peer = self.fleet.add(
            read_join(join_path(Path(home), "client")), "client", self.asker.answer
        )
        self.fleet.join()

    def run(self, load: Load, queue: int, seconds: float, least: int = 1) -> tuple[int, float]:
        """Keep ``queue`` tasks open for so long, and until ``least`` are done:
        how many were done, and in what time.

        Raises:
            TimeoutError: nothing is done any more.
        """
        asker = self.asker
        began, start = asker.done, time.perf_counter()
        last, heard = began, start
        while True:
            self._fill(load, queue)
            self.fleet.step()
            now = time.perf_counter()
            if asker.done > last:
                last, heard = asker.done, now
            elif now - heard > JOIN_SECONDS:
                raise TimeoutError(f"no task was done for {JOIN_SECONDS:g} s")
            if now - start >= seconds and asker.done - began >= least:
                return asker.done - began, now - start

    def _fill(self, load: Load, queue: int) -> None:
        """Submit as much as is missing, and as the broker grants;
        not one by one where there is room for many.
        """
        asker = self.asker
        if load.size == 8:
            missing = queue - len(asker.open)
            while missing >= min(TOGETHER, max(1, queue // 4)):
                self._peer.send(asker.ask(load, min(missing, TOGETHER)))
                missing = queue - len(asker.open)
        else:
            while len(asker.open) < min(queue, TASKS_MAX) and asker.has_room(load):
                self._peer.send(asker.ask(load, 1))
        self.fleet.loop.look()

    def drain(self) -> None:
        """Wait for all results."""
        while self.asker.open:
            self.fleet.step()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.fleet.__exit__(*exc)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("count", type=int)
    options = parser.parse_args(arguments)
    join = read_join(join_path(options.home, "worker"))
    answerers = [Answerer() for _ in range(options.count)]
    with Fleet(options.count) as fleet:
        start = time.perf_counter()
        for answerer in answerers:
            fleet.add(join, "worker", answerer.answer)
        fleet.join()
        print(time.perf_counter() - start, flush=True)
        is_over = False

        def end() -> None:
            nonlocal is_over
            is_over = not os.read(0, 4096)

        fleet.loop.register(0, end)
        while not is_over:
            fleet.step()
    print(sum(answerer.done for answerer in answerers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
