"""The errors that a Future carries; see the drawing in ``achilles.errors``.

They subclass what existing code catches (``PicklingError``, ``BrokenProcessPool``), but none of
them breaks the executor: it stays usable after each.
"""

from __future__ import annotations

from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pickle import PicklingError, UnpicklingError

from achilles.errors import AchillesError


class ArgumentPickleError(AchillesError, PicklingError):
    """The function or an argument of a task cannot be pickled; nothing was sent."""


class ArgumentTooLargeError(AchillesError, ValueError):
    """A call's arguments hold more bytes than the broker takes of one task; nothing was sent."""


class ResultTooLargeError(AchillesError, ValueError):
    """A task's result holds more bytes than the broker takes of one; it stayed on the worker."""


class ResultPickleError(AchillesError, PicklingError):
    """The value that a task returned cannot be pickled on the runner."""


class ResultUnpickleError(AchillesError, UnpicklingError):
    """The value that a task returned cannot be unpickled in the client;
    the original error is its cause.
    """


class RemoteError(AchillesError):
    """Stands in for a task's exception that could not be pickled;
    its text names type and message.
    """


class BrokerLostError(AchillesError, BrokenProcessPool):
    """The broker went away and did not come back in time."""


class TaskCrashedError(AchillesError, BrokenProcessPool):
    """A task ended the process that ran it, as often as it was allowed to."""


class WorkerLostError(AchillesError, BrokenProcessPool):
    """A task had started on too many workers that vanished."""


class TaskTimeoutError(AchillesError, TimeoutError):
    """A task ran for longer than ``with_options(timeout=...)`` allows; its runner was killed.

    The timeout error of `concurrent.futures`, which is not the built-in one on Python 3.10.
    """


class TaskMemoryError(AchillesError, MemoryError):
    """A task's runner grew beyond ``worker.memory_limit`` and was killed;
    it is retried only as `with_options` says.
    """


class TerminatedError(AchillesError, BrokenProcessPool):
    """The executor's tasks were ended by `terminate_workers` or `kill_workers` before this one was
    done.
    """


class InitializerError(AchillesError, BrokenProcessPool):
    """The executor's initializer raised on a runner; the executor is broken,
    as the standard's is.
    """
