"""The command ``achilles`` in processes of its own, as a shell starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

import psutil

ACHILLES = (sys.executable, "-m", "achilles")
WAIT_SECONDS = 20.0


def run(*arguments: str, text: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``text`` is its standard input."""
    return subprocess.run(
        [*ACHILLES, *arguments],
        env={**os.environ, **environ},
        input=text,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


class Command:
    """A command that runs until it is told to end; a context manager that ends it.

    Its error output is read to the line in which it says that it is ready, and from there on by a
    thread, so that a command that says much is not held up.
    """

    def __init__(self, command: Sequence[str], *, ready: str, environ: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        stderr = self.process.stderr
        assert stderr is not None
        while ready not in self.said:
            line = stderr.readline()
            self.said += line
            if not line:
                self.process.wait(WAIT_SECONDS)
                raise AssertionError(f"it ended ({self.process.returncode}): {self.said}")
        self._rest: list[str] = []
        self._reader = threading.Thread(target=lambda: self._rest.append(stderr.read()))
        self._reader.start()

    def serving(self) -> psutil.Process:
        """Of a broker: the process that serves, whose parent `process` is."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        assert self.process.stdout is not None
        code = self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        self.said += "".join(self._rest)
        self._rest.clear()
        if not self.process.stdout.closed:
            self.output = self.process.stdout.read()
        self._close()
        return code

    def _close(self) -> None:
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def broker(*arguments: str, **environ: str) -> Command:
    """``achilles broker`` on any free port."""
    flags = () if "--bind" in arguments else ("--bind", "tcp://127.0.0.1:0")
    command = (*ACHILLES, "broker", *flags, *arguments)
    return Command(command, ready="look, and stop", environ=environ)


def worker(*arguments: str, **environ: str) -> Command:
    """``achilles worker`` with one slot."""
    command = (*ACHILLES, "worker", "--slots", "1", *arguments)
    return Command(command, ready="stop it:", environ=environ)
