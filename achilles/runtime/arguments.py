"""Large parts of calls that travel once, however many calls they are in,
and are referred to by number.

Rules
    1. What a task gets is the value at the call of `submit`. So ``bytes`` and ``str`` are known
       again by their identity (and kept alive while they are known); what can be written to
       (NumPy's arrays and the like) by its place and size in memory, and then its bytes are
       compared with those that were sent, unless the kernel knows that none was written since
       (`achilles.runtime.written`).
    2. Only what has `SHARE_MIN` bytes or more is looked at. Buffers come by themselves, from
       wherever they are in the arguments (pickle protocol 5); bytes and str are looked for near the
       top of them, once a large pickle was seen.
    3. A number stands for the same bytes for ever.
    4. What was given once is kept no longer than its tasks are unresolved; what was given again is
       kept after that, up to ``bytes_kept``, the latest uses first.
    5. Each task has the bytes for itself, to write to; see `achilles.runtime.shared.fresh`.

Why compare: the copy that was sent is there anyway, and comparing runs at the speed of memory. For
64 MiB, memcmp takes 4.4 ms, SHA-256 56 ms, BLAKE2b 99 ms, and another copy into a memfd 14 to 30
ms; what has changed is known at its first page. But 200 calls with one array are 200 comparisons,
so memory is watched: what is very large from its first call on, for as long as that runs, the rest
once it was found equal. What was found changed is not watched until it is found equal, so that
whoever writes to an array between any two calls pays for that once.

A payload that refers to others (all of the same call's function and arguments share one count of
numbers)::

    03, <I n>, (n+1) times <Q size>, n times <Q number>, the pickle,
    then those buffers whose number is 0, each aligned to 64

A number that is not 0 is that of the buffer, which is not here.
Persistent ids of the pickle are ``(kind, number)``.
"""

from __future__ import annotations

import threading
import weakref
from _struct import Struct
from collections import OrderedDict
from functools import lru_cache, partial
from io import BytesIO
from pickle import Pickler, Unpickler

from achilles.runtime import context
from achilles.runtime.seal import CALL_SIZE, TAG_SIZE
from achilles.runtime.serialize import (
    ALIGN,
    LARGE,
    SHARE_MIN,
    SHARING,
    Encoded,
    is_plain,
    keeper,
    lay_out,
    pickle_with,
)
from achilles.runtime.shared import Buffer, fresh, store
from achilles.runtime.written import Watch
from achilles.runtime.written import watch as watch

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    Store: TypeAlias = Callable[[Sequence[Buffer], int], bytes | memoryview]
    Resolve: TypeAlias = Callable[[int, int], Any]  # the kind and the number, to the object
    Key: TypeAlias = tuple[int, int]

BUFFER, BYTES, TEXT = 0, 1, 2  # the kinds of what is attached

FIRST_NUMBER = 1 << 32  # beyond those of functions and initializers
BYTES_KEPT = 256 << 20
ENTRIES_MAX = 1024
ATTACHED_MAX = 24  # to one payload; a group of tasks has at most 64, the function's among them
LOOK_DEPTH = 4  # from the pair of arguments and keywords down
LOOK_MAX = 64  # the members of a container that is looked into
SAMPLES = 32
WATCH_AT_ONCE = 16 << 20  # bytes; to compare them once takes some milliseconds

_COUNT = Struct("<BI")


class Shared:
    """Something large with its number; ``is_kept``: it is likely to come again."""

    __slots__ = ("is_kept", "number", "payload")

    def __init__(self, number: int, payload: memoryview, is_kept: bool) -> None:
        self.number = number
        self.payload = payload
        self.is_kept = is_kept

    def __repr__(self) -> str:
        return f"<Shared {self.number - FIRST_NUMBER}: {self.payload.nbytes} bytes>"


class Attached:
    """A payload, and what it refers to."""

    __slots__ = ("payload", "shared")

    def __init__(self, payload: bytes | memoryview, shared: tuple[Shared, ...]) -> None:
        self.payload = payload
        self.shared = shared

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(one.number for one in self.shared)


