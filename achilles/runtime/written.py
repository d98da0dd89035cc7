"""Whether a piece of this process's memory was written to since it was looked at last,
by what the kernel notes of each page.

The kernel write-protects the pages (``userfaultfd`` with ``UFFD_FEATURE_WP_ASYNC``) and lifts that
by itself at the first write to each, whoever writes: Python, C, or a system call that reads a file
into it. ``PAGEMAP_SCAN`` tells whether any page is not protected any more. That is Linux 6.7 and
newer, and takes no privileges; where it is not to be had, `watch` gives None.

Rules
    1. "Not written" is certain; what is not certain is "written". Pages that were freed, mapped
       anew or moved count as written.
    2. Only private anonymous memory is watched: what others have mapped too, they can write to
       without a page of ours noting it.
    3. Only whole pages are, so that neighbours do not matter; `Watch.head` and `Watch.tail` are the
       bytes before and behind them.
    4. The kernel has one note of a page, whoever watches it. `Watch.begin` clears the notes of
       pages that were written, so it tells all other watches of those pages that they were.

For 64 MiB a look takes 15 µs, memcmp 4 to 10 ms. The first write to a page costs its writer 1 µs
more, once after each `Watch.begin`. What a device writes to pages that a driver has pinned for it
(RDMA, io_uring's fixed buffers, CUDA's registered host memory) is seen by nobody;
``ACHILLES_WATCH_MEMORY=0`` is for programs that submit such memory more than once.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
import threading
import weakref
from _struct import Struct
from array import array
from contextlib import suppress

TYPE_CHECKING = False  # as type checkers know it; importing typing takes long
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final

WATCH_MIN = 1 << 20  # bytes; comparing fewer is nearly as fast
PAGE = mmap.PAGESIZE

_SYSCALLS = {"x86_64": 323, "aarch64": 282}  # of userfaultfd
_USER_MODE_ONLY = 1  # what anybody may have; it does not matter here, because we handle no faults
_API_VERSION = 0xAA
_WP_UNPOPULATED, _WP_ASYNC = 1 << 13, 1 << 15
_MODE_WP = 2
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_PAGEMAP_SCAN = 0xC0606610
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_IS_WRITTEN, _IS_FILE, _IS_PRESENT, _IS_SWAPPED = 2, 4, 8, 16
_API, _RANGE, _REGISTER, _SCAN = Struct("=QQQ"), Struct("=QQ"), Struct("=QQQQ"), Struct("=12Q")
_WALK_END = 4  # where in the answer to a scan it says how far that went
_REGION_SIZE = 24  # of what it finds: from where, to where, what
REGIONS_MAX = 256  # found at once
_TEST_SIZE = 4 << 20  # holds one aligned huge page at least
_HUGE = 2 << 20


class _Kernel:
    """The descriptors and calls for watching this process's memory.

    Its calls keep the GIL: they are shorter than it takes to get it back from another thread.

    Raises:
        OSError: the kernel cannot, or may not.
    """

    def __init__(self) -> None:
        import ctypes

        self._errno = ctypes.get_errno
        self._ioctl = ctypes.PyDLL(None, use_errno=True).ioctl
        self._ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p)
        self._found: Final = array("Q", bytes(REGIONS_MAX * _REGION_SIZE))
        self._question: Any = ctypes.create_string_buffer(_SCAN.size)
        self._descriptors: list[int] = []
        try:
            self._faults = self._open(_userfaultfd())
            wanted = _API.pack(_API_VERSION, _WP_ASYNC | _WP_UNPOPULATED, 0)
            self._call(self._faults, _UFFDIO_API, wanted)
            self._pages = self._open(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def _open(self, fd: int) -> int:
        self._descriptors.append(fd)
        return fd

    def _call(self, fd: int, request: int, about: Any) -> int:
        found: int = self._ioctl(
            fd, request, about
        )  # the kernel writes to it, and nobody else has it
        if found < 0:
            raise OSError(self._errno(), os.strerror(self._errno()))
        return found

    def close(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()

    def register(self, start: int, size: int) -> None:
        self._call(self._faults, _UFFDIO_REGISTER, _REGISTER.pack(start, size, _MODE_WP, 0))

    def unregister(self, start: int, size: int) -> None:
        self._call(self._faults, _UFFDIO_UNREGISTER, _RANGE.pack(start, size))

    def is_written(self, start: int, size: int) -> bool:
        """Whether a page was written to since it was protected."""
        return self._scan(_CHECK_WPASYNC, start, start + size, 1) > 0

    def protect(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Protect each page anew that was written to; from where to where those are."""
        end = start + size
        while start < end:
            count = self._scan(_CHECK_WPASYNC | _WP_MATCHING, start, end, REGIONS_MAX)
            start = _SCAN.unpack(self._question)[_WALK_END]
            yield from [(self._found[3 * n], self._found[3 * n + 1]) for n in range(count)]

    def _scan(self, flags: int, start: int, end: int, room: int) -> int:
        """How many regions of pages there are that were written to,
        of as many as there is room for.
        """
        about = (_SCAN.size, flags, start, end, 0, self._found.buffer_info()[0], room, 0)
        wanted = (0, _IS_WRITTEN, 0, _IS_WRITTEN)  # inverted, all of, any of, told
        _SCAN.pack_into(self._question, 0, *about, *wanted)
        return self._call(self._pages, _PAGEMAP_SCAN, self._question)


