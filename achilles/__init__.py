"""A drop-in `concurrent.futures.Executor` that runs on this machine or on a cluster,
and survives its machines.

    from achilles import DistributedExecutor

Everything here is loaded on first use: the runners, which import this package too, must start fast.
"""

from __future__ import annotations

import sys

if not getattr(sys, "_is_gil_enabled", lambda: True)():  # Python 3.13 on
    raise ImportError(
        "achilles needs the GIL, which is off in this Python: start it with PYTHON_GIL=1, or use the ordinary build"
    )

TYPE_CHECKING = False  # as type checkers know it; importing typing takes half of a runner's start
if TYPE_CHECKING:
    from typing import Any

    from achilles import errors
    from achilles.compat import imap as imap
    from achilles.compat import imap_unordered as imap_unordered
    from achilles.compat import map as map
    from achilles.executor import DistributedExecutor
    from achilles.futures import as_completed
    from achilles.pool import Pool
    from achilles.register import register_joblib
    from achilles.runtime.context import current_attempt

__version__ = "0.1.0"

__all__ = [
    "DistributedExecutor",
    "Pool",
    "__version__",
    "as_completed",
    "current_attempt",
    "errors",
    "register_joblib",
]

_HOMES = {
    "DistributedExecutor": "achilles.executor",
    "Pool": "achilles.pool",
    "as_completed": "achilles.futures",
    "current_attempt": "achilles.runtime.context",
    "register_joblib": "achilles.register",
    # Not in __all__, so that `from achilles import *` leaves the built-in `map` alone.
    "imap": "achilles.compat",
    "imap_unordered": "achilles.compat",
    "map": "achilles.compat",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "errors":
        return importlib.import_module("achilles.errors")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES})