def join_attached(
    payload: bytes | memoryview | Attached, function: bytes | Attached
) -> tuple[bytes | memoryview, bytes | Attached, tuple[int, ...]]:
    """A call's payload and function, with what both refer to attached to the function;
    and its numbers, in order.
    """
    both: dict[int, Shared] = {}
    for one in (payload, function):
        if isinstance(one, Attached):
            both.update((shared.number, shared) for shared in one.shared)
    if isinstance(payload, Attached):
        payload = payload.payload
    if not both:
        return payload, function, ()
    data = function.payload if isinstance(function, Attached) else function
    numbers = tuple(sorted(both))
    return payload, Attached(data, tuple(map(both.__getitem__, numbers))), numbers


class _Entry:
    """What was sent of one place in memory, or of one object
    (which it keeps alive, to know it by its identity).
    """

    __slots__ = ("__weakref__", "kept", "number", "obj", "reference", "sample", "watch")

    def __init__(self, number: int, payload: memoryview, obj: bytes | str | None) -> None:
        self.number = number
        self.obj = obj
        self.kept: memoryview | None = None
        self.watch: Watch | None = None
        self.sample = _sample(payload)
        entry = weakref.ref(self)

        def let_go(_: object) -> None:
            this = entry()
            if this is not None:
                this.obj = this.watch = None

        self.reference = weakref.ref(payload, let_go)

    @property
    def payload(self) -> memoryview | None:
        """What was sent, if it is still there."""
        return self.kept if self.kept is not None else self.reference()

    def is_same(self, address: int, view: memoryview, payload: memoryview) -> bool:
        """Whether the memory of this entry's place still holds what was sent."""
        watching = self.watch
        if watching is None:
            watching = watch(address, view.nbytes)
        elif watching.is_untouched():
            return _has_same_ends(view, payload, watching)
        # What is written while they are compared counts as written since.
        self.watch = watching if watching is not None and watching.begin() else None
        return _is_equal(view, payload)


