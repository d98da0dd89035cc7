"""How a process ends with the one that started it:
at the end of a pipe whose other end that one holds, and nobody else.

A runner imports this module, so it imports next to nothing.
"""

from __future__ import annotations

import fcntl
import os

KILL = 9  # SIGKILL; the module that names it takes long to import


def life_pipe() -> tuple[int, int]:
    """A pipe that tells runners of their host's end; as small as can be,
    for a user's pipe memory is limited.
    """
    read_end, write_end = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, 4096)
    return read_end, write_end


def die_with(life: int, code: int) -> None:
    """Have this process end when the pipe ``life`` does, and not sooner,
    even while its threads hold the GIL.

    It exits with ``code`` where that was so already, or where the kernel cannot kill it.
    """
    if hasattr(fcntl, "F_SETSIG"):
        try:
            # An open file of our own, because each has one owner and all runners share the host's.
            life = os.open(f"/proc/self/fd/{life}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            pass  # no /proc
        else:
            fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(life, fcntl.F_SETSIG, KILL)
            fcntl.fcntl(life, fcntl.F_SETFL, os.O_NONBLOCK | fcntl.FASYNC)
            try:
                os.read(life, 1)
            except BlockingIOError:
                return  # the pipe is open, and from here on the signal is armed
            os._exit(code)
    from _thread import start_new_thread

    def watch() -> None:
        os.read(life, 1)
        os._exit(code)

    start_new_thread(watch, ())
