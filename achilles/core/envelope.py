"""Messages as letters on a runner's side channel: what a task says as a client,
and what it is told.

A letter's body is ``<B seq> <I n> n times <I size>`` and the n frames of the codec. ``seq`` names
the chunk whose task wrote it (0 on the way to the runner):
results and letters do not overtake each other by that.
"""

from __future__ import annotations

import struct

from achilles.core import protocol as p
from achilles.errors import ProtocolError

NESTED = 1  # the kind of such letters; ``runtime.side`` has the same

_HEAD = struct.Struct("<BI")
_NOBODY = p.Header(p.NO_TOKEN, 0, 0)


def pack(seq: int, message: p.FromTask | p.ToTask) -> bytes:
    """The body of a letter."""
    frames = p.encode(_NOBODY, message)
    sizes = [memoryview(frame).nbytes for frame in frames]
    head = _HEAD.pack(seq, len(frames)) + struct.pack(f"<{len(frames)}I", *sizes)
    return b"".join((head, *frames))


def unpack(body: bytes) -> tuple[int, p.Wire]:
    """The seq and the message of a letter.

    Raises:
        ProtocolError: it is none of ours.
    """
    try:
        seq, count = _HEAD.unpack_from(body)
        if not 0 < count <= len(body) // 4:
            raise ProtocolError(f"a letter of {count} frames")
        sizes = struct.unpack_from(f"<{count}I", body, _HEAD.size)
    except struct.error:
        raise ProtocolError(f"a letter of {len(body)} bytes is shorter than its head") from None
    at = _HEAD.size + 4 * count
    if at + sum(sizes) != len(body):
        raise ProtocolError("a letter that is not as long as it says")
    view = memoryview(body)
    frames = []
    for size in sizes:
        frames.append(view[at : at + size])
        at += size
    return seq, p.decode(frames)[1]
