"""The exception of a task that was given up, made from what the broker or a worker said of it."""

from __future__ import annotations

from achilles.core import protocol as p
from achilles.errors import (
    ArgumentTooLargeError,
    ResultTooLargeError,
    TaskCrashedError,
    TaskMemoryError,
    TaskTimeoutError,
    WorkerLostError,
)

ARGUMENT_LIMIT = "the smaller of broker.argument_max and half of broker.memory"


def failure(message: p.Failed, task: str) -> BaseException:
    """The error of a task that the broker, or the submission, gives up;
    ``task`` is what errors call it.
    """
    story = "; ".join(f"attempt {n}: {line}" for n, line in enumerate(message.story, 1))
    if message.kind == p.CRASHED:
        return TaskCrashedError(
            f"{task} ended the process that ran it{_too_often(message)}; the executor goes on without it. {story}"
        )
    if message.kind == p.REFUSED:
        return RuntimeError(f"cannot schedule {task}: {'; '.join(message.story)}")
    if message.kind == p.OVERSIZED:
        return ArgumentTooLargeError(
            _too_large(f"the arguments of {task} hold", "".join(message.story[:1]), ARGUMENT_LIMIT)
        )
    if message.kind == p.TIMEOUT:
        return TaskTimeoutError(f"{task} took longer than it may. {story}")
    if message.kind == p.MEMORY:
        return TaskMemoryError(
            f"{task} needs more memory than its worker allows (worker.memory_limit). {story}"
        )
    return WorkerLostError(
        f"{task} was on a worker that vanished{_too_often(message)}; the executor goes on without it. {story}"
    )


def _too_often(message: p.Failed) -> str:
    return " too often" if len(message.story) > 1 else ""


def result_too_large(sizes: str, task: str) -> BaseException:
    """The error of a task whose result a worker did not send; ``sizes`` are its bytes and the
    limit, as the worker wrote them.
    """
    return ResultTooLargeError(
        _too_large(f"the result of {task} holds", sizes, "broker.result_max")
    )


def _too_large(what: str, sizes: str, setting: str) -> str:
    """Says which limit was passed; ``sizes`` are the bytes and the limit,
    as a worker or the submission wrote them.
    """
    size, _, limit = sizes.partition(" ")
    if not (size.isdigit() and limit.isdigit()):
        size, limit = "more", "fewer"
    return (
        f"{what} {size} bytes, and the broker takes {limit} at most: {setting} in its achilles.toml. "
        "Raise that, or pass the name of a file that both sides can read"
    )
