"""One question to a broker and its answer, for commands."""

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
from achilles.net.peer import Dial, Peer
from achilles.net.transport import SocketLoop
from achilles.net.worker import python_version

Question: TypeAlias = p.StatusRequest | p.ReloadKeys | p.DrainWorker | p.Shutdown
Answer: TypeAlias = p.Status | p.KeysReloaded | p.WorkerDrains | p.ShuttingDown
_ANSWERS = (p.Status, p.KeysReloaded, p.WorkerDrains, p.ShuttingDown)


def request(dial: Dial, question: Question, *, timeout: float) -> Answer:
    """The broker's answer to ``question``, asked in the role of an administrator.

    Raises:
        BrokerUnreachableError: there is none within ``timeout`` seconds.
    """
    loop = SocketLoop()
    hello = p.ClientHello(
        secrets.token_bytes(16),
        "admin",
        achilles.__version__,
        python_version(),
        f"{socket.gethostname()}-{os.getpid()}",
    )
    received: deque[p.Wire] = deque()
    peer = Peer(dial, loop, hello, lambda message, _: received.append(message))
    deadline = monotonic() + timeout
    try:
        while (now := monotonic()) < deadline:
            loop.wait(max(0.0, min(deadline, peer.tick(now)) - now))
            while received:
                message = received.popleft()
                if isinstance(message, p.Welcome):
                    peer.send([question])
                elif isinstance(message, _ANSWERS):
                    peer.send([p.Goodbye("done")])
                    peer.flush(0.1)
                    return message
                elif isinstance(message, p.Refused | p.Goodbye):
                    raise BrokerUnreachableError(f"the broker refused this: {message.reason}")
        if peer.is_joined:
            raise BrokerUnreachableError(f"the broker did not answer within {timeout:g} s")
        raise peer.problem()
    finally:
        peer.close()
        loop.close()
