"""`python -m tests.chaos.client`: one client of a run.
It submits a load until it is told to stop, and writes down what it saw.

Its standard input is how it is told: when that ends, it submits nothing more, waits for what is
open, and ends. SIGUSR1 has it say where all its threads are.
It never lives longer than ``--life`` seconds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import faulthandler
import hashlib
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from achilles import DistributedExecutor
from tests.chaos import work

TINY_COUNT = 2000  # items of one map
TELL_SECONDS = 0.2  # between two records of a map's values
TINY_RATE = 4000.0  # items a second at most: the machine is not ours alone
END_SECONDS = 90.0  # for what is open when it is told to stop
MEBIBYTE = 1 << 20


class Recorder:
    """Writes the history, a line a record; what it has been told is in the file before a task is
    submitted.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, **record: Any) -> None:
        """One record."""
        line = json.dumps({**record, "at": round(time.monotonic(), 4)}) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def submit(self, first: int, kind: str, *, count: int = 1, detail: Any = None) -> None:
        """Tasks are about to be submitted."""
        self.write(op="submit", first=first, count=count, kind=kind, detail=detail)

    def done(self, number: int, future: concurrent.futures.Future[Any]) -> None:
        """A task was resolved."""
        if future.cancelled():
            self.write(op="done", first=number, what="cancelled", given=[None])
        elif error := future.exception():
            name, text = type(error).__name__, str(error)[:2000]
            self.write(op="done", first=number, what="error", given=[name], text=text)
        else:
            value = future.result()
            if isinstance(value, bytes):
                value = hashlib.blake2b(value, digest_size=12).hexdigest()
            self.write(op="done", first=number, what="value", given=[value])


class Client:
    """A load's tools: numbers for its tasks, a window of open ones, and the word to stop."""

    def __init__(
        self, executor: DistributedExecutor, recorder: Recorder, log: str, base: int, seed: int
    ) -> None:
        self.executor = executor
        self.recorder = recorder
        self.log = log
        self.random = random.Random(seed)
        self.stopping = threading.Event()
        self.open: set[concurrent.futures.Future[Any]] = set()
        self._next = base

    def take(self, count: int = 1) -> int:
        """The first of so many new numbers."""
        first = self._next
        self._next += count
        return first

    def submit(
        self,
        kind: str,
        function: Callable[..., Any],
        *args: Any,
        detail: Any = None,
        **options: Any,
    ) -> concurrent.futures.Future[Any]:
        """Submit a task and write down what becomes of it."""
        number = self.take()
        self.recorder.submit(number, kind, detail=detail)
        executor = self.executor.with_options(**options) if options else self.executor
        future = executor.submit(function, number, self.log, *args)
        future.add_done_callback(lambda done: self.recorder.done(number, done))
        self.open.add(future)
        return future

    def tell_values(self, first: int, values: list[int], told: int) -> float:
        """Write down what a map has given since the last time; when that was."""
        self.recorder.write(op="done", first=first + told, what="value", given=values[told:])
        return time.monotonic()

    def keep(self, window: int) -> bool:
        """Wait until fewer than ``window`` tasks are open; whether to go on."""
        while not self.stopping.is_set():
            self.open = {future for future in self.open if not future.done()}
            if len(self.open) < window:
                return True
            wait(self.open, 0.1, concurrent.futures.FIRST_COMPLETED)
        return False


def wait(futures: set[concurrent.futures.Future[Any]], seconds: float, until: str) -> None:
    """As `concurrent.futures.wait`."""
    concurrent.futures.wait(futures, seconds, return_when=until)


# --- Loads ----------------------------------------------------------------------------------------


def tiny(client: Client) -> None:
    """L1: no-op items of maps, in order."""
    while not client.stopping.is_set():
        began = time.monotonic()
        first = client.take(TINY_COUNT)
        client.recorder.submit(first, "tiny", count=TINY_COUNT)
        numbers = range(first, first + TINY_COUNT)
        values: list[int] = []
        told, told_at = 0, began
        try:
            for value in client.executor.map(work.tiny, numbers, [client.log] * TINY_COUNT):
                values.append(value)
                if time.monotonic() - told_at > TELL_SECONDS:
                    told_at = client.tell_values(first, values, told)
                    told = len(values)
        except Exception as error:
            at, name = first + len(values), type(error).__name__
            client.recorder.write(
                op="done", first=at, what="error", given=[name], text=str(error)[:2000]
            )
            left = TINY_COUNT - len(values) - 1  # a map that failed cancels what is behind
            client.recorder.write(op="done", first=at + 1, what="behind", given=[None] * left)
        client.tell_values(first, values, told)
        client.stopping.wait(max(0.0, TINY_COUNT / TINY_RATE - (time.monotonic() - began)))


