"""The processes of a run: a broker, workers and clients, each peer behind a proxy of its own.
All of it on loopback.

Nothing outlives its run: each process is on a leash
(`tests.chaos.leash`), and clients have a longest life besides.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from achilles.core import protocol as p
from achilles.core.status import status_dict
from achilles.errors import AchillesError
from achilles.net.control import request
from achilles.net.endpoint import parse_endpoint
from achilles.net.keys import Join, join_path, read_join
from achilles.net.peer import dialer_to
from achilles.net.private import private_directory, write_private
from tests.chaos.proxy import Network, Proxy

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0
END_SECONDS = 15.0
STATUS_SECONDS = 3.0
STEP = 0.02
UNFLUSHED = 120  # what Python exits with where its output could not be written
CLIENT_NUMBERS = 10**9  # so many numbers each client has for its tasks

# Every timeout of the protocol, divided by five, so that cycles are short.
QUICK = {
    "ACHILLES_BROKER_HEARTBEAT_INTERVAL": "0.2",
    "ACHILLES_BROKER_SUSPECT_AFTER": "1",
    "ACHILLES_BROKER_LOST_AFTER": "3",
    "ACHILLES_BROKER_GRACE": "0.4",
}


class Started:
    """A process of the rig behind its proxy; ``history`` is a client's."""

    def __init__(self, name: str, proxy: Proxy, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.proxy = proxy
        self.process = process
        self.history = Path()
        self.was_killed = False
        self.respawn_at: float | None = None  # of a worker that ended

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def __repr__(self) -> str:
        return f"<{self.name} pid {self.process.pid}>"


class Rig:
    """A context manager. ``timings``: variables of the environment; ``is_full``: what broker and
    workers log goes to a full disk; ``worker_level``: what workers log; ``is_near``: all meet over
    ipc, found as users find it, and proxies have nothing to do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        slots: int = 2,
        timings: dict[str, str] | None = None,
        is_full: bool = False,
        clock: Path | None = None,
        worker_level: str = "error",
        is_near: bool = False,
    ) -> None:
        self.folder = private_directory(folder)
        self.home = private_directory(folder / "home")
        self.log = folder / "executions"
        self.workers: list[Started] = []
        self.clients: list[Started] = []
        self.broker: subprocess.Popen[bytes] | None = None
        self.no_status = "there is no join file"  # why there was none, last time
        self._is_watched = False  # whether the process that serves is another one's child
        self.restarted_at: list[float] = []  # the broker, by us: when that was begun
        self.respawns = 0  # of workers, that ended by themselves
        self._counts = (workers, slots)
        self._is_full = is_full
        self._is_near = is_near
        self._worker_level = "debug" if is_full else worker_level
        self._files: list[IO[bytes]] = []
        self._all: list[subprocess.Popen[bytes]] = []
        self._names = 0
        self._network = Network()
        path = [str(ROOT)]
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("ACHILLES_")
        }
        self.environ.update(QUICK if timings is None else timings, ACHILLES_HOME=str(self.home))
        if clock is not None:
            path.insert(0, str(Path(__file__).parent / "skew"))
            self.environ["CHAOS_CLOCK"] = str(clock)
        self.environ["PYTHONPATH"] = os.pathsep.join(path)

    # --- Start and end ----------------------------------------------------------------------------

    def __enter__(self) -> Rig:
        self._network.__enter__()
        try:
            self.start_broker()
            workers, slots = self._counts
            for _ in range(workers):
                self.add_worker(slots)
            self.await_status(lambda status: status["workers"] == workers, "all workers joined")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._all:
            if process.poll() is None:
                process.kill()
        for process in self._all:
            process.wait(END_SECONDS)
            if process.stdin is not None:
                process.stdin.close()
        self._network.__exit__()
        for file in self._files:
            file.close()

    def stop(self) -> list[str]:
        """End all as a user would; what did not end well."""
        problems = []
        runners = self.runners()
        left = [worker.process for worker in self.workers if worker.is_running]
        if self.broker is not None:
            left.append(self.broker)
        for process in left:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                problems.append(
                    f"process {process.pid} did not end within {END_SECONDS:g} s of SIGTERM"
                )
                continue
            if code not in (0, 128 + signal.SIGTERM, UNFLUSHED if self._is_full else 0):
                problems.append(f"process {process.pid} ended with {code}")
        _, alive = psutil.wait_procs(runners, END_SECONDS)
        problems += [f"runner {runner.pid} is left" for runner in alive]
        left_over = [path.name for path in (self.home / "run").glob("*.join")]
        if left_over:
            problems.append(f"join files are left: {left_over}")
        return problems

    def _spawn(self, name: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        path = self.folder / f"{name}.err"
        is_full = self._is_full and not name.startswith("client")
        file = open("/dev/full" if is_full else path, "ab")  # noqa: SIM115 (closed in __exit__)
        self._files.append(file)
        options = {"stdin": subprocess.DEVNULL, "env": self.environ, **options}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.leash", sys.executable, "-m", *words],
            stdout=file,
            stderr=file,
            cwd=ROOT,
            **options,
        )
        self._all.append(process)
        return process

    # --- The broker -------------------------------------------------------------------------------

    def start_broker(self) -> None:
        """Start one where there is none, and wait until it serves."""
        level = "debug" if self._is_full else "warning"
        words = ["achilles", "--log-level", level, "broker", "--bind", "tcp://127.0.0.1:0"]
        before = self.serving_pid()
        self.broker = self._spawn("broker", *words, *([] if self._is_near else ["--no-ipc"]))
        self.await_broker(before)

    def await_broker(self, before: int | None) -> None:
        """Wait for a broker that serves, and is not the process ``before``.

        Raises:
            AssertionError: there is none in time.
        """
        assert self.broker is not None
        broker = self.broker
        self.wait_until(
            lambda: broker.poll() is not None or self.serving_pid() not in (None, before),
            "a broker that serves",
        )
        assert broker.poll() is None, f"the broker ended with {broker.returncode}"

    def join(self, role: str) -> Join | None:
        """The running broker's join file."""
        try:
            return read_join(join_path(self.home, role))
        except (OSError, AchillesError):
            return None

    def serving_pid(self) -> int | None:
        """The process that serves, which is the child of one that watches it;
        None if there is none at present.
        """
        join = self.join("admin")
        if join is None:
            return None
        try:
            children = psutil.Process(join.pid).children()
        except psutil.Error:
            return None
        self._is_watched = self._is_watched or bool(children)
        if children:
            return children[0].pid
        return None if self._is_watched else join.pid

    def is_supervised(self) -> bool:
        """Whether another broker comes by itself."""
        return self.broker is not None and self.serving_pid() not in (None, self.broker.pid)

    def _target(self, role: str) -> tuple[str, int] | None:
        join = self.join(role)
        if join is None:
            return None
        place = parse_endpoint(join.worker_address if role == "worker" else join.address)
        return place.host, place.port

    def _proxied(self, role: str, name: str) -> tuple[Proxy, Path]:
        """A proxy, and a join file that leads to it."""
        proxy = self._network.add(lambda: self._target(role), len(self._all))
        join = self.join(role)
        assert join is not None
        address = f"tcp://127.0.0.1:{proxy.port}"
        changed = msgspec.structs.replace(
            join, address=address, worker_address=address, ipc="", worker_ipc=""
        )
        path = self.folder / f"{name}.join"
        write_private(path, changed.encode(), replace=True)
        return proxy, path

    # --- Workers and clients ----------------------------------------------------------------------

    def add_worker(self, slots: int) -> Started:
        """Start one more worker."""
        name = f"worker-{len(self.workers)}"
        proxy, _ = self._proxied("worker", name)
        worker = Started(name, proxy, self._spawn_worker(name, slots))
        self.workers.append(worker)
        return worker

    def _spawn_worker(self, name: str, slots: int) -> subprocess.Popen[bytes]:
        join = [] if self._is_near else ["--join", str(self.folder / f"{name}.join")]
        words = ["worker", *join, "--slots", str(slots)]
        words = ["--log-level", self._worker_level, *words, "--name", name]
        return self._spawn(name, "achilles", *words)

    def tend(self, now: float) -> None:
        """Start workers and a broker anew that have ended,
        as whoever runs a cluster has it done.
        """
        for worker in self.workers:
            if worker.is_running:
                continue
            if worker.respawn_at is None:
                worker.respawn_at = now + 0.3
                self.respawns += 1
            elif now >= worker.respawn_at:
                worker.respawn_at = None
                worker.process = self._spawn_worker(worker.name, self._counts[1])
        if self.broker is not None and self.broker.poll() is not None:
            self.restarted_at.append(now)
            self.start_broker()

    def add_client(self, load: str, seed: int, life: float) -> Started:
        """Start a client."""
        name = f"client-{len(self.clients)}"
        proxy, join = self._proxied("client", name)
        history = self.folder / f"{name}.jsonl"
        base = (len(self.clients) + 1) * CLIENT_NUMBERS
        process = self._spawn(
            name,
            *("tests.chaos.client", "--load", load, "--history", str(history)),
            *("--log", str(self.log), "--base", str(base)),
            *("--seed", str(seed), "--life", str(life)),
            stdin=subprocess.PIPE,
            env=self.environ if self._is_near else {**self.environ, "ACHILLES_JOIN": str(join)},
        )
        client = Started(name, proxy, process)
        client.history = history
        self.clients.append(client)
        return client

    def tell_to_end(self, client: Started) -> None:
        """It shall submit nothing more, and end when all is resolved."""
        assert client.process.stdin is not None
        with contextlib.suppress(OSError):
            client.process.stdin.close()

    def runners(self) -> list[psutil.Process]:
        """All that run now."""
        found: list[psutil.Process] = []
        for worker in self.workers:
            with contextlib.suppress(psutil.Error):
                found += psutil.Process(worker.process.pid).children()
        return found

    def in_pipes(self) -> int:
        """How many workers have pipes together with the broker, each way one."""
        broker = _pipes_of(self.serving_pid())
        return sum(len(broker & _pipes_of(worker.process.pid)) >= 2 for worker in self.workers)

    def proxies(self) -> list[Proxy]:
        """Of peers that run."""
        return [peer.proxy for peer in [*self.workers, *self.clients] if peer.is_running]

    # --- Looking ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any] | None:
        """What the broker says; None if it does not."""
        join = self.join("admin")
        if join is None:
            return None
        try:
            answer = request(dialer_to(join), p.StatusRequest(), timeout=STATUS_SECONDS)
        except AchillesError as error:
            self.no_status = str(error)
            return None
        assert isinstance(answer, p.Status)
        return status_dict(answer)

    def await_status(
        self, holds: Callable[[dict[str, Any]], bool], what: str, *, tends: bool = False
    ) -> None:
        """Wait for the status to be as wanted; ``tends``: what ends meanwhile is started anew.

        Raises:
            AssertionError: it is not, for too long.
        """
        last: list[object] = [None]

        def is_so() -> bool:
            if tends:
                self.tend(time.monotonic())
            status = self.status()
            last[0] = status or self.no_status
            return status is not None and holds(status)

        self.wait_until(is_so, what, last)

    def wait_until(
        self, holds: Callable[[], object], what: str, seen: Sequence[object] = ()
    ) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it does not hold within `START_SECONDS`.
        """
        deadline = time.monotonic() + START_SECONDS
        while not holds():
            assert time.monotonic() < deadline, (
                f"not within {START_SECONDS:g} s: {what}; {list(seen)} in {self.folder}"
            )
            time.sleep(STEP)

    def complaints(self) -> Iterator[str]:
        """What processes wrote that looks like a bug of ours."""
        for path in sorted(self.folder.glob("*.err")):
            text = path.read_text(errors="replace")
            if "Traceback (most recent call last)" in text or "AssertionError" in text:
                yield f"{path.name}: {text.strip()[-1500:]}"


def _pipes_of(pid: int | None) -> set[str]:
    """The pipes that a process has open."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(fd))
    return {name for name in found if name.startswith("pipe:")}
