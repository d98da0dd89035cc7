"""What a task may ask about itself. The runner sets it; this module imports nothing that takes
time, for runners start with it.
"""

from __future__ import annotations

from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from achilles.runtime.seal import Seal
    from achilles.runtime.side import RunnerSide

attempt = 0
# The host's number for the client whose task runs; 0: this is no runner, or it has not run any
client = 0
seq = 0  # of the chunk that runs
pickle = ""  # the client and number of the function that is being unpickled, where it has a number
root = b""  # the name of the session that the task is done for in the end, where calls are sealed
seal: Seal | None = None  # what a runner of a worker seals with; None elsewhere
far: set[int] = set()  # threads that are in a `Pickling` for other machines
# What this runner is of: an embedded executor (a random number), or a broker (its public key)
cluster = ""
credit = 0  # tasks that a client of that broker may have unresolved; 0: no limit
is_embedded = False  # the runner belongs to an embedded executor, not to a worker
side: RunnerSide | None = None  # a runner's side channel; None elsewhere


class Pickling:
    """A context: what this thread pickles in it is for other machines, if ``is_far``."""

    def __init__(self, is_far: bool) -> None:
        self._is_far = is_far

    def __enter__(self) -> None:
        if self._is_far:
            far.add(get_ident())

    def __exit__(self, *exc: object) -> None:
        if self._is_far:
            far.discard(get_ident())


def current_attempt() -> int:
    """Which attempt at the running task this is, from 1; 0 outside of tasks.

    Above 1, what the task does may have been done before, in part or whole: by an attempt that
    raised, took too long, or was on a runner or worker that was lost.
    """
    return attempt
