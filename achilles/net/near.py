"""Large payloads between processes of one user on one host:
what travels is where the memory is, not what is in it.

A message for such a peer is *folded*: runs of frames that are all of a piece of final memory
(`achilles.runtime.shared`) are left out, and a frame before all others says which process has that
memory, as which descriptor. The peer *unfolds* it: it opens that descriptor through ``/proc``, sees
that the memory is the one that was meant and can change no more, and maps it.

Rules
    1. Only over ipc, whose sockets lie in a directory of the user's alone. Who can fold is who
       could read our memory anyway.
    2. The sender has the memory until the message is acknowledged
       (`core.link`), so that the receiver finds it.
    3. A message that cannot be unfolded is as good as lost. Its receiver asks for it again at once,
       as the link does where a message is missing, after it has said that it unfolds no more
       (`REFUSAL`): whatever the reason is, no descriptors left, no ``/proc``, or a peer in another
       container, from then on all comes in full on that connection.

A folded message's first frame, before those that were not left out::

    "am", <I pid, H pieces>, for each piece <I frames before it, i descriptor, Q inode, I frames in
    it>, for each of these <I size>
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from struct import Struct
from struct import error as StructError

from achilles.core.protocol import COMING_MAX, FRAMES_MAX, Buffer
from achilles.errors import ProtocolError
from achilles.runtime.shared import Mapping, adopt, copy, store, whole

MAGIC = b"am"
REFUSAL = b"an"
PIECES_MAX = 0xFFFF
# What is smaller is sooner copied four times, into sockets and out of them,
# than put where it can be referred to (measured).
STORE_MIN = 512 * 1024

KINDS = frozenset({MAGIC, REFUSAL})  # of messages that are for this module, by how they begin

_HEAD = Struct("<2sIH")
_PIECE = Struct("<IiQI")


def store_near(parts: Sequence[Buffer], room: int) -> bytes | memoryview:
    """A copy of the parts, one behind the other, with so much room behind it; if they are large,
    where `fold` can leave it out.
    """
    is_large = sum(memoryview(part).nbytes for part in parts) >= STORE_MIN
    return store(parts, room) if is_large else copy(parts)


def fold(frames: Sequence[Buffer]) -> Sequence[Buffer]:
    """The message as it travels to a peer on this host;
    the same where there is nothing to be left out.
    """
    pieces: list[bytes] = []
    kept: list[Buffer] = []
    at = 0
    while at < len(frames):
        run = _run(frames, at) if len(pieces) < PIECES_MAX else []
        memory = whole(run)
        if memory is None or memory.fd < 0 or not memory.is_final:
            run = run or [frames[at]]
            kept += run
            at += len(run)
            continue
        sizes = [memoryview(frame).nbytes for frame in run]
        inode = os.fstat(memory.fd).st_ino
        pieces.append(_PIECE.pack(at, memory.fd, inode, len(run)))
        pieces.append(_sizes(len(run)).pack(*sizes))
        at += len(run)
    if not pieces:
        return frames
    return [_HEAD.pack(MAGIC, os.getpid(), len(pieces) // 2) + b"".join(pieces), *kept]


def unfold(frames: Sequence[Buffer], *, keep: bool) -> list[Buffer]:
    """The message's own frames; ``keep``: they may be folded again.

    Raises:
        OSError: the memory cannot be had.
        ProtocolError: it is not what `fold` makes.
    """
    rest = iter(frames)
    head = memoryview(next(rest))
    found: list[Buffer] = []
    size = 0
    try:
        _, pid, count = _HEAD.unpack_from(head)
        offset = _HEAD.size
        for _ in range(count):
            at, fd, inode, parts = _PIECE.unpack_from(head, offset)
            offset += _PIECE.size
            if not len(found) <= at <= FRAMES_MAX or not 0 < parts <= FRAMES_MAX:
                raise ProtocolError("a folded message whose pieces are out of order, or too many")
            found += islice(rest, at - len(found))
            columns = _sizes(parts)
            sizes = columns.unpack_from(head, offset)
            offset += columns.size
            size += sum(sizes)
            if len(found) != at or len(found) + parts > FRAMES_MAX or size > COMING_MAX:
                raise ProtocolError("a folded message of other frames than it says, or too large")
            found += _cut(adopt(pid, fd, inode, sum(sizes), keep=keep), sizes)
    except StructError as error:
        raise ProtocolError(f"a folded message that ends too early: {error}") from None
    return [*found, *rest]


def _run(frames: Sequence[Buffer], at: int) -> list[Buffer]:
    """The frames from there on that are of the same memory, up to as many as make it up."""
    first = frames[at]
    memory = first.obj if type(first) is memoryview else None
    if type(memory) is not Mapping:
        return []
    run: list[Buffer] = []
    left = len(memory)
    while at < len(frames) and left > 0:
        frame = frames[at]
        if type(frame) is not memoryview or frame.obj is not memory:
            break
        run.append(frame)
        left -= frame.nbytes
        at += 1
    return run


def _cut(view: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    at = 0
    for size in sizes:
        yield view[at : at + size]
        at += size


def _sizes(count: int) -> Struct:
    return Struct(f"<{count}I")
