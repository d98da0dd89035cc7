"""The frames of a message as libzmq takes them: all of them are made before the first is sent,
and large ones are not copied.

Rules
    1. Nothing here fails for want of descriptors, threads or memory: what cannot be shared with
       libzmq is copied, and what cannot even be copied is as good as lost,
       for the link to send again.
    2. A message is whole or not begun. libzmq would take the next one for the rest of one that
       ended halfway.

Who shares memory with libzmq has to hear when it is done with it. pyzmq has a thread for that, its
collector, with a context, hence two threads more and seven descriptors, and begins it when the
first frame is shared. When libzmq gets none of these for a new context, it ends the process. So
they are asked for here before: too many of them, which are given back at once. They are not had in
advance, because few processes need them. A client on the broker's host, whose large payloads pass
as references (`net.near`), does not before these cannot be had.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from time import monotonic

import zmq
from zmq.utils import garbage  # which pyzmq would import when there may be no descriptor for it

from achilles.core.protocol import Buffer

SHARED_MIN = int(zmq.COPY_THRESHOLD)  # bytes; to copy less takes less time (pyzmq's own measure)
# A context takes five of them, a socket one, and a monitored one that is connected four
DESCRIPTORS = 16
THREADS = 6  # a context takes two, and the collector one
RETRY_SECONDS = 1.0  # after there were too few

_LOG = logging.getLogger("achilles.net")

_retry_at = -math.inf


def prepared(frames: Sequence[Buffer]) -> list[zmq.Frame] | None:
    """The frames to be sent, those of `SHARED_MIN` bytes and more not copied:
    they must not change while they are under way.

    None: there is no memory for it.
    """
    try:
        return [_prepared(frame) for frame in frames]
    except (zmq.ZMQError, MemoryError) as error:
        _LOG.warning("a message is sent later, because there is no memory for it: %s", error)
        return None


def has_room() -> bool:
    """Whether this process may have some `DESCRIPTORS` and `THREADS` more."""
    return _has_descriptors() and _has_threads()


def _prepared(frame: Buffer) -> zmq.Frame:
    if memoryview(frame).nbytes >= SHARED_MIN and _can_share():
        try:
            return zmq.Frame(frame, copy=False)
        except (zmq.ZMQError, RuntimeError):
            pass  # somebody else has taken what there was, or the interpreter ends
    return zmq.Frame(frame, copy=True)


def _can_share() -> bool:
    """Whether the collector runs, or may begin."""
    global _retry_at
    if garbage.gc.is_alive():
        return True
    now = monotonic()
    if now < _retry_at:
        return False
    if has_room():
        return True
    _retry_at = now + RETRY_SECONDS
    _LOG.info("large messages are copied, as long as there are too few descriptors or threads")
    return False


def _has_descriptors() -> bool:
    held: list[int] = []
    try:
        while len(held) < DESCRIPTORS:
            held += os.pipe()
    except OSError:
        return False
    finally:
        for fd in held:
            os.close(fd)
    return True


def _has_threads() -> bool:
    enough = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(THREADS):
            thread = threading.Thread(target=enough.wait, name="achilles-room", daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError):
        return False
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    return True
