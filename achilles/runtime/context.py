"""What a task may ask about itself. The runner sets it; this module imports nothing, for runners start with it."""

from __future__ import annotations

attempt = 0


def current_attempt() -> int:
    """Which attempt at the running task this is, from 1; 0 outside of tasks.

    Above 1, what the task does may have been done before, in part or whole: by an attempt that raised, took too
    long, or was on a runner or worker that was lost.
    """
    return attempt
