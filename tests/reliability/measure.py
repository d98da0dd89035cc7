"""What the measurements share: tasks on a rig from this process, lines of their executions,
and the figure at the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from achilles import DistributedExecutor
from tests.chaos.history import Execution, by_number, executions
from tests.chaos.rig import Rig

WAIT_SECONDS = 120.0
LOOK_SECONDS = 0.002

SHIPPED: dict[str, str] = {}  # timings: the defaults


@contextlib.contextmanager
def rig(
    workers: int, slots: int, timings: dict[str, str] | None = None, **options: Any
) -> Iterator[Rig]:
    """A rig whose folder goes with it; ``timings``: None for the quick ones."""
    with (
        tempfile.TemporaryDirectory(prefix="ach-rel-") as folder,
        Rig(Path(folder) / "rig", workers=workers, slots=slots, timings=timings, **options) as made,
    ):
        yield made


@contextlib.contextmanager
def executor(made: Rig) -> Iterator[DistributedExecutor]:
    """An executor of this process on the rig, not through a proxy."""
    for name in [name for name in os.environ if name.startswith("ACHILLES_")]:
        del os.environ[name]
    os.environ.update(ACHILLES_HOME=str(made.home), ACHILLES_CLIENT_OUTPUT="drop")
    with DistributedExecutor(address="auto") as one:
        yield one


def runs_of(made: Rig) -> dict[int, list[Execution]]:
    """What tasks have left so far, by number."""
    return by_number(executions(made.log))


def await_runs(made: Rig, holds: Callable[[dict[int, list[Execution]]], Any], what: str) -> Any:
    """Wait until the executions are as wanted; what ``holds`` gave then.

    Raises:
        TimeoutError: they are not.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := holds(runs_of(made))):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_SECONDS:g} s: {what}")
        time.sleep(LOOK_SECONDS)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def finish(text: str, failures: Sequence[str]) -> int:
    """Print the figure, which `tests.reliability` reads, and what does not hold; the exit code."""
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"figure: {text}", flush=True)
    return 1 if failures else 0