class Watch:
    """Watches ``size`` bytes from ``address`` on; not before `begin` is called."""

    __slots__ = ("__weakref__", "_is_stale", "_kernel", "_size", "_start", "head", "tail")

    def __init__(self, kernel: _Kernel, address: int, size: int) -> None:
        self._start = -(-address // PAGE) * PAGE
        self._size = (address + size) // PAGE * PAGE - self._start
        self.head = self._start - address
        self.tail = size - self.head - self._size
        self._is_stale = True  # others have, or may have, the note of a write
        with _lock:
            kernel.register(self._start, self._size)
            self._kernel = kernel
            _watches.add(self)

    def begin(self) -> bool:
        """What is written from here on counts; False: it cannot be watched any more."""
        with _lock:
            try:
                for start, end in self._kernel.protect(self._start, self._size):
                    self._pass_on(start, end)
            except OSError:
                self._pass_on(self._start, self._start + self._size)
                return False
            self._is_stale = False
            return True

    def is_untouched(self) -> bool:
        """Whether surely nothing of the whole pages was written to since `begin`."""
        with _lock:
            try:
                return not (self._is_stale or self._kernel.is_written(self._start, self._size))
            except OSError:
                return False  # other memory is there now

    def _pass_on(self, start: int, end: int) -> None:
        """Tell the others who watch something of this memory that it counts as written."""
        for other in _watches:
            if other._start < end and start < other._start + other._size:
                other._is_stale = True

    def __del__(self) -> None:
        if hasattr(self, "_kernel") and self._kernel is _kernel:
            with _lock:
                with suppress(OSError, ValueError):  # it is not mapped any more
                    self._kernel.unregister(self._start, self._size)
                self._pass_on(self._start, self._start + self._size)

    def __repr__(self) -> str:
        return f"<Watch of {self._size} bytes at {self._start:#x}>"


_kernel: _Kernel | None = None
_pages: _Pages | None = None
_is_known = False  # whether there is one
_lock = threading.RLock()  # a watch may end while another one begins
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def watch(address: int, size: int) -> Watch | None:
    """A watch of this memory; None if that is not possible, or not worth it."""
    if size < WATCH_MIN:
        return None
    kernel = _find_kernel()
    if kernel is None or not _is_private(address, size):
        return None
    try:
        return Watch(kernel, address, size)
    except OSError:
        return None  # somebody else watches it, or it is of a kind that cannot be watched


def is_as_in_file(address: int, size: int) -> bool:
    """Whether surely nothing was written to this private mapping of a file:
    pages that were are the file's no more.
    """
    global _pages
    with _lock:
        try:
            if _pages is None:
                _pages = _Pages()
            return _pages.is_as_in_file(address, size)
        except (OSError, ImportError):
            return False


class _Pages:
    """What the kernel says of this process's pages.

    Raises:
        OSError: it does not say it.
    """

    def __init__(self) -> None:
        from fcntl import ioctl

        self._ioctl = ioctl
        self._found: Final = array("Q", bytes(_REGION_SIZE))
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def is_as_in_file(self, address: int, size: int) -> bool:
        end = -(-(address + size) // PAGE) * PAGE
        about = (_SCAN.size, 0, address, end, 0, self._found.buffer_info()[0], 1, 0)
        wanted = (_IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_FILE)  # not of the file
        question = bytearray(_SCAN.pack(*about, *wanted))
        found: int = self._ioctl(self._fd, _PAGEMAP_SCAN, question)
        return found == 0

    def close(self) -> None:
        os.close(self._fd)


def _find_kernel() -> _Kernel | None:
    global _kernel, _is_known
    with _lock:
        if not _is_known:
            _is_known = True
            with suppress(OSError, AttributeError, ImportError):
                kernel = _Kernel()
                if _works(kernel):
                    _kernel = kernel
                else:
                    kernel.close()
        return _kernel


def _forget_kernel() -> None:
    """In a forked child, where the descriptors still stand for the parent's memory."""
    global _kernel, _pages, _is_known, _lock
    for one in (_kernel, _pages):
        if one is not None:
            one.close()
    _kernel, _pages, _is_known, _lock = None, None, False, threading.RLock()
    _watches.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_kernel)


def _userfaultfd() -> int:
    """A descriptor of that kind, for which the standard library has no call.

    Raises:
        OSError: there is none.
    """
    import ctypes

    number = _SYSCALLS.get(platform.machine())
    is_wanted = os.environ.get("ACHILLES_WATCH_MEMORY", "1") != "0"
    if sys.platform != "linux" or number is None or sys.maxsize < 1 << 32 or not is_wanted:
        raise OSError("no userfaultfd here")
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return fd


def _works(kernel: _Kernel) -> bool:
    """Whether this kernel notes all that has to be: writes to small and to huge pages,
    and pages that are given back.
    """
    return all(_passes(kernel, advice) for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE))


