"""Which bytes a function is sent as, and whether they were sent before.

Rules
    1. What runs is the function as it was at the call of `submit`: a redefined function, or a changed global that
       it uses, is seen.
    2. A function that travels by reference (importable, not of ``__main__``) is pickled once.
    3. One that travels by value is pickled once per *fingerprint*: all that its pickle depends on, compared by
       identity. What can change without becoming another object (a list, an instance) has no fingerprint, and what
       depends on it is pickled at each call.
    4. Functions that are likely to come again get a number, under which workers keep them. A small one that may
       be used only once travels with its call.
"""

from __future__ import annotations

import dis
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

from achilles.runtime.arguments import ArgumentTable, Attached
from achilles.runtime.serialize import (
    by_value_modules,
    describe,
    dumps,
    is_stateless,
    why,
)

Pickled: TypeAlias = "bytes | Attached"

INLINE_MAX = 2048
NUMBERS_MAX = 4096  # pickles whose numbers are remembered
ENTRIES_MAX = 4096
WATCHES_MAX = 64  # functions that one fingerprint covers
DEPTH_MAX = 4  # of tuples in tuples

_ABSENT: Any = object()
_FIXED_TYPES = {
    *(bool, int, float, complex, str, bytes, range),
    *(type(None), type(...), type(NotImplemented)),
}
_GLOBAL_OPS = {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"}
_ASYNC_FLAGS = 0x80 | 0x200  # coroutine functions and asynchronous generators


class FunctionTable:
    """The functions of one executor. Not thread-safe: the caller holds a lock."""

    def __init__(self, arguments: ArgumentTable | None = None) -> None:
        self.arguments = arguments  # what large parts of functions are shared with
        self._entries: dict[int, Entry] = {}  # by id of the function, while it lives
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # by digest of the pickle
        self._last = 0

    def __repr__(self) -> str:
        return f"<FunctionTable {len(self._entries)} functions, {len(self._numbers)} numbers>"

    def encode(self, fn: Callable[..., Any], shared: bool = False) -> tuple[int, Pickled]:
        """The function's number and pickle; number 0: it is to travel with its call.

        ``shared`` says that many calls will use it, so that it gets a number at once. A number stands for the
        same bytes for ever. Large parts of it may be attached.

        Raises:
            ArgumentPickleError: the function cannot be pickled.
            TypeError: it is not callable, or is a coroutine function.
        """
        entry = self._entries.get(id(fn))
        if entry is not None and entry.is_valid(fn):
            if not entry.answer[0]:
                entry.answer = (self._number(bytes_of(entry.answer[1])), entry.answer[1])
            return entry.answer
        return self._encode(fn, shared)

    def entry(self, fn: Callable[..., Any]) -> Entry | None:
        """What tells whether the last answer for a function still holds; None: it holds for no other call."""
        return self._entries.get(id(fn))

    def _encode(self, fn: Callable[..., Any], shared: bool) -> tuple[int, Pickled]:
        _check(fn)
        modules = set(by_value_modules())
        watches = _watch(fn)  # before it is pickled, so that what changes meanwhile is seen
        try:
            pickled = self._pickle(fn)
        except (Exception, SystemExit) as error:
            from achilles.task_errors import ArgumentPickleError

            raise ArgumentPickleError(
                f"{describe(fn)} cannot be pickled: {why(error)}; nothing was sent. Functions are sent with all that they "
                "refer to: pass it as an argument, or make it in the task"
            ) from error
        data = bytes_of(pickled)
        if is_stateless(fn) and _is_importable(fn):
            watches = []  # it is found by its name, whatever happens to it here
            shared = True
        is_numbered = shared or len(data) > INLINE_MAX
        answer = (self._number(data) if is_numbered else 0, pickled)
        if watches is not None:
            if len(self._entries) >= ENTRIES_MAX:
                self._entries.clear()
            self._entries[id(fn)] = Entry(self._entries, fn, watches, modules, answer)
        return answer

    def _pickle(self, fn: Callable[..., Any]) -> Pickled:
        if self.arguments is None:
            return dumps(fn)
        encoded = self.arguments.encode(fn)
        if isinstance(encoded, Attached):
            return Attached(bytes(encoded.payload), encoded.shared)
        return encoded if isinstance(encoded, bytes) else b"".join(encoded)

    def _number(self, data: bytes) -> int:
        digest = blake2b(data, digest_size=16).digest()
        number = self._numbers.get(digest)
        if number is None:
            self._last += 1
            number = self._numbers[digest] = self._last
            if len(self._numbers) > NUMBERS_MAX:
                self._numbers.popitem(last=False)
        else:
            self._numbers.move_to_end(digest)
        return number


def bytes_of(pickled: Pickled) -> bytes:
    """The function's pickle without what is attached to it."""
    return pickled if type(pickled) is bytes else bytes(pickled.payload)  # type: ignore[union-attr]


def _check(fn: object) -> None:
    if not callable(fn):
        raise TypeError(
            f"a callable is needed, not {type(fn).__name__}; its arguments come behind it: submit(f, x)"
        )
    if isinstance(fn, FunctionType) and fn.__code__.co_flags & _ASYNC_FLAGS:
        raise TypeError(
            f"{describe(fn)} is a coroutine function; achilles runs plain callables, which may call asyncio.run"
        )


class Entry:
    """The answer for one function object, and what it depends on."""

    __slots__ = ("answer", "modules", "reference", "watches")

    def __init__(
        self,
        entries: dict[int, Entry],
        fn: Callable[..., Any],
        watches: list[_Watch],
        modules: set[str],
        answer: tuple[int, Pickled],
    ) -> None:
        key = id(fn)
        self.reference = weakref.ref(fn, lambda _: entries.pop(key, None))
        self.watches = watches
        self.modules = modules  # registered to be pickled by value
        self.answer = answer

    def is_valid(self, fn: Callable[..., Any]) -> bool:
        """Whether ``fn`` is that function, and its pickle would be the same."""
        if self.reference() is not fn:
            return False
        modules = by_value_modules()
        if (modules or self.modules) and modules != self.modules:
            return False
        for watch in self.watches:  # noqa: SIM110 - a generator would take as long as the rest
            if not watch.holds():
                return False
        return True


# --- Fingerprints ---------------------------------------------------------------------------------


class _Watch:
    """All that the pickle of one function that travels by value depends on.

    Functions are held weakly, and cells and namespaces not at all: a function that is reachable from there
    must not be kept alive by its own entry.
    """

    __slots__ = (
        *("annotations", "closure", "code", "defaults", "functions", "kwdefaults", "modules"),
        *("reference", "values"),
    )

    def __init__(self, fn: FunctionType) -> None:
        self.reference = weakref.ref(fn)
        self.code = fn.__code__
        self.defaults = fn.__defaults__
        self.kwdefaults = _items(fn.__kwdefaults__)
        self.annotations = _items(fn.__annotations__)
        self.values: list[tuple[str, Any]] = []
        self.functions: list[tuple[str, weakref.ref[FunctionType]]] = []
        self.closure: list[Any] = []  # the contents of its cells
        self.modules = 0  # how many are loaded, if that matters

    def holds(self) -> bool:
        """Whether everything is the same object as before."""
        fn = self.reference()
        if (
            fn is None
            or fn.__code__ is not self.code
            or fn.__defaults__ is not self.defaults
            or fn.__dict__
            or (self.modules and self.modules != len(sys.modules))
        ):
            return False
        get = fn.__globals__.get
        for name, value in self.values:
            if get(name, _ABSENT) is not value:
                return False
        for name, function in self.functions:
            if get(name, _ABSENT) is not function():
                return False
        if self.closure:
            for cell, value in zip(fn.__closure__ or (), self.closure):
                if _content(cell) is not (value() if type(value) is weakref.ref else value):
                    return False
        mapping = fn.__kwdefaults__
        if (mapping or self.kwdefaults) and not _is_same(mapping, self.kwdefaults):
            return False
        mapping = fn.__annotations__
        return not (mapping or self.annotations) or _is_same(mapping, self.annotations)


def _watch(fn: object) -> list[_Watch] | None:
    """The fingerprint of a function; None if it has none."""
    if not isinstance(fn, FunctionType):
        return [] if is_stateless(fn) and _is_importable(fn) else None
    watches: list[_Watch] = []
    seen: set[FunctionType] = set()
    waiting = [fn]
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        watch = _watch_one(found, waiting)
        if watch is None or len(watches) >= WATCHES_MAX:
            return None
        watches.append(watch)
    return watches


def _watch_one(fn: FunctionType, waiting: list[FunctionType]) -> _Watch | None:
    """Watch a function, except for those that it uses: they are appended to ``waiting``."""
    watch = _Watch(fn)
    if fn.__dict__:
        return None
    if not _is_fixed(fn.__defaults__) or not all(_is_fixed(v) for _, v in watch.kwdefaults):
        return None
    for name in _global_names(fn.__code__):
        value = fn.__globals__.get(name, _ABSENT)
        if isinstance(value, FunctionType) and not _is_importable(value):
            watch.functions.append((name, weakref.ref(value)))
            waiting.append(value)
        elif value is _ABSENT or _is_fixed(value):
            watch.values.append((name, value))
        else:
            return None
        if isinstance(value, ModuleType) and hasattr(value, "__path__"):
            # cloudpickle sends those of its submodules along that are loaded.
            watch.modules = len(sys.modules)
    for cell in fn.__closure__ or ():
        value = _content(cell)
        if isinstance(value, FunctionType) and not _is_importable(value):
            watch.closure.append(weakref.ref(value))
            waiting.append(value)
        elif value is _ABSENT or _is_fixed(value):
            watch.closure.append(value)
        else:
            return None
    return watch


def _is_fixed(value: object, depth: int = DEPTH_MAX) -> bool:
    """Whether the pickle of ``value`` can only change if it becomes another object."""
    if type(value) in _FIXED_TYPES:
        return True
    if getattr(type(value), "_is_pickled_by_identity", False):
        return True  # an executor
    if type(value) in (tuple, frozenset):
        return depth > 0 and all(_is_fixed(member, depth - 1) for member in value)  # type: ignore[attr-defined]
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value and not _is_by_value(value.__name__)
    return is_stateless(value) and _is_importable(value)


def _is_importable(value: Any) -> bool:
    """Whether a function or class is found by its name, in a module that the other process has."""
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or module == "__main__" or _is_by_value(module):
        return False
    found: Any = sys.modules.get(module)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _is_by_value(module: str) -> bool:
    """Whether the module, or a package that it is in, was registered to travel by value."""
    return any(module == name or module.startswith(f"{name}.") for name in by_value_modules())


_names: weakref.WeakKeyDictionary[CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that a function names, in functions inside it as well."""
    names = _names.get(code)
    if names is None:
        names = _names[code] = tuple(sorted(set(_find_global_names(code))))
    return names


def _find_global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBAL_OPS:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _find_global_names(constant)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT  # a variable without a value, so far


def _items(mapping: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(mapping.items()) if mapping else ()


def _is_same(mapping: Mapping[str, Any] | None, items: tuple[tuple[str, Any], ...]) -> bool:
    if not mapping:
        return not items
    return len(mapping) == len(items) and all(
        mapping.get(name, _ABSENT) is value for name, value in items
    )