class ArgumentTable:
    """What large parts the calls of one executor have. Threads may share it.

    ``store`` makes the copies of them: in memory that can be handed on (`shared.store`), or not
    (`shared.copy`). ``is_far``: the calls are for other machines. ``is_sealed``: there is to be
    room for a seal behind what is stored.
    """

    def __init__(
        self,
        bytes_kept: int = BYTES_KEPT,
        *,
        store: Store = store,
        is_far: bool = False,
        is_sealed: bool = False,
    ) -> None:
        self._store = store
        self._rooms = (CALL_SIZE, TAG_SIZE) if is_sealed else (0, 0)
        self.is_far = is_far
        self.is_watching = False  # for bytes and str: there were large ones
        self.expects_buffers = False  # the last call that was encoded here had some to attach
        self._bytes_kept = bytes_kept
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._kept = 0
        self._last = FIRST_NUMBER - 1
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ArgumentTable {len(self._entries)} entries | {self._kept} bytes kept>"

    def has_large(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there are large bytes or str near the top of the arguments."""
        if not _find_large((args, kwargs)):
            return False
        self.is_watching = True
        return True

    def store_call(self, parts: Sequence[Buffer]) -> bytes | memoryview:
        """A copy of a large call's payload."""
        return self._store(parts, self._rooms[0])

    def encode(self, obj: object) -> Encoded | Attached:
        """A payload of ``obj``, as `achilles.runtime.serialize.encode` makes it,
        or one that refers to others.

        Raises:
            Exception: as `encode` does.
        """
        with context.Pickling(self.is_far):
            return self._encode(obj)

    def _encode(self, obj: object) -> Encoded | Attached:
        buffers: list[memoryview] = []
        shared: dict[int, Shared] = {}
        found = _find_large(obj)
        if found:
            ids = {id(one): self._attach_object(one, shared) for one in found[:ATTACHED_MAX]}
            data = _pickle_with_ids(obj, buffers, ids)
        else:
            data = pickle_with(obj, buffers)
        numbers = [self._attach_buffer(view, shared) for view in buffers]
        self.expects_buffers = any(numbers)
        if not shared:
            return lay_out(data, buffers) if buffers else data
        parts = _lay_out(data, buffers, numbers)
        is_large = sum(map(len, parts)) >= LARGE
        return Attached(
            self.store_call(parts) if is_large else b"".join(parts), tuple(shared.values())
        )

    def _attach_buffer(self, view: memoryview, shared: dict[int, Shared]) -> int:
        """The buffer's number, or 0 if it is not to be attached."""
        if view.nbytes < SHARE_MIN or len(shared) >= ATTACHED_MAX:
            return 0
        key = (_address(view), view.nbytes)
        with self._lock:
            entry = self._entries.get(key)
            payload = None if entry is None else entry.payload
            if entry is None or payload is None or not entry.is_same(key[0], view, payload):
                # Gone, but it looks as if it were the same again: this time it stays.
                is_again = entry is not None and not payload and entry.sample == _sample(view)
                watching = None
                if payload is None and view.nbytes >= WATCH_AT_ONCE:
                    watching = watch(*key)
                    if watching is not None and not watching.begin():
                        watching = None
                payload = memoryview(self._store([view], self._rooms[1]))
                entry = self._add(key, payload, None)
                entry.watch = watching
            else:
                is_again = True
            return self._note(key, entry, payload, is_again, shared)

    def _attach_object(self, obj: bytes | str, shared: dict[int, Shared]) -> tuple[int, int]:
        """The kind and the number of bytes or a str."""
        kind = BYTES if isinstance(obj, bytes) else TEXT
        key = (id(obj), -kind)
        with self._lock:
            entry = self._entries.get(key)
            payload = None if entry is None else entry.payload
            if entry is None or payload is None or entry.obj is not obj:
                data = obj if isinstance(obj, bytes) else obj.encode("utf-8", "surrogatepass")
                payload = memoryview(self._store([data], self._rooms[1]))
                is_again = entry is not None and entry.sample == _sample(memoryview(data))
                entry = self._add(key, payload, obj)
            else:
                is_again = True
            return kind, self._note(key, entry, payload, is_again, shared)

    def _add(self, key: Key, payload: memoryview, obj: bytes | str | None) -> _Entry:
        self._last += 1
        old = self._entries.get(key)
        if old is not None:
            self._let_go(old)
        elif len(self._entries) >= ENTRIES_MAX:
            self._let_go(self._entries.popitem(last=False)[1])
        entry = self._entries[key] = _Entry(self._last, payload, obj)
        return entry

    def _note(
        self,
        key: Key,
        entry: _Entry,
        payload: memoryview,
        is_again: bool,
        shared: dict[int, Shared],
    ) -> int:
        """Note one more use."""
        self._entries.move_to_end(key)
        if is_again and entry.kept is None:
            entry.kept = payload
            self._kept += payload.nbytes
            for other in self._entries.values():
                if self._kept <= self._bytes_kept:
                    break
                self._let_go(other)
        shared[entry.number] = Shared(entry.number, payload, entry.kept is not None)
        return entry.number

    def _let_go(self, entry: _Entry) -> None:
        """Keep its payload no longer than its tasks do."""
        if entry.kept is not None:
            self._kept -= entry.kept.nbytes
            entry.kept = None


# --- Finding and comparing ------------------------------------------------------------------------


def _find_large(obj: object) -> list[bytes | str]:
    found: dict[int, bytes | str] = {}
    _look(obj, LOOK_DEPTH, found)
    return list(found.values())


def _look(value: Any, depth: int, found: dict[int, bytes | str]) -> None:
    kind = type(value)
    if kind is bytes or kind is str:
        if len(value) >= SHARE_MIN:
            found[id(value)] = value
    elif depth:
        if kind is partial:
            _look(value.args, depth - 1, found)
            _look(value.keywords, depth - 1, found)
        elif (kind is tuple or kind is list or kind is dict) and len(value) <= LOOK_MAX:
            for member in value.values() if kind is dict else value:
                _look(member, depth - 1, found)


def _sample(view: memoryview) -> bytes:
    """Some of the bytes, to tell what is probably different."""
    return b"".join(view[at : at + 8] for at in range(0, len(view), max(1, len(view) // SAMPLES)))


def _address(view: memoryview) -> int:
    """Where its memory is."""
    import ctypes  # by its name: to import names from it takes longer than all else here

    if not view.readonly and view.nbytes:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))  # in a seventh of the time
    raw = (ctypes.c_byte * 256)()  # a Py_buffer, of 80 bytes, whose first member is the address
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(raw), 0)
    address = ctypes.c_void_p.from_buffer(raw).value
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(raw))
    return address or 0


