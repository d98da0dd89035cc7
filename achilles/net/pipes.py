"""Two pipes beside a ZeroMQ connection between processes of one user on one host,
for all that travels on it.

libzmq has a thread of its own at each end, so a message over ipc wakes three threads; one in a pipe
wakes one. Over a broker and back that is eight wake-ups less.

Who has dialed makes both pipes and *offers* them, in a message that says which process has them as
which descriptors; the other side sees that they are the pipes that are meant, opens them through
``/proc``, and *accepts*. From there on it writes to its pipe, and the first side, as soon as it has
the acceptance, says that it *switches* and does so, too. Each of these is the last message of its
side over the connection, and before it nobody reads the pipe behind it: so nothing is lost,
and no order.

Rules
    1. Only over ipc, whose sockets lie in a directory of the user's alone (as in
       `achilles.net.near`). The connection stays, and is what tells who is there:
       where it ends, the pipes do.
    2. Nothing depends on them. Where they cannot be made or opened, or end, all goes over the
       connection. What was in pipes that end is as good as lost: the link sends it again.
       Connections are worth more than pipes: these leave descriptors to those, and the memory that
       a user's pipes may have to others.
    3. Who writes to a pipe keeps it open for reading, too: a program may have SIGPIPE end it. That
       nobody reads any more, the other pipe tells by its end.

A message in a pipe: <I frames>, for each of them <I size>, and the frames.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from achilles.core.protocol import COMING_MAX, FRAMES_MAX, Buffer
from achilles.errors import ProtocolError
from achilles.runtime import shared
from achilles.runtime.loop import Loop

OFFER = b"ao"
ACCEPTED = b"ap"
REFUSED = b"aq"
SWITCHED = b"ar"
ENDED = b"as"  # from who has offered them: nothing is read from them any more
ANSWERS = frozenset({ACCEPTED, REFUSED})  # to an offer: these, and the number that it has

PAIRS_MAX = 256  # of one process: half of what Linux lets a user have at their full size
IS_AVAILABLE = os.path.isdir("/proc/self/fd")
OUTBOX_MAX = 10_000  # messages that wait for one peer, here and in `achilles.net.transport`
READ_MAX = 64 * 1024  # what a pipe holds; what is larger is read to where it stays
DRAINED_AT_ONCE = 16  # reads: more than a pipe holds, for its writer may go on
VECTOR_MAX = 512  # buffers in one call; systems take 1024

_OFFER = Struct("<2sIiQiQ")
_ANSWER = Struct("<2sQ")
_LOG = logging.getLogger("achilles.net")

_NUMBER = Struct("<I")
_ALONE = Struct("<II")  # before a frame that is a whole message


class Ends(NamedTuple):
    """Descriptors of two pipes: to be read, to be written, and what is only kept
    (see the rules).
    """

    read: int
    write: int
    kept: int


class Offered(NamedTuple):
    """Two new pipes: our ends of them, the one that the other side will write to,
    the message that offers them, and its number.
    """

    ends: Ends
    theirs: int
    frame: bytes
    number: int


def offer() -> Offered:
    """Make two pipes.

    Raises:
        OSError: there are no descriptors for them.
    """
    fds: list[int] = []
    try:
        fds += os.pipe()
        fds += os.pipe()
        kept, write, read, theirs = fds
        _leave_room(max(fds), shared.NUMBERS_MAX)
        for fd in fds:
            os.set_blocking(fd, False)
        inodes = [os.fstat(fd).st_ino for fd in (kept, theirs)]
    except OSError:
        _close(fds)
        raise
    frame = _OFFER.pack(OFFER, os.getpid(), kept, inodes[0], theirs, inodes[1])
    return Offered(Ends(read, write, kept), theirs, frame, inodes[0])


def number_of(frame: Buffer) -> int:
    """The number of an offer.

    Raises:
        ProtocolError: it is not an offer.
    """
    return _offered(frame)[3]


def answer(kind: bytes, number: int) -> bytes:
    """The message that answers the offer of that number."""
    return _ANSWER.pack(kind, number)


def answered(frame: Buffer) -> int:
    """The number of the offer that an answer is for; 0 where it is none."""
    return int(_ANSWER.unpack(frame)[1]) if len(frame) == _ANSWER.size else 0


def accept(frame: Buffer) -> Ends:
    """Our ends of pipes that were offered.

    Raises:
        OSError: they cannot be had, or are not what was offered.
        ProtocolError: it is not an offer.
    """
    _, pid, theirs, their_inode, ours, our_inode = _offered(frame)
    fds: list[int] = []
    try:
        fds.append(_open(pid, theirs, their_inode, os.O_RDONLY))
        fds.append(_open(pid, ours, our_inode, os.O_WRONLY))
        fds.append(_open(pid, ours, our_inode, os.O_RDONLY))
        _leave_room(max(fds), shared.NUMBERS_MAX // 2)
    except OSError:
        _close(fds)
        raise
    return Ends(*fds)


def _offered(frame: Buffer) -> tuple[bytes, int, int, int, int, int]:
    try:
        return _OFFER.unpack(frame)
    except StructError as error:
        raise ProtocolError(f"an offer of pipes that is none: {error}") from None


def _leave_room(fd: int, numbers_max: int) -> None:
    """Descriptors have the lowest number that is free;
    connections and the program need some, too.
    """
    if fd >= numbers_max:
        raise OSError(errno.EMFILE, "there are not many descriptors left")


def _open(pid: int, fd: int, inode: int, mode: int) -> int:
    path = f"/proc/{pid}/fd/{fd}"
    if os.readlink(path) != f"pipe:[{inode}]":  # to open something else could have an effect
        raise OSError(f"descriptor {fd} of process {pid} is not the pipe that was meant")
    own = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    found = os.fstat(own)
    if found.st_ino == inode and stat.S_ISFIFO(found.st_mode):
        return own
    os.close(own)
    raise OSError(f"descriptor {fd} of process {pid} is not the pipe that was meant")


class Pipes:
    """One side of two pipes in a loop. It is read from `begin` on.

    ``on_frames(frames)`` is called for each message; none may have more frames than the codec
    takes, nor one of more than ``frame_max`` bytes. ``on_end(error)`` is called once, when the
    other side has ended them or (then with the error) what came is no message of ours; they are
    closed by then. ``theirs`` is kept for the other side until `begin`.
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
        self._outbox: deque[deque[memoryview]] = deque()  # of each message what is left
        self._partial = b""  # of a message that is not whole
        self._frames: list[Buffer] = []  # of a large one,
        self._sizes: deque[int] = deque()  # those that are to follow,
        self._rooms: deque[memoryview] = deque()  # and where what is read next goes
        self.is_closed = False

    def begin(self) -> None:
        """Read from now on."""
        self._let_go()
        self._loop.register(self._ends.read, self._receive)

    def _let_go(self) -> None:
        """The other side has its ends, and says so by ending them."""
        if self._theirs is not None:
            os.close(self._theirs)
            self._theirs = None

    @property
    def has_outbox(self) -> bool:
        """Whether something is kept that the pipe did not take yet."""
        return bool(self._outbox)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send, or keep for later; what is too much to be kept is dropped."""
        first = frames[0]
        message: list[Buffer]
        try:
            if len(frames) == 1 and type(first) is bytes and len(first) <= READ_MAX:  # nearly all
                message, size = [_ALONE.pack(1, len(first)) + first], _ALONE.size + len(first)
            else:
                sizes = [memoryview(frame).nbytes for frame in frames]
                head = Struct(f"<{len(sizes) + 1}I").pack(len(sizes), *sizes)
                message, size = [head, *frames], len(head) + sum(sizes)
        except MemoryError:
            return  # it is as good as lost
        if self._outbox:
            if len(self._outbox) < OUTBOX_MAX:
                self._outbox.append(_views(message))
            return
        written = self._written(message)
        if written < size and not self.is_closed:
            self._outbox.append(_views(message))
            _take_off(self._outbox[0], written)
            self._loop.register(self._ends.write, self.flush, write=True)

    def flush(self) -> None:
        """Try again what was kept."""
        outbox = self._outbox
        while outbox:
            written = self._written(list(islice(outbox[0], VECTOR_MAX)))
            if not written:
                return
            _take_off(outbox[0], written)
            if not outbox[0]:
                outbox.popleft()
        self._loop.unregister(self._ends.write)

    def _written(self, message: list[Buffer] | list[memoryview]) -> int:
        """How many bytes of it the pipe takes now."""
        try:
            return os.writev(self._ends.write, message[:VECTOR_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:  # no memory for it
            _LOG.info("messages go over ipc, because a pipe cannot be written to: %s", error)
            self._end(None)
            return 0

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
        self._let_go()
        for fd in self._ends:
            self._loop.unregister(fd)
        _close(self._ends)

    def _receive(self) -> bool:
        """Read once, and hand on the messages that are whole; whether something came."""
        messages: list[list[Buffer]] = []
        is_over, error = False, None
        try:
            is_over = not self._read(messages)
        except BlockingIOError:
            return False
        except MemoryError:
            is_over = True
        except ProtocolError as caught:
            is_over, error = True, caught
        for frames in messages:
            if self.is_closed:  # by what one of them has led to
                return False
            self._on_frames(frames)
        if is_over and not self.is_closed:
            self._end(error)
        return not self.is_closed

    def _read(self, messages: list[list[Buffer]]) -> bool:
        """Read once, and append the messages that are whole; False at the end of the pipe.

        Raises:
            BlockingIOError: nothing has come.
            ProtocolError: what came is no message.
            MemoryError: there is no room for it.
        """
        if self._sizes or self._rooms:
            return self._fill(messages)
        data = os.read(self._ends.read, READ_MAX)
        if not data:
            return False
        if self._partial:
            data = self._partial + data
        at, end = 0, len(data)
        while at + _ALONE.size <= end:
            count, size = _ALONE.unpack_from(data, at)
            start = at + _ALONE.size
            if count == 1 and start + size <= end and size <= self._frame_max:
                at = start + size
                messages.append([data[start:at]])
            elif not (found := self._take_other(data, at, count, messages)):
                break
            else:
                at = found
        if self._sizes:
            at += _NUMBER.size * (len(self._sizes) + 1)  # what is left is of its frames
        self._partial = data[at:]
        return True

    def _take_other(self, data: bytes, at: int, count: int, messages: list[list[Buffer]]) -> int:
        """A message of several frames, or one that is not whole: where the next one begins, or 0
        where more has to come first.

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
        messages.append(frames)
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

    def _fill(self, messages: list[list[Buffer]]) -> bool:
        """Read more of a large message, as `_read` does."""
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
                return False
            _take_off(self._rooms, came)
        if not self._rooms and not any(self._sizes):
            self._frames += [b""] * len(self._sizes)
            self._sizes.clear()
            messages.append(self._frames)
            self._frames = []
        return True

    def _end(self, error: ProtocolError | None) -> None:
        self.close()
        self._on_end(error)


def _views(message: Iterable[Buffer]) -> deque[memoryview]:
    return deque(memoryview(part).cast("B") for part in message)


def _take_off(views: deque[memoryview], count: int) -> None:
    """Leave what is behind the first ``count`` bytes."""
    while views and count >= views[0].nbytes:
        count -= views.popleft().nbytes
    if count:
        views[0] = views[0][count:]


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
