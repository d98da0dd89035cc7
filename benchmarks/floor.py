"""What a round trip cannot be faster than on this machine: ``python -m benchmarks.floor``.

Each figure is the median of single measurements, in microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import zmq

from achilles.core import protocol as p
from achilles.core.agent import Agent
from achilles.core.scheduler import Scheduler
from achilles.core.submission import Submission
from benchmarks.stats import percentile

ROUNDS = 3_000
END = b"end"
TURNS = 6  # processes: about as many as a round trip through a broker has threads that compute
# Starts a program whose code lies where it lies in all others that are started so. It is for
# measurements: addresses that nobody can guess are a defence.
SAME_ADDRESSES = ("setarch", "-R")
COMMAND_SECONDS = 120.0


def floors(rounds: int = ROUNDS) -> dict[str, float]:
    """All of them, by what they are; but for what this system cannot do."""
    with tempfile.TemporaryDirectory(prefix="f-") as folder:
        found = {
            "pickle and unpickle the arguments of a call": _median(_pickles, rounds),
            "a `Future`: make, resolve, ask": _median(_future, rounds),
            "hand something to a thread that sleeps, and back": _threads(rounds),
            "pipe to another process, and back": _pipe(rounds),
            "ZeroMQ over ipc to another process, and back": _zeromq(f"ipc://{folder}/echo", rounds),
            "ZeroMQ over TCP, and back": _zeromq("tcp://127.0.0.1:*", rounds),
            "the three cores' part in a task, alone on a core": _turns(1, rounds),
            f"the same, where {TURNS} processes take turns on a core": _turns(TURNS, rounds),
        }
    command = [*SAME_ADDRESSES, sys.executable, "-m", "benchmarks.floor", "--turns", str(rounds)]
    if (told := output_of(command)) is not None:
        found["the same, with their code at the same addresses in all of them"] = float(told)
    return found


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints; None if it is not there, fails, or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=COMMAND_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _median(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return percentile(times, 0.5) * 1e6


def _pickles() -> object:
    return pickle.loads(pickle.dumps(((7,), {}), 5))


def _future() -> object:
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    future.set_result(7)
    return future.result()


def _threads(rounds: int) -> float:
    there: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    back: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def echo() -> None:
        while (value := there.get()) is not None:
            back.put(value)

    thread = threading.Thread(target=echo)
    thread.start()

    def trip() -> None:
        there.put(7)
        back.get()

    try:
        return _median(trip, rounds)
    finally:
        there.put(None)
        thread.join()


def _pipe(rounds: int) -> float:
    there_read, there = os.pipe()
    back, back_write = os.pipe()
    with _other("pipe", str(there_read), str(back_write), fds=(there_read, back_write)):
        os.close(there_read)
        os.close(back_write)

        def trip() -> None:
            os.write(there, b"7")
            os.read(back, 1)

        try:
            trip()
            return _median(trip, rounds)
        finally:
            os.close(there)
            os.close(back)


def _echo_pipe(read: int, write: int) -> None:
    while data := os.read(read, 1):
        os.write(write, data)


def _zeromq(address: str, rounds: int) -> float:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.bind(address)
        with _other("zeromq", socket.getsockopt_string(zmq.LAST_ENDPOINT)):
            first, _ = socket.recv_multipart()

            def trip() -> None:
                socket.send_multipart([first, b"7"])
                socket.recv_multipart()

            try:
                trip()
                return _median(trip, rounds)
            finally:
                socket.send_multipart([first, END])


def _echo_zeromq(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        socket.send(b"here")
        while (data := socket.recv()) != END:
            socket.send(data)


class _Cores:
    """The cores of embedded mode, and a runner that is done at once:
    what Python computes for a task, and nothing else.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._group = p.Group(1, 0)
        self._submission = Submission()
        self._scheduler = Scheduler(now=0.0)
        self._agent = Agent(1)
        none = bytes(16)
        self._scheduler.join("client", p.ClientHello(none, "client", "", "", "floor"), 0.0)
        self._scheduler.join("worker", p.WorkerHello(none, "", "", "floor", 1, 1), 0.0)
        self._submission.connect(0)
        self._submission.add_blob(1, b"function")

    def trip(self) -> None:
        """One task, from its submission to its result."""
        id = next(self._ids)
        sends: deque[Any] = deque(self._submission.submit(self._group, [id], [b"arguments"]))
        results = 0
        while sends:
            to, message = sends.popleft()
            sends += self._pass_on(to, message)
            results += isinstance(message, p.Results)
        assert results == 2, "no result came back"  # once to the submission, once to the user

    def _pass_on(self, to: Any, message: Any) -> Iterable[Any]:
        if to == "host":
            if not isinstance(message, p.Execute):
                return []
            done = p.RunnerDone(message.runner, [(message.seq, 0, p.VALUE, 1e-6, b"value")])
            return self._agent.receive(done, 0.0)
        if to == "worker":
            return self._agent.receive(message, 0.0)
        if to == "client":
            return self._submission.receive(message, 0.0)
        if to == "user":
            return []
        peer = "worker" if isinstance(message, p.Done) else "client"
        return self._scheduler.receive(peer, message, 0.0)


def _turns(count: int, rounds: int) -> float:
    """A `_Cores.trip` in each of so many processes on one core, one after the other:
    what one of them takes.
    """
    with _one_core(), ExitStack() as others:
        ring = [os.pipe() for _ in range(count)]
        first, back = ring[0][1], ring[-1][0]
        others.callback(os.close, back)
        for (read, _), (_, write) in itertools.pairwise(ring):
            others.enter_context(_other("turns", str(read), str(write), fds=(read, write)))
            os.close(read)
            os.close(write)
        others.callback(os.close, first)  # before all else: that ends one process after the other
        cores = _Cores()

        def turn() -> None:
            cores.trip()
            os.write(first, b"7")
            os.read(back, 1)

        for _ in range(rounds // 10):
            turn()
        return _median(turn, rounds) / count


def _echo_turns(read: int, write: int) -> None:
    cores = _Cores()
    while data := os.read(read, 1):
        cores.trip()
        os.write(write, data)


@contextmanager
def _one_core() -> Iterator[None]:
    """This process, and those that it starts, share one core;
    where the system has a way to say so.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _other(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[None]:
    """The process at the other side, which ends when it is told to."""
    command = [sys.executable, "-m", "benchmarks.floor", "--echo", *arguments]
    process = subprocess.Popen(command, pass_fds=fds)
    try:
        yield
        process.wait(10)
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("--echo", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turns:
        print(_turns(TURNS, options.turns))
        return 0
    if options.echo:
        kind, *rest = options.echo
        if kind == "pipe":
            _echo_pipe(*map(int, rest))
        elif kind == "turns":
            _echo_turns(*map(int, rest))
        else:
            _echo_zeromq(*rest)
        return 0
    for what, microseconds in floors().items():
        print(f"{what:<58} {microseconds:8.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
