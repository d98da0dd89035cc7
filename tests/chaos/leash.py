"""`python -m tests.chaos.leash COMMAND...`:
become a command that is killed when whoever started it dies, on Linux.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit(1)  # it has died already
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