def _has_same_ends(one: memoryview, other: memoryview, watching: Watch) -> bool:
    """Whether the bytes before and behind the watched pages are equal."""
    head, tail = watching.head, len(one) - watching.tail
    return bytes(one[:head]) == bytes(other[:head]) and bytes(one[tail:]) == bytes(other[tail:])


def _is_equal(one: memoryview, other: memoryview) -> bool:
    from ctypes import CDLL, c_size_t, c_void_p

    if one.nbytes != other.nbytes:
        return False
    places = c_void_p(_address(one)), c_void_p(_address(other))
    return CDLL(None).memcmp(*places, c_size_t(one.nbytes)) == 0  # type: ignore[no-any-return]


# --- The form -------------------------------------------------------------------------------------


def _pickle_with_ids(
    obj: object, buffers: list[memoryview], ids: dict[int, tuple[int, int]]
) -> bytes:
    """As `pickle_with`, with persistent ids in the place of these objects."""

    try:
        file = BytesIO()
        dumper = _Dumper(file, 5, buffer_callback=keeper(buffers))
        dumper.ids = ids
        dumper.dump(obj)
        if is_plain(file.getvalue()):
            return file.getvalue()
    except RecursionError:
        raise
    except Exception:
        pass  # cloudpickle can more; if it cannot, its error is as good
    from achilles.runtime import by_value

    return by_value.dumps(obj, keeper(buffers), ids=ids)


class _Dumper(Pickler):
    """Puts persistent ids in the place of objects whose `id` is among ``ids``."""

    ids: dict[int, tuple[int, int]]

    def persistent_id(self, one: Any) -> Any:
        return self.ids.get(id(one))


def _lay_out(data: bytes, buffers: list[memoryview], numbers: list[int]) -> list[Buffer]:
    sizes = [0 if number else view.nbytes for view, number in zip(buffers, numbers, strict=True)]
    head = _COUNT.pack(SHARING, len(buffers)) + _columns(len(sizes)).pack(
        len(data), *sizes, *numbers
    )
    parts: list[Buffer] = [head, data]
    at = len(head) + len(data)
    for view, number in zip(buffers, numbers, strict=True):
        if not number:
            padding = -at % ALIGN
            parts += (bytes(padding), view)
            at += padding + view.nbytes
    return parts


@lru_cache(ATTACHED_MAX)
def _columns(count: int) -> Struct:
    return Struct(f"<{2 * count + 1}Q")


def loads_attached(view: memoryview, resolve: Resolve) -> Any:
    """The value of a payload that refers to others.

    Raises:
        BaseException: whatever the objects' own methods raise, and ``resolve``.
    """
    _, count = _COUNT.unpack_from(view)
    columns = _columns(count)
    size, *rest = columns.unpack_from(view, _COUNT.size)
    at = _COUNT.size + columns.size
    data = view[at : at + size]
    at += size
    buffers: list[Buffer] = []
    for size, number in zip(rest[:count], rest[count:], strict=True):
        if number:
            buffers.append(resolve(BUFFER, number))
            continue
        at += -at % ALIGN
        part = view[at : at + size]
        buffers.append(bytearray(part) if part.readonly else part)
        at += size

    loader = _Loader(BytesIO(data), buffers=buffers)
    loader.resolve = resolve
    return loader.load()


class _Loader(Unpickler):
    """Puts what ``resolve`` finds in the place of persistent ids; one class for all, for to make one takes 15 µs."""

    resolve: Resolve

    def persistent_load(self, pid: Any) -> Any:
        return self.resolve(*pid)


def take(kind: int, payload: Buffer, behind: int = 0) -> Any:
    """What a task gets for the payload of something shared;
    ``behind`` it are so many bytes that are not of it.
    """
    if kind == BUFFER:
        buffer = fresh(payload)  # of memory that is mapped as a whole
        return memoryview(buffer)[: len(buffer) - behind] if behind else buffer
    view = memoryview(payload)[: len(payload) - behind]
    return bytes(view) if kind == BYTES else str(view, "utf-8", "surrogatepass")
