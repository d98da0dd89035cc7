"""Large payloads in memory that processes of one host hand to each other by descriptor.

The memory is anonymous (``memfd_create``), written once, and mapped copy-on-write by whoever reads
it: nobody sees another's changes, and nothing is left behind when the last of them is gone. A
mapping costs one or two descriptors for as long as something in it is used, so their number is
bounded; beyond that, and where there is no memfd, payloads are copied.

Memory that is *final* can be changed by nobody any more, nor made shorter: the kernel sees to that
(its seals have nothing to do with those of `achilles.runtime.seal`). A process of the same user may
`adopt` it by the number that its descriptor has in another process, and maps it without fear. So a
large payload goes from a client through broker and worker to a runner on the same host without
being copied again.

Who reads the same payload again and again (`fresh`) gets the same mapping each time, once nobody
uses it any more and it is as it was: to map 64 MiB anew and to touch each page of it takes 20 ms,
and to see that nothing was written to it 0.15 ms.
"""

from __future__ import annotations

import _socket
import fcntl
import mmap
import os
import sys
import threading
import weakref
from sys import getrefcount
from time import monotonic

TYPE_CHECKING = False  # as type checkers know it; importing typing takes long
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"

IS_AVAILABLE = hasattr(os, "memfd_create") and hasattr(_socket, "SCM_RIGHTS")
MAPPINGS_LIMIT = 16_384  # a quarter of the mappings that Linux lets a process have
NUMBERS_LIMIT = 512  # of descriptors in a process that is not ours: `select` takes those below 1024
COPY_MAX = (
    512 * 1024
)  # below it, what nobody hands on is rather copied: a mapping costs a descriptor

HUGE_MIN = 4 << 20  # below it most of the memory could not lie in pages of 2 MiB

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_DROP: int | None = getattr(mmap, "MADV_DONTNEED", None)
COPY_SECONDS = 2.0  # for so long the memory of a large copy is kept that nobody uses any more
_FINAL = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
_IOV_MAX = 64
_FD_SIZE = 4  # a C int


class Mapping(mmap.mmap):
    """A private, writable mapping of a whole memfd.
    ``fd`` is the memfd while it may be handed on, or -1.

    ``is_final``: what is in the memfd does not change any more; ``is_filled``: there was room in
    it. ``spare`` is another one of the same memory, for `fresh`. Of that one, ``address`` is where
    it lies, and ``is_clean`` says that it is as the memory, and nobody has had it since.
    """

    fd = -1
    is_final = False
    is_filled = False
    spare: Mapping | None = None
    address = 0
    is_clean = False

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()
_sources: weakref.WeakSet[Mapping] = weakref.WeakSet()  # those with a spare


