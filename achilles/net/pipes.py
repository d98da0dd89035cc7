"""Two pipes beside a ZeroMQ connection between processes of one user on one host, for all that travels on it.

libzmq has a thread of its own at each end, so a message over ipc wakes three threads; one in a pipe wakes one. Over a broker
and back that is eight wake-ups less.

Who has dialed makes both pipes and *offers* them, in a message that says which process has them as which descriptors; the other
side opens those through ``/proc``, sees that they are the pipes that were meant, and accepts. The order of messages stays what
it was: the offer is the last message that comes from one side over the connection, the acceptance the last from the other,
and neither reads what is in its pipe before it has the other's.

Rules
    1. Only over ipc, whose sockets lie in a directory of the user's alone (as in `achilles.net.near`). The connection stays, and is
       what tells who is there: where it ends, the pipes do.
    2. Nothing depends on them. Where they cannot be made or opened, or end, all goes over the connection, and what was in them is
       as good as lost: the link sends it again.
    3. Who writes to a pipe keeps it open for reading, too: a program may have SIGPIPE end it. That nobody reads any more,
       the other pipe tells by its end.

A message in a pipe: <I frames>, for each of them <I size>, and the frames.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from achilles.core.protocol import COMING_MAX, FRAMES_MAX, Buffer
from achilles.errors import ProtocolError
from achilles.runtime.loop import Loop

OFFER = b"ao"
ACCEPTED = b"ap"
REFUSED = b"aq"
KINDS = frozenset({OFFER, ACCEPTED, REFUSED})  # of messages about pipes, by how they begin

IS_AVAILABLE = os.path.isdir("/proc/self/fd")
OUTBOX_MAX = 10_000  # messages; see `achilles.net.transport`
READ_MAX = 64 * 1024  # what a pipe holds; what is larger is read to where it stays
DRAINED_AT_ONCE = 16  # reads: more than a pipe holds, for its writer may go on
VECTOR_MAX = 512  # buffers in one call; systems take 1024

_OFFER = Struct("<2sIiQiQ")
_NUMBER = Struct("<I")
_ALONE = Struct("<II")  # before a frame that is a whole message


class Ends(NamedTuple):
    """Descriptors of two pipes: to be read, to be written, and what is only kept (see the rules)."""

    read: int
    write: int
    kept: int


def offer() -> tuple[Ends, int, bytes]:
    """Two new pipes: our ends of them, the one that the other side will write to, and the message that offers them.

    Raises:
        OSError: there are no descriptors for them.
    """
    fds: list[int] = []
    try:
        fds += os.pipe()
        fds += os.pipe()
        kept, write, read, theirs = fds
        for fd in fds:
            os.set_blocking(fd, False)
        inodes = [os.fstat(fd).st_ino for fd in (kept, theirs)]
    except OSError:
        _close(fds)
        raise
    frame = _OFFER.pack(OFFER, os.getpid(), kept, inodes[0], theirs, inodes[1])
    return Ends(read, write, kept), theirs, frame


def accept(frame: Buffer) -> Ends:
    """Our ends of pipes that were offered.

    Raises:
        OSError: they cannot be had, or are not what was offered.
        ProtocolError: it is not an offer.
    """
    try:
        _, pid, theirs, their_inode, ours, our_inode = _OFFER.unpack(frame)
    except StructError as error:
        raise ProtocolError(f"an offer of pipes that is none: {error}") from None
    fds: list[int] = []
    try:
        fds.append(_open(pid, theirs, their_inode, os.O_RDONLY))
        fds.append(_open(pid, ours, our_inode, os.O_WRONLY))
        fds.append(_open(pid, ours, our_inode, os.O_RDONLY))
    except OSError:
        _close(fds)
        raise
    return Ends(*fds)


def _open(pid: int, fd: int, inode: int, mode: int) -> int:
    own = os.open(f"/proc/{pid}/fd/{fd}", mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    found = os.fstat(own)
    if found.st_ino == inode and stat.S_ISFIFO(found.st_mode):
        return own
    os.close(own)
    raise OSError(f"descriptor {fd} of process {pid} is not the pipe that was meant")


class Pipes:
    """One side of two pipes in a loop. It can be written to at once, and is read from `begin` on.

    ``on_frames(frames)`` is called for each message; none may have more frames than the codec takes, nor one of more than
    ``frame_max`` bytes. ``on_end(error)`` is called once, when the other side has ended them or (then with the error) what came is no
    message of ours; they are closed by then. ``theirs`` is kept for the other side until `begin`.
    """

    def __init__(
        self,
        ends: Ends,
        loop: Loop,
        on_frames: Callable[[list[Buffer]], object],
        on_end: Callable[[ProtocolError | None], object],
        *,
        frame_max: int,
        theirs: int | None = None,
    ) -> None:
        self._ends = ends
        self._theirs = theirs
        self._loop = loop
        self._on_frames = on_frames
        self._on_end = on_end
        self._frame_max = frame_max
        self._outbox: deque[list[memoryview]] = deque()
        self._partial = b""  # of a message that is not whole
        self._frames: list[Buffer] = []  # of a large one,
        self._sizes: deque[int] = deque()  # those that are to follow,
        self._rooms: deque[memoryview] = deque()  # and where what is read next goes
        self.is_closed = False

    def begin(self) -> None:
        """Read from now on; the other side has its ends."""
        self._forget_theirs()
        self._loop.register(self._ends.read, self._receive)

    @property
    def has_outbox(self) -> bool:
        """Whether something is kept that the pipe did not take yet."""
        return bool(self._outbox)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send, or keep for later; what is too much to be kept is dropped."""
        first = frames[0]
        message: list[Buffer]
        if len(frames) == 1 and type(first) is bytes and len(first) <= READ_MAX:  # nearly all
            message, size = [_ALONE.pack(1, len(first)) + first], _ALONE.size + len(first)
        else:
            sizes = [memoryview(frame).nbytes for frame in frames]
            head = Struct(f"<{len(sizes) + 1}I").pack(len(sizes), *sizes)
            message, size = [head, *frames], len(head) + sum(sizes)
        if self._outbox:
            if len(self._outbox) < OUTBOX_MAX:
                self._outbox.append(_views(message))
            return
        try:
            written = os.writev(self._ends.write, message[:VECTOR_MAX])
        except BlockingIOError:
            written = 0
        if written < size:
            self._outbox.append(_after(_views(message), written))
            self._loop.register(self._ends.write, self.flush, write=True)

    def flush(self) -> None:
        """Try again what was kept."""
        outbox = self._outbox
        while outbox:
            try:
                written = os.writev(self._ends.write, outbox[0][:VECTOR_MAX])
            except BlockingIOError:
                return
            outbox[0] = _after(outbox[0], written)
            if not outbox[0]:
                outbox.popleft()
        self._loop.unregister(self._ends.write)

    def drain(self) -> None:
        """Hand on what has come, before they are closed."""
        for _ in range(DRAINED_AT_ONCE):
            if self.is_closed or not self._receive():
                return

    def close(self) -> None:
        """End them; ``on_end`` is not called any more."""
        if self.is_closed:
            return
        self.is_closed = True
        self._outbox.clear()
        self._forget_theirs()
        for fd in self._ends:
            self._loop.unregister(fd)
        _close(self._ends)

    def _forget_theirs(self) -> None:
        if self._theirs is not None:
            os.close(self._theirs)
            self._theirs = None

    def _receive(self) -> bool:
        """Read once, and hand on the messages that are whole; whether something came."""
        try:
            if self._sizes or self._rooms:
                return self._fill()
            data = os.read(self._ends.read, READ_MAX)
        except BlockingIOError:
            return False
        except MemoryError:
            data = b""  # as good as their end
        if not data:
            self._end(None)
            return False
        try:
            self._take(self._partial + data if self._partial else data)
        except ProtocolError as error:
            self._end(error)
        return True

    def _take(self, data: bytes) -> None:
        """Hand on the messages in there, and keep what is left of one.

        Raises:
            ProtocolError: it is none.
        """
        at, end = 0, len(data)
        while at + _ALONE.size <= end:
            count, size = _ALONE.unpack_from(data, at)
            start = at + _ALONE.size
            if count == 1 and start + size <= end and size <= self._frame_max:
                at = start + size
                self._on_frames([data[start:at]])
            elif not (found := self._take_other(data, at, count)):
                break
            else:
                at = found
            if self.is_closed:
                return
        if self._sizes:
            at += _NUMBER.size * (len(self._sizes) + 1)  # what is left is of its frames
        self._partial = data[at:]

    def _take_other(self, data: bytes, at: int, count: int) -> int:
        """A message of several frames, or one that is not whole: where the next one begins, or 0 where more has to come first.

        If it is large, its frames are read to where they stay from here on.
        """
        if not 0 < count <= FRAMES_MAX:
            raise ProtocolError(f"a message of {count} frames")
        start = at + _NUMBER.size * (count + 1)
        if start > len(data):
            return 0
        sizes: tuple[int, ...] = Struct(f"<{count}I").unpack_from(data, at + _NUMBER.size)
        if max(sizes) > self._frame_max or sum(sizes) > COMING_MAX:
            raise ProtocolError(f"a message of {sum(sizes)} bytes, {max(sizes)} in one frame")
        end = start + sum(sizes)
        if end > len(data):
            if end - at > READ_MAX:
                self._sizes.extend(sizes)
            return 0
        frames: list[Buffer] = []
        for size in sizes:
            frames.append(data[start : start + size])
            start += size
        self._on_frames(frames)
        return end

    def _make_room(self) -> None:
        """For what can come at once, and no more: its sender may say anything."""
        there = sum(room.nbytes for room in self._rooms)
        while self._sizes and there < READ_MAX and len(self._rooms) < VECTOR_MAX:
            room = memoryview(bytearray(self._sizes.popleft()))
            self._frames.append(room.toreadonly())
            if room.nbytes:
                self._rooms.append(room)
                there += room.nbytes

    def _fill(self) -> bool:
        """Read more of a large message; whether something came."""
        while self._partial:  # what came with its sizes
            self._make_room()
            room = self._rooms.popleft()
            part, self._partial = self._partial[: room.nbytes], self._partial[room.nbytes :]
            room[: len(part)] = part
            if len(part) < room.nbytes:
                self._rooms.appendleft(room[len(part) :])
        self._make_room()
        if self._rooms:
            came = os.readv(self._ends.read, list(self._rooms))
            if not came:
                self._end(None)
                return False
            self._rooms = deque(_after(self._rooms, came))
        if not self._rooms and not any(self._sizes):
            self._frames += [b""] * len(self._sizes)
            self._sizes.clear()
            frames, self._frames = self._frames, []
            self._on_frames(frames)
        return True

    def _end(self, error: ProtocolError | None) -> None:
        self.close()
        self._on_end(error)


def _views(message: Sequence[Buffer]) -> list[memoryview]:
    return [memoryview(part).cast("B") for part in message]


def _after(views: Iterable[memoryview], count: int) -> list[memoryview]:
    """What is behind the first ``count`` bytes."""
    rest: list[memoryview] = []
    for view in views:
        if count < view.nbytes:
            rest.append(view[count:] if count else view)
        count = max(0, count - view.nbytes)
    return rest


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
