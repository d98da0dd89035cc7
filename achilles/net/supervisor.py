"""The broker's parent, which starts the process that serves anew when that dies.

Rules
    1. The parent has no socket, reads nothing that a peer sent, and keeps what the next process has
       to know: where the first one listened, and which workers there are.
    2. Whatever ends the serving process but its own wish, another one takes its place;
       `RESTARTS_MAX` times in `RESTARTS_SECONDS`, then the parent gives up. A process that never
       listened is not started again.
    3. Signals that ask for an end are passed on.
       The kernel ends the serving process when its parent is gone.

Why two processes: a peer with a key can make libzmq abort, and a bug of ours can; what clients and
workers have is enough for the next process to go on (``core.recovery``), if there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic, sleep
from typing import NoReturn, Protocol

from achilles.runtime.life import die_with

RESTARTS_MAX = 5
RESTARTS_SECONDS = 60.0
PAUSE_SECONDS = 0.2  # before all restarts in a row but the first
STOP_SECONDS = 10.0  # for the serving process to end when it was asked to
EX_SOFTWARE = 70
READ_MAX = 1 << 16


class Stop(Protocol):
    """Counts the signals that ask for an end; ``wake`` is called at each."""

    count: int
    last: int
    wake: Callable[[], None] | None


class Serving:
    """In the serving process: what it is told, and how it reports.

    ``port`` is where the one before listened (0: there was none), ``workers`` the numbers of those
    that it had (None: not known), ``pid`` is the parent's: the one that users know.
    """

    def __init__(self, pid: int, port: int, workers: frozenset[int] | None, notes: int) -> None:
        self.pid = pid
        self.port = port
        self.workers = workers
        self._notes = notes
        self._unsent = bytearray()

    @property
    def is_first(self) -> bool:
        """Whether no other process served before."""
        return not self.port

    def is_ready(self, port: int) -> None:
        """It listens."""
        self._tell({"port": port})

    def is_over(self) -> None:
        """It ends because it was asked to, whatever its exit code will be:
        what it said last may find no room.
        """
        self._tell({"over": True})

    def has_workers(self, new: set[int], gone: set[int]) -> None:
        """These workers are new, or may come back no more."""
        self._tell({"new": list(new), "gone": list(gone)})

    def _tell(self, note: dict[str, object]) -> None:
        self._unsent += json.dumps(note).encode() + b"\n"
        with contextlib.suppress(OSError):  # a parent that sleeps gets it with the next one
            while self._unsent:
                del self._unsent[: os.write(self._notes, self._unsent)]


class Supervisor:
    """In the parent: one serving process after the other. ``say`` prints a line for people."""

    def __init__(
        self, stop: Stop, say: Callable[[str], None], *, restarts_max: int = RESTARTS_MAX
    ) -> None:
        self._stop = stop
        self._say = say
        self._restarts_max = restarts_max
        self._restarts: deque[float] = deque()
        self._port = 0
        self._workers: set[int] | None = None
        self._pid = 0
        self._is_over = False

    def start(self) -> Serving:
        """Fork. Returns in each serving process; the parent exits from here,
        with the last one's exit code.

        Raises:
            SystemExit: in the parent.
        """
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)

        def wake() -> None:
            with contextlib.suppress(BlockingIOError):
                os.write(wake_write, b"!")

        self._stop.wake = wake
        while True:
            life_read, life_write = os.pipe()
            notes_read, notes_write = os.pipe()
            parent = os.getpid()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # a full disk
                    stream.flush()
            pid = os.fork()
            if not pid:
                self._stop.wake = None
                for end in (wake_read, wake_write, life_write, notes_read):
                    os.close(end)
                die_with(life_read, EX_SOFTWARE)
                os.set_blocking(notes_write, False)
                workers = None if self._workers is None else frozenset(self._workers)
                return Serving(parent, self._port, workers, notes_write)
            os.close(life_read)
            os.close(notes_write)
            status = self._watch(pid, notes_read, wake_read)
            os.close(notes_read)
            os.close(life_write)
            self._after(pid, status)

    def _watch(self, pid: int, notes: int, wake: int) -> int:
        """Read the process's notes until it has ended; how it did."""
        passed_on = 0
        kill_at: float | None = None
        buffer = bytearray()
        while True:
            if self._stop.count > passed_on:
                passed_on = self._stop.count
                kill_at = kill_at or monotonic() + STOP_SECONDS
                os.kill(pid, self._stop.last)
            timeout = None if kill_at is None else max(0.0, kill_at - monotonic())
            ready, _, _ = select.select([notes, wake], [], [], timeout)
            if wake in ready:
                os.read(wake, READ_MAX)
            if notes in ready:
                data = os.read(notes, READ_MAX)
                if not data:
                    break
                buffer += data
                *lines, rest = buffer.split(b"\n")
                buffer = bytearray(rest)
                self._take(lines)
            if kill_at is not None and monotonic() >= kill_at:
                os.kill(pid, signal.SIGKILL)
                break
        return os.waitpid(pid, 0)[1]

    def _take(self, lines: Iterable[bytes | bytearray]) -> None:
        for line in lines:
            note = json.loads(line)
            if "port" in note:
                self._port = note["port"]
            elif "over" in note:
                self._is_over = True
            else:
                self._workers = self._workers or set()
                self._workers.difference_update(note["gone"])
                self._workers.update(note["new"])

    def _after(self, pid: int, status: int) -> None:
        """Decide what follows from the end of the serving process.

        Raises:
            SystemExit: there shall be no other one.
        """
        code = os.waitstatus_to_exitcode(status)
        if code == 0 or self._is_over or self._stop.count or not self._port:
            _exit_like(code)
        how = f"was killed by {_name(-code)}" if code < 0 else f"exited with code {code}"
        now = monotonic()
        while self._restarts and now >= self._restarts[0] + RESTARTS_SECONDS:
            self._restarts.popleft()
        if len(self._restarts) >= self._restarts_max:
            self._say(
                f"achilles broker: the process that serves (pid {pid}) {how}, and {len(self._restarts)} before it within "
                f"{RESTARTS_SECONDS:g} s; giving up"
            )
            sys.exit(EX_SOFTWARE)
        self._say(
            f"achilles broker: the process that serves (pid {pid}) {how}; another one takes its place"
        )
        if self._restarts:
            sleep(PAUSE_SECONDS)
        self._restarts.append(now)


def _exit_like(code: int) -> NoReturn:
    """End as the serving process did."""
    sys.exit(code if code >= 0 else 128 - code)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