def _passes(kernel: _Kernel, advice: int) -> bool:
    from ctypes import addressof, c_char

    with mmap.mmap(-1, _TEST_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with suppress(OSError):
            memory.madvise(advice)  # a kernel without huge pages does not know it
        memory.write(b"\1" * _TEST_SIZE)
        place = addressof(c_char.from_buffer(memory))
        middle = -place % _HUGE  # where a huge page can begin
        one = Watch(kernel, place, _TEST_SIZE)
        found = [one.begin(), one.is_untouched()]
        memory[middle + PAGE] = 2
        found += [not one.is_untouched(), one.begin(), one.is_untouched()]
        memory.madvise(mmap.MADV_DONTNEED, middle, _HUGE)
        found.append(not one.is_untouched())
        kernel.unregister(place, _TEST_SIZE)
        return all(found) and not one.is_untouched()


def _is_private(address: int, size: int) -> bool:
    """Whether all of it is memory of this process alone, and of no file."""
    at, end = address, address + size
    with open("/proc/self/maps", "rb") as lines:
        for line in lines:
            span, rights, _, _, inode, *_ = line.split(maxsplit=5)
            first, last = (int(number, 16) for number in span.split(b"-"))
            if first <= at < last:
                if rights[:2] != b"rw" or rights[3:4] != b"p" or inode != b"0":
                    return False
                at = last
                if at >= end:
                    return True
    return False
