"""A loop around a `RunnerHost`, and what its runners answered."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from achilles.core.protocol import (
    Execute,
    FromRunner,
    Load,
    Payload,
    RunnerCommand,
    RunnerDied,
    RunnerDone,
    RunnerEvent,
    RunnerGrown,
    RunnerRecalled,
    Spawn,
)
from achilles.runtime.host import RunnerHost
from achilles.runtime.loop import Loop
from achilles.runtime.serialize import dumps, dumps_call, load_outcome, loads

BOUND = 20.0  # seconds that anything may take on a busy machine
CLIENT = 1

Key = tuple[int, int, int]  # runner, seq, index


class Driver:
    """Applies commands, runs the loop, keeps the events."""

    def __init__(self, **options: Any) -> None:
        self.loop = Loop()
        options = {"path": list(sys.path), "cwd": None} | options
        self.host = RunnerHost(
            register=self.loop.register, unregister=self.loop.unregister, **options
        )
        self.results: dict[Key, tuple[int, Payload]] = {}
        self.seconds: dict[Key, float] = {}
        self.recalled: list[RunnerRecalled] = []
        self.died: dict[int, RunnerDied] = {}
        self.letters: list[FromRunner] = []
        self.blobs = 0

    def apply(self, *commands: RunnerCommand) -> None:
        for command in commands:
            self._take(self.host.apply(command))

    def step(self, limit: float = 0.05) -> None:
        now = time.monotonic()
        deadline = self.host.next_deadline(now)
        self.loop.wait(limit if deadline is None else min(limit, max(0.0, deadline - now)))
        self._take(self.host.collect())

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + BOUND
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; {self.host!r}, died: {self.died}"
            self.step()

    def close(self) -> None:
        self.host.close(timeout=5.0)
        self.loop.close()

    # --- Shorter ways to say things ---

    def spawn(self, runner: int = 1) -> int:
        self.apply(Spawn(runner))
        return self.host.pids()[runner]

    def load(self, value: object, runner: int = 1, client: int = CLIENT) -> int:
        """Give a runner a blob; its number."""
        self.blobs += 1
        self.apply(Load(runner, client, self.blobs, dumps(value)))
        return self.blobs

    def execute(
        self,
        seq: int,
        fn: int,
        *calls: tuple[Any, ...],
        runner: int = 1,
        client: int = CLIENT,
        init: int = 0,
    ) -> None:
        payloads: list[Any] = [dumps_call(args, {}) for args in calls]
        self.apply(Execute(runner, seq, client, fn, init, payloads))

    def outcome(self, seq: int, index: int = 0, runner: int = 1) -> Any:
        """Wait for a result; the value, or the exception as a value."""
        key = (runner, seq, index)
        self.until(lambda: key in self.results or runner in self.died)
        status, payload = self.results[key]
        value, error = load_outcome(status, payload)
        return value if error is None else error

    def run(self, function: object, *args: Any, runner: int = 1, seq: int = 200) -> Any:
        """Run one call on a runner and wait for its outcome."""
        self.results.pop((runner, seq, 0), None)
        self.execute(seq, self.load(function, runner), args, runner=runner)
        return self.outcome(seq, runner=runner)

    def death(self, runner: int = 1) -> RunnerDied:
        self.until(lambda: runner in self.died)
        return self.died[runner]

    def _take(self, events: list[RunnerEvent]) -> None:
        for event in events:
            match event:
                case RunnerDone(runner=runner, results=results):
                    assert runner not in self.died
                    for seq, index, status, seconds, payload in results:
                        assert (runner, seq, index) not in self.results
                        self.results[runner, seq, index] = (status, payload)
                        self.seconds[runner, seq, index] = seconds
                case RunnerGrown():
                    raise AssertionError("only a worker says so")
                case FromRunner():
                    self.letters.append(event)
                case RunnerRecalled():
                    self.recalled.append(event)
                case RunnerDied(runner=runner):
                    assert runner not in self.died
                    self.died[runner] = event


@contextlib.contextmanager
def driving(**options: Any) -> Iterator[Driver]:
    driver = Driver(**options)
    try:
        yield driver
    finally:
        driver.close()


class Gate:
    """A named pipe that a task waits at (`tasks.wait_at`) until it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._fd = -1

    def is_reached(self) -> bool:
        """Whether a task waits, or has waited, there."""
        if self._fd < 0:
            with contextlib.suppress(OSError):  # nobody reads it yet
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        return self._fd >= 0

    def open(self, text: str = "open") -> None:
        os.write(self._fd, text.encode())
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -2


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_end(pid: int) -> None:
    """Wait until the process is gone, but for its entry."""
    deadline = time.monotonic() + BOUND
    while _is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.005)


def value_of(payload: Any) -> Any:
    return loads(payload)
