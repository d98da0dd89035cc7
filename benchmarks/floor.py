"""What a round trip cannot be faster than on this machine: ``python -m benchmarks.floor``.

Each figure is the median of single measurements, in microseconds.
"""

from __future__ import annotations

import argparse
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import zmq

from benchmarks.stats import percentile

ROUNDS = 3_000
END = b"end"


def floors(rounds: int = ROUNDS) -> dict[str, float]:
    """All of them, by what they are."""
    with tempfile.TemporaryDirectory(prefix="f-") as folder:
        return {
            "pickle and unpickle the arguments of a call": _median(_pickles, rounds),
            "a `Future`: make, resolve, ask": _median(_future, rounds),
            "hand something to a thread that sleeps, and back": _threads(rounds),
            "pipe to another process, and back": _pipe(rounds),
            "ZeroMQ over ipc to another process, and back": _zeromq(f"ipc://{folder}/echo", rounds),
            "ZeroMQ over TCP, and back": _zeromq("tcp://127.0.0.1:*", rounds),
        }


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
    options = parser.parse_args()
    if options.echo:
        kind, *rest = options.echo
        if kind == "pipe":
            _echo_pipe(*map(int, rest))
        else:
            _echo_zeromq(*rest)
        return 0
    for what, microseconds in floors().items():
        print(f"{what:<52} {microseconds:8.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
