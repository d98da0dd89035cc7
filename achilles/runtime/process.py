"""A runner's process as its host has it: how it starts, the host's ends of its channel,
and how it ended.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import resource
import select
import signal
import socket
import subprocess
import sys

import achilles
from achilles.runtime.output import OutputPipe
from achilles.runtime.runner import CHANNEL_LOST
from achilles.runtime.shared import Handoff
from achilles.runtime.side import HostSide

READ_MAX = 1 << 18

_line_of = operator.attrgetter("line")

# The directory of achilles comes last, so that nothing beside it hides the standard library; nor
# may the current directory, while our own modules are imported.
_BOOTSTRAP = (
    "import sys;fds,d=map(int,sys.argv[1].split(',')),sys.argv[2];del sys.argv[1:];p=sys.path;"
    "e='' in p;e and p.remove('');d in p or p.append(d);from achilles.runtime.runner import main as m;"
    "e and p.insert(0,'');m(*fds)"
)


class RunnerProcess:
    """One child and the host's ends of its channel, all of them non-blocking.

    ``captures``: what it prints comes through ``outputs``; else it goes where ours does.

    Raises:
        OSError: there are not enough processes, descriptors or memory.
    """

    def __init__(
        self, life: int, environ: dict[str, str] | None, *, captures: bool = False
    ) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self.sock, sock = _sockets(ours, theirs)
            handoff, far_handoff = _sockets(ours, theirs)
            self.handoff = Handoff(handoff)
            self.tokens = TokenPipe(ours, theirs)
            self.stream, far_stream = _pipe(ours, theirs)
            os.set_blocking(self.stream, False)
            side, far_side = _sockets(ours, theirs)
            self.side = HostSide(side.fileno())
            fds = (
                *(sock.fileno(), self.tokens.read_end, far_stream),
                *(far_handoff.fileno(), far_side.fileno(), life),
            )
            self.outputs: list[OutputPipe] = []
            self.printing = select.poll()
            ends: list[int | None] = [None, None]
            for stream in (1, 2) if captures else ():
                read_end, ends[stream - 1] = _pipe(ours, theirs)
                os.set_blocking(read_end, False)
                self.outputs.append(OutputPipe(read_end, stream))
                self.printing.register(read_end, select.POLLIN)
            self._process = _popen(fds, environ, *ends)
            self._is_reaped = False
            self.pid = self._process.pid
            self.pidfd = _pidfd(self.pid, ours)
            self._ours = ours.pop_all()

    def __repr__(self) -> str:
        return f"<RunnerProcess {self.pid}>"

    def has_printed(self) -> bool:
        """Whether there is output to be read, or the beginning of a line that was read before;
        it is asked for each result.
        """
        return bool(self.printing.poll(0)) or any(map(_line_of, self.outputs))

    def has_exited(self) -> bool:
        """Whether it has; it is not reaped by asking."""
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, options) is not None
        except ChildProcessError:
            self._is_reaped = True
            return True

    def signal_group(self) -> None:
        """SIGKILL to it and to all that it started; to be called before it is reaped."""
        if self._is_reaped:
            return  # the number may be somebody else's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """Wait for it; the exit code, or minus the signal;
        None if the program has reaped it behind our back.
        """
        code = self._process.wait()
        return None if self._is_reaped else code

    def close(self) -> None:
        """Close our ends."""
        self._ours.close()

    def disown(self) -> None:
        """In a fork of the host: close our ends, of what is no child here."""
        self._process.returncode = 0
        self._ours.close()


class TokenPipe:
    """One byte a task, from the host to the runner;
    the host can take back what the runner has not read.
    """

    def __init__(self, ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> None:
        self._back: socket.socket | int
        try:
            self.read_end, self._write_end = os.pipe()
            theirs.callback(os.close, self.read_end)
            ours.callback(self.end)
            # An open file of its own, because the runner's has to block and ours must not.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            self._back = os.open(f"/proc/self/fd/{self.read_end}", flags)
            ours.callback(os.close, self._back)
        except FileNotFoundError:  # no /proc; sockets do the same, but cost a task 0.3 µs more
            self.end()
            near, far = socket.socketpair()
            self.read_end, self._write_end = far.detach(), near.detach()
            theirs.callback(os.close, self.read_end)
            self._back = socket.socket(fileno=os.dup(self.read_end))
            ours.callback(self._back.close)
        os.set_blocking(self._write_end, False)

    def write(self, tokens: bytes) -> int:
        """How many of them fit.

        Raises:
            OSError: none; it is a BlockingIOError unless `end` was called.
        """
        return os.write(self._write_end, tokens)

    def take(self) -> bytes:
        """Everything that the runner has not read."""
        taken = b""
        with contextlib.suppress(BlockingIOError):
            while tokens := self._read_back():
                taken += tokens
        return taken

    def _read_back(self) -> bytes:
        if isinstance(self._back, int):
            return os.read(self._back, READ_MAX)
        return self._back.recv(READ_MAX, socket.MSG_DONTWAIT)

    def end(self) -> None:
        """Let the runner see an end behind what it has."""
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1


def describe_exit(code: int | None) -> str:
    """How a process ended, for people: ``was killed by SIGSEGV``."""
    if code is None:
        return "ended (how is not known: another part of the program waited for it)"
    if code == CHANNEL_LOST:
        return f"exited with code {code} (did the task close the worker's pipe?)"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often the kernel's out-of-memory killer)" if code == -signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def which_limit(error: OSError) -> str:
    """Which limit kept a process from starting, as far as the error tells, and what helps."""
    helps = "raise it, or have fewer slots"
    if error.errno == errno.EAGAIN:
        return f" (the limit of processes, ulimit -u: {_limit(resource.RLIMIT_NPROC)}; {helps})"
    if error.errno == errno.EMFILE:
        return f" (the limit of open files, ulimit -n: {_limit(resource.RLIMIT_NOFILE)}; {helps})"
    if error.errno in (errno.ENFILE, errno.ENOMEM):
        return " (this machine has no more of them; have fewer slots)"
    return ""


def _limit(number: int) -> str:
    soft, _ = resource.getrlimit(number)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _sockets(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """A socket pair, ours non-blocking."""
    near, far = socket.socketpair()
    ours.callback(near.close)
    theirs.callback(far.close)
    near.setblocking(False)
    return near, far


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends belong to these two."""
    read_end, write_end = os.pipe()
    reader.callback(os.close, read_end)
    writer.callback(os.close, write_end)
    return read_end, write_end


def _pidfd(pid: int, ours: contextlib.ExitStack) -> int:
    """A descriptor that is readable when the process has exited; -1 where there is none."""
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1
    ours.callback(os.close, pidfd)
    return pidfd


def _popen(
    fds: tuple[int, ...], environ: dict[str, str] | None, stdout: int | None, stderr: int | None
) -> subprocess.Popen[bytes]:
    home = os.path.dirname(os.path.dirname(os.path.abspath(achilles.__file__)))
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    numbers = ",".join(map(str, fds))
    return subprocess.Popen(
        [sys.executable, *flags, "-c", _BOOTSTRAP, numbers, home],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environ,
        pass_fds=fds,
        start_new_session=True,
    )