def _descriptors_max() -> int:
    try:
        import resource
    except ImportError:
        return 256
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _mappings_max(descriptors: int) -> int:
    return max(4, min(descriptors // 16, MAPPINGS_LIMIT))


# Descriptors have the lowest number that is free: from this one on the others are left to the
# program, which may have many.
NUMBERS_MAX = min(_descriptors_max() // 2, NUMBERS_LIMIT)
MAPPINGS_MAX = _mappings_max(_descriptors_max())


def note_limits() -> None:
    """This process is all ours, and may have more descriptors than when this was imported."""
    global MAPPINGS_MAX, NUMBERS_MAX
    MAPPINGS_MAX, NUMBERS_MAX = _mappings_max(_descriptors_max()), _descriptors_max() // 2


def store(parts: Sequence[Buffer], room: int = 0) -> bytes | memoryview:
    """A copy of the parts, one behind the other;
    a memoryview if a `Handoff` can pass it on as it is.

    That is so once `fill` has filled the ``room``, so many bytes behind it, if there is any.
    """
    mapping = whole(parts)
    if mapping is not None and mapping.fd >= 0:
        return memoryview(mapping)
    if IS_AVAILABLE and len(_mappings) < MAPPINGS_MAX:
        try:
            fd = _write(parts, room)
        except OSError:
            pass  # out of descriptors or of memory of that kind
        else:
            try:
                view = memoryview(_map(fd, keep=True))
                return view[: len(view) - room] if room else view
            except (OSError, ValueError):
                os.close(fd)
    return b"".join(parts)


def fill(view: Buffer, tail: bytes) -> memoryview | None:
    """Write ``tail`` behind what was stored with that much room, once; where it is then.
    None if there is none.
    """
    mapping = view.obj if type(view) is memoryview else None
    if type(mapping) is not Mapping or mapping.fd < 0 or len(mapping) != len(view) + len(tail):
        return None
    behind = memoryview(mapping)[len(view) :]
    if not mapping.is_filled:
        try:
            os.pwrite(mapping.fd, tail, len(view))
        except OSError:
            return None  # there is no memory left
        mapping.is_filled = True
        mapping.is_final = _finish(mapping.fd)
    return behind if behind == tail else None


def whole(parts: Sequence[Buffer]) -> Mapping | None:
    """The memory of which these parts are the pieces, all of them and in order;
    None if there is none.
    """
    mapping = parts[0].obj if parts and type(parts[0]) is memoryview else None
    if type(mapping) is not Mapping:
        return None
    size = 0
    for part in parts:
        if type(part) is not memoryview or part.obj is not mapping:
            return None
        size += part.nbytes
    return mapping if size == len(mapping) else None  # nobody makes pieces of another order


def adopt(pid: int, fd: int, inode: int, size: int, *, keep: bool) -> memoryview:
    """The final memory that process ``pid`` has as its descriptor ``fd``; ``keep``: it may be
    handed on.

    Raises:
        OSError: it is not there (any more), it is other memory, it is not final,
            or this process may not have it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    path = f"/proc/{pid}/fd/{fd}"
    if not os.readlink(path).startswith("/memfd:"):  # to open something else could have an effect
        raise OSError(f"descriptor {fd} of process {pid} is not the memory that was meant")
    own = os.open(path, flags)
    try:
        found = os.fstat(own)
        if not size or (found.st_ino, found.st_size) != (inode, size) or not _is_final(own):
            raise OSError(f"descriptor {fd} of process {pid} is not the memory that was meant")
        return _take(own, keep=keep, copies=size < COPY_MAX and not keep)
    except BaseException:
        os.close(own)
        raise


def kept_bytes() -> int:
    """How much memory this process has to hand on: whoever wrote it,
    it stays as long as it is here.
    """
    return sum(len(mapping) for mapping in tuple(_mappings) if mapping.fd >= 0)


def copy(parts: Sequence[Buffer], room: int = 0) -> memoryview:
    """A copy of the parts, one behind the other, for this process alone; ``room`` is for `store`.

    Large ones lie in huge pages where the system has them: to touch new memory 4 KiB at a time
    takes twice as long as to copy it (64 MiB: 34 ms, and 12 in huge pages); and in the memory of
    the last one, if nobody uses that any more.
    """
    views = [memoryview(part).cast("B") for part in parts]
    size = sum(view.nbytes for view in views)
    if size < HUGE_MIN or _ADVICE is None:
        return memoryview(b"".join(views))
    memory = _last_copy.take(size)
    if memory is None:
        return memoryview(b"".join(views))
    at = 0
    for view in views:
        memory[at : at + view.nbytes] = view
        at += view.nbytes
    return memory


class _LastCopy:
    """The memory of the last large copy, for the next one.

    Nobody waits for the lock: who does not get it does without,
    also in a forked child whose parent held it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.spare: mmap.mmap | None = None
        self._used_at = 0.0

    def take(self, size: int) -> memoryview | None:
        """So much memory that nobody uses; None if there is none to be had."""
        if not self._lock.acquire(blocking=False):
            memory = _huge(size)
            return None if memory is None else memoryview(memory)
        try:
            self._used_at = monotonic()
            if _references(self) != _UNUSED or not self._fits(size):
                self.spare = _huge(size)
            return None if self.spare is None else memoryview(self.spare)[:size]
        finally:
            self._lock.release()

    def _fits(self, size: int) -> bool:
        return self.spare is not None and size <= len(self.spare) <= 2 * size

    def let_go(self, before: float) -> None:
        """Free it, if nobody uses it and that began before a time of the system's monotonic
        clock.
        """
        if self._lock.acquire(blocking=False):
            try:
                if self._used_at < before and _references(self) == _UNUSED:
                    self.spare = None
            finally:
                self._lock.release()


def _huge(size: int) -> mmap.mmap | None:
    """New memory, in huge pages where the system has them; None if there is none to be had."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None  # out of mappings
    try:
        memory.madvise(_ADVICE or 0)
    except OSError:
        pass  # the kernel has no huge pages
    return memory


def forget_copy(before: float) -> None:
    """Free the memory of the last large copy, if nobody uses it,
    and it was made before that time (monotonic clock).
    """
    _last_copy.let_go(before)


def fresh(payload: Buffer) -> bytearray | memoryview:
    """The same bytes in memory of one's own, writable; not copied before they are written,
    where that is possible.
    """
    fd = _fd_of((payload,))
    if fd >= 0:
        source: Mapping = payload.obj  # type: ignore[union-attr, assignment]
        spare = _unused_spare(source)
        if spare is not None and _restore(spare):
            spare.is_clean = False
            return memoryview(spare)
        if _has_room():
            try:
                source.spare = spare = _map(fd, keep=False)
            except (OSError, ValueError):
                pass  # out of descriptors, or of address space
            else:
                import ctypes

                spare.address = ctypes.addressof(ctypes.c_char.from_buffer(spare))
                _sources.add(source)
                return memoryview(spare)
    return bytearray(payload)


def tidy() -> None:
    """Let go of what was written to mappings that nobody uses any more."""
    forget_copy(monotonic() - COPY_SECONDS)
    for source in tuple(_sources):
        spare = _unused_spare(source)
        if spare is not None:
            spare.is_clean = _restore(spare)
            if not spare.is_clean:
                source.spare = None


def _has_room() -> bool:
    """Whether one more mapping may be; spares that nobody uses give way."""
    if len(_mappings) >= MAPPINGS_MAX:
        for source in tuple(_sources):
            if _unused_spare(source) is not None:
                source.spare = None
    return len(_mappings) < MAPPINGS_MAX


def _references(source: Any) -> int:
    """How many there are to the source's spare; one of them is the source's."""
    return getrefcount(source.spare)


def _unused_spare(source: Mapping) -> Mapping | None:
    """The source's spare, if it has one that nobody has."""
    return source.spare if _references(source) == _UNUSED else None


class _Unused:
    spare = bytearray()


_UNUSED = _references(_Unused)
_last_copy = _LastCopy()


def _restore(spare: Mapping) -> bool:
    """Make an unused mapping what it was at first; False if that cannot be done."""
    if spare.is_clean:
        return True
    if _DROP is None:
        return False
    from achilles.runtime import written  # not a name from it, which takes longer

    try:
        if written.is_as_in_file(spare.address, len(spare)):
            return True
        spare.madvise(_DROP)
    except (OSError, ValueError):
        return False  # a task has locked it in memory, or closed it
    return True


class Handoff:
    """One end of a socket pair over which two processes hand payloads to each other."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock

    def close(self) -> None:
        self._sock.close()

    def send(self, parts: Sequence[Buffer]) -> bool:
        """Hand over the parts, one behind the other; False if that is not possible now."""
        fd = _fd_of(parts)
        is_new = fd < 0
        try:
            if is_new:
                fd = _write(parts, 0)
            rights = fd.to_bytes(_FD_SIZE, sys.byteorder)
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)]
            self._sock.sendmsg([b"m"], ancillary)
        except OSError:
            return False  # a limit of descriptors or of memory, or a peer that does not keep up
        finally:
            if is_new and fd >= 0:
                os.close(fd)
        return True

    def receive(self, *, keep: bool = False) -> memoryview:
        """What the other side has sent, in the order of its sends;
        ``keep``: `fresh` may be wanted of it.

        Raises:
            OSError: nothing is there, or this process has too many open files.
        """
        space = _socket.CMSG_SPACE(_FD_SIZE)
        _, ancillary, _, _ = self._sock.recvmsg(1, space, getattr(_socket, "MSG_CMSG_CLOEXEC", 0))
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fd = int.from_bytes(data[:_FD_SIZE], sys.byteorder)
                try:
                    return _take(fd, keep=keep)
                except BaseException:
                    os.close(fd)
                    raise
        raise OSError("a payload came without its memory (too many open files?)")


def _fd_of(parts: Sequence[Buffer]) -> int:
    """The memfd that holds just these parts, or -1."""
    mapping = whole(parts)
    return -1 if mapping is None else mapping.fd


def _write(parts: Sequence[Buffer], room: int) -> int:
    """A new memfd that holds the parts, and is final unless there is room behind them."""
    fd = os.memfd_create("achilles", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if fd >= NUMBERS_MAX:
            raise OSError("there are not many descriptors left")
        views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        while views:
            written = os.writev(fd, views[:_IOV_MAX])
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]
        if room:
            os.ftruncate(fd, os.fstat(fd).st_size + room)
        else:
            _finish(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, *, keep: bool) -> Mapping:
    mapping = Mapping(fd, os.fstat(fd).st_size, access=mmap.ACCESS_COPY)
    if keep:
        mapping.fd = fd
        mapping.is_final = _is_final(fd)
    _mappings.add(mapping)
    return mapping


def _take(fd: int, *, keep: bool, copies: bool = False) -> memoryview:
    """What is in a memfd, as memory of ours; the descriptor is closed, or kept with it.
    ``copies``: rather not mapped.

    Raises:
        OSError: it cannot be mapped, or read; it is not closed.
    """
    if not copies and fd < NUMBERS_MAX and _has_room():
        view = memoryview(_map(fd, keep=keep))
        if not keep:
            os.close(fd)
        return view
    view = _read(fd)
    os.close(fd)
    return view


def _finish(fd: int) -> bool:
    """Let nobody change the memfd any more; whether the kernel does that."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FINAL)
    except (OSError, AttributeError):
        return False  # it is as good for one's own runners
    return True


def _is_final(fd: int) -> bool:
    try:
        return bool(_FINAL) and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _FINAL == _FINAL
    except (OSError, AttributeError):
        return False  # it is no memfd


def _read(fd: int) -> memoryview:
    """A copy of the memfd's content."""
    view = memoryview(bytearray(os.fstat(fd).st_size))
    at = 0
    while at < len(view):
        at += os.preadv(fd, [view[at:]], at)
    return view
