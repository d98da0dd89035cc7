"""How much memory a process has for itself."""

from __future__ import annotations

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """The process's resident bytes that are not shared with others (as large arguments are);
    0 if it is gone.
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, pages, shared, *_ = map(int, file.read().split())
        return max(0, pages - shared) * _PAGE
    except FileNotFoundError:
        pass  # no such process, or no /proc
    except (OSError, ValueError):
        return 0
    import psutil  # which takes long, and is not needed on Linux

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
