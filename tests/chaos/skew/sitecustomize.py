"""On the path of a process whose wall clock shall jump:
`time.time` and its kin then add what the file ``$CHAOS_CLOCK`` holds.

What is in C and asks the kernel itself is not moved. Nothing here touches monotonic clocks:
they never jump.
"""

from __future__ import annotations

import os
import struct
import time

_path = os.environ.get("CHAOS_CLOCK")

if _path:
    _fd = os.open(_path, os.O_RDONLY)
    _time, _localtime, _gmtime = time.time, time.localtime, time.gmtime

    def _jumped() -> float:
        """Seconds by which the clock is wrong now."""
        data = os.pread(_fd, 8, 0)
        return float(struct.unpack("d", data)[0]) if len(data) == 8 else 0.0

    def _wrong_time() -> float:
        return _time() + _jumped()

    def _wrong_localtime(seconds: float | None = None, /) -> time.struct_time:
        return _localtime(_wrong_time() if seconds is None else seconds)

    def _wrong_gmtime(seconds: float | None = None, /) -> time.struct_time:
        return _gmtime(_wrong_time() if seconds is None else seconds)

    time.time = _wrong_time
    time.time_ns = lambda: int(_wrong_time() * 1e9)
    time.localtime = _wrong_localtime  # type: ignore[assignment]
    time.gmtime = _wrong_gmtime  # type: ignore[assignment]