def sleepers(client: Client) -> None:
    """L2: 0.05 to 3 s, most of them short."""
    while client.keep(16):
        seconds = min(3.0, 0.05 + client.random.expovariate(5.0))
        client.submit("sleep", work.sleep, seconds)


def fat(client: Client) -> None:
    """L3: large arguments and values, most of 1 to 4 MiB, some of up to 64 MiB."""
    while client.keep(3):
        sizes = [MEBIBYTE * min(64, int(client.random.paretovariate(1.2))) for _ in range(2)]
        number = client._next
        data = work.blob(number, sizes[0])
        client.submit("fat", work.fat, data, sizes[1], detail=sizes[1])


def awkward(client: Client) -> None:
    """L4: one in eight is bad."""
    kinds = list(work.AWKWARD)
    if not sys.platform.startswith("linux"):
        kinds.remove("hogs memory")
    while client.keep(16):
        if client.random.random() < 0.125:
            kind = client.random.choice(kinds)
            options = {"timeout": 0.3} if kind == "runs too long" else {}
            client.submit(kind, work.awkward, kind, **options)
        else:
            client.submit("sleep", work.sleep, 0.01 + 0.05 * client.random.random())


def cancelled(client: Client) -> None:
    """L5: as_completed, cancellations and timeouts."""
    while client.keep(1):
        batch = []
        for _ in range(24):
            if client.random.random() < 0.15:
                batch.append(client.submit("late", work.sleep, work.PAST_TIMEOUT, timeout=0.2))
            else:
                batch.append(client.submit("cancel", work.sleep, 0.02 + client.random.random() / 5))
        for future in client.random.sample(batch, 6):
            future.cancel()
        try:
            for _ in concurrent.futures.as_completed(batch, timeout=2.0):
                client.random.choice(batch).cancel()
        except concurrent.futures.TimeoutError:
            for future in batch:
                future.cancel()


def gil_holders(client: Client) -> None:
    """L6: calls into C that hold the interpreter for longer than a worker may be silent,
    beside short tasks.
    """
    while client.keep(6):
        if client.random.random() < 0.25:
            client.submit("hold", work.hold_gil, 1.0 + 4.0 * client.random.random())
        else:
            client.submit("sleep", work.sleep, 0.1)


LOADS: dict[str, Callable[[Client], None]] = {
    "L1": tiny,
    "L2": sleepers,
    "L3": fat,
    "L4": awkward,
    "L5": cancelled,
    "L6": gil_holders,
    "L7": fat,  # of a client that does not read: its line is slow (`tests.chaos.run`)
}


def main() -> int:
    """Run the load until told to stop; 1 if something stayed open for too long."""
    options = _parser().parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.dump_traceback_later(options.life, exit=True)
    with open(options.history, "a") as file:
        recorder = Recorder(file)
        executor = DistributedExecutor(address="auto")
        client = Client(executor, recorder, options.log, options.base, options.seed)
        threading.Thread(target=_await_word, args=(client,), daemon=True).start()
        LOADS[options.load](client)
        wait(client.open, END_SECONDS, concurrent.futures.ALL_COMPLETED)
        left = [future for future in client.open if not future.done()]
        if left:
            faulthandler.dump_traceback(all_threads=True)
        recorder.write(op="end", open=len(left))
        executor.shutdown(wait=not left, cancel_futures=bool(left))
    return 1 if left else 0


def _await_word(client: Client) -> None:
    sys.stdin.read()
    client.stopping.set()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.client", description=__doc__)
    parser.add_argument("--load", choices=LOADS, required=True)
    parser.add_argument("--history", required=True, help="where to write what it saw")
    parser.add_argument("--log", required=True, help="where its tasks leave their lines")
    parser.add_argument("--base", type=int, required=True, help="the first task's number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--life", type=float, default=300.0, help="seconds until it ends by force")
    return parser


if __name__ == "__main__":
    sys.exit(main())
