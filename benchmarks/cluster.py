"""A broker and workers as processes of this machine, with an ``ACHILLES_HOME`` of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

START_SECONDS = 20.0


class Cluster:
    """``workers`` workers of ``slots`` slots each; a context manager that leaves nothing behind.

    ``tcp``: meet over TCP with CURVE instead of ipc. ``environ``: variables beyond this process's
    own. ``awaits_workers``: it is entered when they are there, not before. What its processes log
    is printed if the ``with`` statement ends with an error.
    """

    def __init__(
        self,
        workers: int = 1,
        slots: int = 2,
        *,
        tcp: bool = False,
        environ: Mapping[str, str] | None = None,
        awaits_workers: bool = True,
    ) -> None:
        self.home = tempfile.mkdtemp(prefix="achilles-")
        self._log_path = Path(self.home, "log")
        self.environ = {**os.environ, **(environ or {}), "ACHILLES_HOME": self.home}
        for name in ("ACHILLES_ADDRESS", "ACHILLES_CONFIG"):
            self.environ.pop(name, None)
        self.broker: subprocess.Popen[str] | None = None
        self.workers: list[subprocess.Popen[str]] = []
        self.worker_command: tuple[str, ...] = ("-m", "achilles")
        self._counts = (workers, slots)
        self._tcp = tcp
        self._awaits_workers = awaits_workers
        self.address = ""

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _start(self) -> None:
        workers, slots = self._counts
        command = ["broker", "--bind", "tcp://127.0.0.1:0", "--print-address"]
        if self._tcp:
            command.append("--no-ipc")
        self.broker = self._spawn(*command, stdout=subprocess.PIPE)
        assert self.broker.stdout is not None
        self.address = self.broker.stdout.readline().strip()
        for _ in range(workers):
            self.add_worker(slots)
        if self._awaits_workers:
            self.wait_until(lambda status: status["workers"] == workers)

    def add_worker(self, slots: int, *options: str) -> subprocess.Popen[str]:
        """Start one more worker; ``options`` are its command's."""
        worker = self._spawn("worker", self.address, "--slots", str(slots), *options)
        self.workers.append(worker)
        return worker

    def status(self) -> dict[str, Any]:
        """What ``achilles status`` says."""
        done = subprocess.run(
            [sys.executable, "-m", "achilles", "status", "-o", "json"],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"achilles status exited with {done.returncode}: {done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def wait_until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Wait for the status to be as wanted.

        Raises:
            TimeoutError: it is not, for too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while not holds(status := self.status()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster is not as wanted: {status}")
            time.sleep(0.05)

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            print(self._log_path.read_text(), file=sys.stderr)
        processes = [*self.workers, *([self.broker] if self.broker else [])]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def _spawn(self, *arguments: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        command = self.worker_command if arguments[0] == "worker" else ("-m", "achilles")
        with self._log_path.open("a") as log:
            return subprocess.Popen(
                [sys.executable, *command, "--log-level", "info", *arguments],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                text=True,
            )
