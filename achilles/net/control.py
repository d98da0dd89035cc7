"""What commands ask a broker, and its answers."""

from __future__ import annotations

import os
import secrets
import socket
from collections import deque
from time import monotonic
from typing import TypeAlias

import achilles
from achilles.core import protocol as p
from achilles.errors import BrokerUnreachableError
from achilles.net.loop import SocketLoop
from achilles.net.peer import Dial, Peer
from achilles.net.worker import python_version

Question: TypeAlias = p.StatusRequest | p.ReloadKeys | p.DrainWorker | p.Shutdown
Answer: TypeAlias = p.Status | p.KeysReloaded | p.WorkerDrains | p.ShuttingDown
_ANSWERS = (p.Status, p.KeysReloaded, p.WorkerDrains, p.ShuttingDown)


class Asking:
    """A session in the role of an administrator; a context manager that ends it."""

    def __init__(self, dial: Dial) -> None:
        hello = p.ClientHello(
            secrets.token_bytes(16),
            "admin",
            achilles.__version__,
            python_version(),
            f"{socket.gethostname()}-{os.getpid()}",
        )
        self._loop = SocketLoop()
        self._received: deque[p.Wire] = deque()
        self._peer = Peer(
            dial, self._loop, hello, lambda message, _: self._received.append(message)
        )

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._peer.is_joined:
            self._peer.send([p.Goodbye("done")])
            self._peer.flush(0.1)
        self._peer.close()
        self._loop.close()

    def ask(self, question: Question, timeout: float) -> Answer:
        """The broker's answer to the first question.

        Raises:
            BrokerUnreachableError: there is none within ``timeout`` seconds.
        """
        deadline = monotonic() + timeout
        while (now := monotonic()) < deadline:
            self._step(now, deadline)
            while self._received:
                message = self._received.popleft()
                if isinstance(message, p.Welcome):
                    self._peer.send([question])
                elif isinstance(message, _ANSWERS):
                    return message
                elif isinstance(message, p.Refused | p.Goodbye):
                    raise BrokerUnreachableError(f"the broker refused this: {message.reason}")
        if self._peer.is_joined:
            raise BrokerUnreachableError(f"the broker did not answer within {timeout:g} s")
        raise self._peer.problem()

    def sees_the_end(self, timeout: float) -> bool:
        """Whether the broker closes the connection within ``timeout`` seconds,
        as one that ends does last.
        """
        self._peer.send([p.Goodbye("done")])  # it waits for those who have a session
        deadline = monotonic() + timeout
        while not self._peer.was_cut_off and (now := monotonic()) < deadline:
            self._step(now, deadline)
        return self._peer.was_cut_off

    def _step(self, now: float, deadline: float) -> None:
        self._loop.wait(max(0.0, min(deadline, self._peer.tick(now)) - now))


def request(dial: Dial, question: Question, *, timeout: float) -> Answer:
    """The broker's answer to ``question``, asked in the role of an administrator.

    Raises:
        BrokerUnreachableError: there is none within ``timeout`` seconds.
    """
    with Asking(dial) as asking:
        return asking.ask(question, timeout)
