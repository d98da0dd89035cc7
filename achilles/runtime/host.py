"""The host's side of runners: turns commands into what a child reads,
and what it writes into events.

Rules
    1. Single-threaded, and nothing blocks: what a runner does not take stays in its outbox.
    2. Runners end with their host, also where a fork of it lives on.

``achilles.runtime.hosted`` is what happens to each.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections.abc import Callable
from typing import TypeAlias

from achilles.core.protocol import (
    Execute,
    Kill,
    Load,
    Recall,
    Retire,
    RunnerCommand,
    RunnerDied,
    RunnerEvent,
    RunnerRecalled,
    Spawn,
    ToRunner,
    Unload,
)
from achilles.runtime.hosted import LOOK_SECONDS, HostedRunner
from achilles.runtime.life import life_pipe
from achilles.runtime.process import READ_MAX, which_limit
from achilles.runtime.seal import OUTPUT as OUTPUT_LETTER
from achilles.runtime.seal import Seal

Register: TypeAlias = Callable[..., None]


class RunnerHost:
    """Starts, feeds, reads and ends runners on behalf of a loop that watches descriptors.

    ``register(fd, callback, write=False)`` watches ``fd`` for reading, or for both with ``write``;
    it is called again to change that. The callbacks gather events, which `collect` hands out.
    ``argv`` is the program's and ``authkey`` multiprocessing's, where runners belong to one
    program. Those that are ``is_remote`` ask their client for modules that they lack. What they
    print is told as events if the host ``captures`` it; without a task it goes to our own stderr.
    Runners that get the ``code`` key run sealed calls, and no others.
    """

    def __init__(
        self,
        *,
        register: Register,
        unregister: Callable[[int], None],
        path: list[str] | None,
        cwd: str | None,
        argv: list[str] | None = None,
        environ: dict[str, str] | None = None,
        authkey: bytes | None = None,
        is_remote: bool = False,
        captures: bool = False,
        code: bytes | None = None,
        cluster: str = "",
    ) -> None:
        self.register = register
        self.unregister = unregister
        self.environ = environ
        self.setup = {
            "path": path,
            "cwd": cwd,
            "argv": argv,
            "authkey": authkey,
            "is_remote": is_remote,
            "captures": captures,
            "code": code,
            "cluster": cluster,
            "credit": 0,
        }
        self.seal = None if code is None else Seal(code)
        self.pieces = itertools.count(1)  # of what was printed
        self.origin = os.urandom(8)  # whose pieces these are
        self.captures = captures
        self.hands_on = is_remote  # large results, to the broker
        self.runners: dict[int, HostedRunner] = {}
        self.polled: set[HostedRunner] = set()  # something is awaited of them that wakes nobody
        self.dying: set[HostedRunner] = set()  # killed, or their channel ended, but not yet gone
        self.events: list[RunnerEvent] = []
        self.life_read, self.life = life_pipe()
        # Where all reads go: a buffer of that size, made and given back for each,
        # costs more than what is read.
        self.buffer = memoryview(bytearray(READ_MAX))
        _hosts.add(self)

    def __repr__(self) -> str:
        return f"<RunnerHost {len(self.runners)} runners, {len(self.dying)} dying>"

    def apply(self, effect: RunnerCommand) -> list[RunnerEvent]:
        """Do it. The events are all those gathered so far, the answer to `Recall` among them.

        A `Kill` is answered when the process is gone, which `collect` tells some milliseconds
        later. Commands to a runner that does not exist (any more) do nothing:
        its death was or will be told.
        """
        if isinstance(effect, Spawn):
            self._spawn(effect.runner)
        elif (runner := self.runners.get(effect.runner)) is not None:
            match effect:
                case Execute():
                    runner.execute(effect)
                case Load(client=client, blob=blob, payload=payload):
                    runner.load(client, blob, payload)
                case Unload(client=client, blobs=[]):
                    runner.unload(("forget_client", client))
                case Unload(client=client, blobs=blobs):
                    runner.unload(("forget", client, blobs))
                case Recall(runner=number, keeps_first=keeps_first):
                    unstarted = runner.recall(keeps_first=keeps_first)
                    self.events.append(RunnerRecalled(number, unstarted))
                case Kill():
                    runner.kill()
                case Retire():
                    runner.retire()
                case ToRunner(client=client, kind=kind, body=body):
                    runner.write(kind, client, body)
        return self._take_events()

    def collect(self) -> list[RunnerEvent]:
        """The events gathered since; reads the stream pipes, when that is due,
        and looks after the dying, too.
        """
        if self.polled:
            now = time.monotonic()
            for runner in tuple(self.polled):
                if runner.outbox or now >= runner.poll_at:
                    runner.poll()
        for runner in tuple(self.dying):
            runner.bury()
        return self._take_events()

    def next_deadline(self, now: float) -> float | None:
        """When `collect` is wanted next even if no descriptor is ready."""
        if not self.polled and not self.dying:
            return None
        if self.dying or any(runner.outbox for runner in self.polled):
            return now + LOOK_SECONDS
        return max(now, min(runner.poll_at for runner in self.polled))

    def close(self, *, timeout: float) -> None:
        """End and reap all runners; those that are idle may exit by themselves for up to
        ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        runners = tuple(self.runners.values())
        for runner in runners:
            runner.poll()
            if runner.chunks or runner.outbox or runner.held:
                runner.kill()
            else:
                runner.retire()
        for runner in runners:
            runner.end(deadline)
        self.events.clear()
        if self in _hosts:
            _hosts.discard(self)
            os.close(self.life_read)
            os.close(self.life)

    def sealed(self, body: bytes, root: bytes) -> bytes:
        """What a task of that root has printed, as it travels."""
        if self.seal is None:
            return body
        once = self.origin + next(self.pieces).to_bytes(8, "big")
        return once + self.seal.letter(OUTPUT_LETTER, root, once, body) + body

    def pids(self) -> dict[int, int]:
        """Process ids by runner."""
        return {number: runner.pid for number, runner in self.runners.items()}

    def _take_events(self) -> list[RunnerEvent]:
        events = self.events
        if events:
            self.events = []
        return events

    def _spawn(self, number: int) -> None:
        try:
            runner = HostedRunner(self, number)
        except OSError as error:
            reason = f"could not be started: {error}{which_limit(error)}"
            self.events.append(RunnerDied(number, reason, [], 0))
            return
        self.runners[number] = runner
        runner.send(("setup", self.setup))


_hosts: weakref.WeakSet[RunnerHost] = weakref.WeakSet()


def _close_in_fork() -> None:
    """A forked child must not keep the channels open, or runners would outlive the host."""
    for host in tuple(_hosts):
        for runner in host.runners.values():
            runner.process.disown()
        os.close(host.life_read)
        os.close(host.life)
    _hosts.clear()


os.register_at_fork(after_in_child=_close_in_fork)
