"""The exception tree, in one drawing.

    AchillesError
    ├── ProtocolError                 a peer sent what is not our protocol; its session is cut
    ├── ConfigError                   a setting that cannot be; names the setting and a value that works (exit 78)
    │   ├── InsecureBindError         a bind beyond loopback that would not be safe (exit 2)
    │   │   └── SelfAttackError       a broker's own ports did not refuse what they must; it did not start
    │   └── KeyFileError              a key or join file that is missing, loose or damaged
    ├── BrokerUnreachableError        nobody, or nobody of ours, answers at the endpoint (exit 69)
    │   ├── NotABrokerError           what listens there speaks something else
    │   ├── EncryptionMismatchError   one side is encrypted, and the other is not
    │   ├── SilentBrokerError         what listens there was reached, and said nothing, or nothing more
    │   └── AuthenticationError       one of the keys is not the right one
    │       ├── KeyRefusedError       the broker does not let our key in
    │       └── WrongBrokerError      what listens there does not hold the broker's key that we expect
    ├── ExecutorForkedError           an executor used in a child forked from its process
    ├── SealError                     a call or a result that was not sealed with the cluster's code key; a Future carries it
    └── in achilles.task_errors, the errors that a Future carries:
        ├── ArgumentPickleError       the function or an argument cannot be pickled        (PicklingError too)
        ├── ArgumentTooLargeError     a call's arguments hold more than the broker takes           (ValueError too)
        ├── ResultTooLargeError       a result holds more than the broker takes                    (ValueError too)
        ├── ResultPickleError         a returned value cannot be pickled                   (PicklingError too)
        ├── ResultUnpickleError       a returned value cannot be read by the client        (UnpicklingError too)
        ├── RemoteError               stands in for an exception that could not travel
        ├── BrokerLostError           the broker went away and did not come back           (BrokenProcessPool too)
        ├── TaskCrashedError          a task ended its runner as often as it was allowed to (BrokenProcessPool too)
        ├── WorkerLostError           a task was on too many workers that vanished         (BrokenProcessPool too)
        ├── TaskMemoryError           a task took more memory than its worker allows       (MemoryError too)
        ├── TaskTimeoutError          a task ran longer than its options allow             (TimeoutError too)
        ├── TerminatedError           the executor's tasks were ended by terminate_workers (BrokenProcessPool too)
        └── InitializerError          the executor's initializer raised on a runner        (BrokenProcessPool too)

Those of ``achilles.task_errors`` are reachable from here as well, loaded on first use: their
standard-library bases bring ``pickle`` and ``multiprocessing`` in, which the broker must not have
and a runner should not wait for. Anything else that escapes a public function and is not in its
``Raises:`` is a bug of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from achilles.task_errors import (
        ArgumentPickleError,
        ArgumentTooLargeError,
        BrokerLostError,
        InitializerError,
        RemoteError,
        ResultPickleError,
        ResultTooLargeError,
        ResultUnpickleError,
        TaskCrashedError,
        TaskMemoryError,
        TaskTimeoutError,
        TerminatedError,
        WorkerLostError,
    )

__all__ = [
    "AchillesError",
    "ArgumentPickleError",
    "ArgumentTooLargeError",
    "AuthenticationError",
    "BrokerLostError",
    "BrokerUnreachableError",
    "ConfigError",
    "EncryptionMismatchError",
    "ExecutorForkedError",
    "InitializerError",
    "InsecureBindError",
    "KeyFileError",
    "KeyRefusedError",
    "NotABrokerError",
    "ProtocolError",
    "RemoteError",
    "ResultPickleError",
    "ResultTooLargeError",
    "ResultUnpickleError",
    "SealError",
    "SelfAttackError",
    "SilentBrokerError",
    "TaskCrashedError",
    "TaskMemoryError",
    "TaskTimeoutError",
    "TerminatedError",
    "WorkerLostError",
    "WrongBrokerError",
]


class AchillesError(Exception):
    """Base of every exception that achilles itself raises."""


class ProtocolError(AchillesError):
    """A peer sent something that is not our protocol, or not at this moment."""


class ConfigError(AchillesError):
    """A setting that cannot be; the text names the setting,
    where it came from and a value that works.
    """


class InsecureBindError(ConfigError):
    """A bind that would be reachable from other machines without what makes that safe."""


class SelfAttackError(InsecureBindError):
    """A broker that attacked its own ports was let in, or could not find out;
    it has not told anybody where it is.
    """


class KeyFileError(ConfigError):
    """A key or join file that is missing, loosely protected, or damaged."""


class BrokerUnreachableError(AchillesError):
    """Nobody, or nobody who speaks our protocol, answers at the broker's endpoint."""


class AuthenticationError(BrokerUnreachableError):
    """The broker refused our key, or does not hold the key we expect of it."""


class KeyRefusedError(AuthenticationError):
    """The broker does not let our key in, or not where we used it."""


class WrongBrokerError(AuthenticationError):
    """What listens there does not hold the broker's key that we expect,
    or closes each connection at once.
    """


class NotABrokerError(BrokerUnreachableError):
    """What listens there speaks something else."""


class EncryptionMismatchError(BrokerUnreachableError):
    """What listens there speaks ZeroMQ, but one side is encrypted and the other is not."""


class SilentBrokerError(BrokerUnreachableError):
    """What listens there was reached and said nothing, or took our key and did not answer."""


class ExecutorForkedError(AchillesError, RuntimeError):
    """The executor was made in another process; make a new one after a fork."""


class SealError(AchillesError):
    """A call, or a result, was not sealed with the code key of this cluster;
    nothing of it was unpickled.
    """


def __getattr__(name: str) -> Any:
    if name in __all__:
        from achilles import task_errors

        return getattr(task_errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
