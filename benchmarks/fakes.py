"""The two ends of a task with nothing in between: who submits it, and who answers it at once.

They speak the real messages, above sessions that are simulated (`benchmarks.crowd`) or those of
real sockets (`benchmarks.fleet`). A task is its number, followed by bytes that both ends know; its
result is the number's bitwise complement, so that nobody can mistake one for the other.
"""

from __future__ import annotations

import os
import random
import secrets
from typing import NamedTuple

import achilles
from achilles.core import protocol as p
from achilles.net.worker import python_version

MIB = 1 << 20
_MASK = (1 << 64) - 1
_FUNCTION = b"a function"
_BLOCK = random.Random(0).randbytes(p.PART_MAX)


class WrongResult(Exception):
    """A task has another result than its own, or a second one, or none."""


class Load(NamedTuple):
    """Tasks of one function, by which the worker knows them.

    ``seconds``: what it claims that each took; ``chunk_max``: at most so many travel together (0:
    the broker decides); ``size``: the bytes of each.
    """

    fn: int
    seconds: float
    chunk_max: int = 0
    size: int = 8


ALONE = Load(1, 0.055)  # long enough to travel alone
TENS = Load(2, 1e-6, 10)
SHORT = Load(3, 2e-6)  # as long as a no-op takes
_CLAIMS = {load.fn: load.seconds for load in (ALONE, TENS, SHORT)}


def of_size(size: int) -> Load:
    """Tasks of so many bytes, which travel alone."""
    return ALONE._replace(size=size)


def hello(role: str, name: str, slots: int = 1) -> p.ClientHello | p.WorkerHello:
    """An honest peer's."""
    said = secrets.token_bytes(16), achilles.__version__, python_version()
    if role == "worker":
        return p.WorkerHello(said[0], said[1], said[2], name, slots, os.getpid())
    return p.ClientHello(said[0], role, said[1], said[2], name)


def call(number: int, size: int = 8) -> p.Payload:
    """Task ``number``, of ``size`` bytes."""
    head = number.to_bytes(8, "little")
    if size == 8:
        return head
    parts: list[p.Buffer] = [head]
    rest = size - 8
    while rest > 0:
        parts.append(memoryview(_BLOCK)[:rest])
        rest -= len(_BLOCK)
    return p.Parts(parts)


def result_of(number: int) -> bytes:
    """What comes of task ``number``."""
    return (_MASK - number).to_bytes(8, "little")


def answer_to(payload: p.Payload) -> bytes:
    """The result of a task, whose bytes are looked at, all of them.

    Raises:
        WrongResult: they are not those that were sent.
    """
    if type(payload) is bytes:
        return (_MASK - int.from_bytes(payload[:8], "little")).to_bytes(8, "little")
    assert isinstance(payload, p.Parts)
    head, *parts = payload
    for part in parts:
        if bytes(part) != _BLOCK[: len(part)]:
            raise WrongResult(f"{len(part)} bytes have changed on their way")
    return answer_to(bytes(head))


class Asker:
    """A client: it submits tasks, and checks their results.
    ``open`` has the results that are to come.
    """

    def __init__(self) -> None:
        self._next = 1
        self._functions: set[int] = set()
        self.open: dict[int, bytes] = {}
        self.done = 0
        self.credit = 0  # bytes that it may have at the broker; 0: any number

    def ask(self, load: Load, count: int) -> list[p.Wire]:
        """A message with so many new tasks, and their function before the first."""
        first, self._next = self._next, self._next + count
        ids = list(range(first, self._next))
        payloads = [call(id, load.size) for id in ids]
        self.open.update((id, result_of(id)) for id in ids)
        submit = p.Submit(load.fn, 0, ids, payloads, load.chunk_max)
        if load.fn in self._functions:
            return [submit]
        self._functions.add(load.fn)
        return [p.Blob(0, load.fn, _FUNCTION), submit]

    def has_room(self, load: Load) -> bool:
        """Whether the broker takes one more task beside open ones of the same load;
        one may always go alone.
        """
        held = (len(self.open) + 1) * load.size + (len(self._functions) + 1) * len(_FUNCTION)
        return not self.open or not self.credit or held <= self.credit

    def answer(self, message: p.Wire) -> list[p.Wire]:
        """Take in what the broker says; nothing is answered.

        Raises:
            WrongResult: a result is not its task's, or came twice.
        """
        match message:
            case p.Results(ids=ids, statuses=statuses, payloads=payloads):
                for id, payload in zip(ids, payloads, strict=True):
                    if self.open.pop(id, None) != payload:
                        raise WrongResult(f"task {id} has the result {payload!r}")
                if any(statuses):
                    raise WrongResult("a task has failed")
                self.done += len(ids)
            case p.Welcome(credit_bytes=credit) | p.Credit(bytes_max=credit):
                self.credit = credit
            case p.Failed() | p.Gone() | p.Refused() | p.Goodbye():
                raise WrongResult(f"the broker says {message}")
            case _:
                pass
        return []


class Answerer:
    """A worker that has done its tasks when it hears of them,
    and claims that they took as long as their load says.
    """

    def __init__(self) -> None:
        self.done = 0

    def answer(self, message: p.Wire) -> list[p.Wire]:
        """Take in what the broker says, and answer.

        Raises:
            WrongResult: a task's bytes have changed, or the session has ended,
                so that work may be lost.
        """
        match message:
            case p.Run(lease=lease, fn=fn, payloads=payloads):
                count = len(payloads)
                self.done += count
                results: list[p.Payload] = [answer_to(payload) for payload in payloads]
                seconds = _CLAIMS[fn] * count
                return [p.Done(lease, list(range(count)), bytes(count), results, seconds)]
            case p.Gone() | p.Refused() | p.Goodbye():
                raise WrongResult(f"the broker says {message}")
            case _:
                return []
