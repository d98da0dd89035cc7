"""Which bytes a function is sent as, and whether they were sent before.

Rules
    1. What runs is the function as it was at the call of `submit`: a redefined function, or a
       changed global that it uses, is seen.
    2. A function that travels by reference
       (importable, of no module that is the program's own) is pickled once.
    3. One that travels by value is pickled once per *fingerprint*: all that its pickle depends on,
       compared by identity. What can change without becoming another object (a list, an instance)
       has no fingerprint, and what depends on it is pickled at each call. A class of the program
       has one if all of its methods have, and its attributes.
    4. Functions that are likely to come again get a number, under which workers keep them. A small
       one that may be used only once travels with its call.
"""

from __future__ import annotations

import abc
import dis
import functools
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
)
from typing import (
    Any,
    ForwardRef,
    NamedTuple,
    NewType,
    Protocol,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
)

from achilles.runtime.arguments import ArgumentTable, Attached
from achilles.runtime.program import is_own
from achilles.runtime.serialize import (
    by_value_modules,
    describe,
    dumps,
    is_stateless,
)

Pickled: TypeAlias = "bytes | Attached"

INLINE_MAX = 2048
HEAVY, HEAVY_TIMES = (
    100_000,
    10,
)  # bytes of a function that is pickled at each call, and how often that is borne in silence
NUMBERS_MAX = 4096  # pickles whose numbers are remembered
ENTRIES_MAX = 4096
WATCHES_MAX = 64  # functions that one fingerprint covers
DEPTH_MAX = 4  # of tuples in tuples

_LOG = logging.getLogger("achilles.client")

_ABSENT: Any = object()
_FIXED_TYPES = {
    *(bool, int, float, complex, str, bytes, range),
    *(type(None), type(...), type(NotImplemented)),
}
_METACLASSES = (type, abc.ABCMeta)
_DESCRIPTORS = (
    *(GetSetDescriptorType, MemberDescriptorType),
    type(NamedTuple("_Fields", [("one", int)]).one),  # type: ignore[attr-defined]
)
SLOT_NAMES = "__slotnames__"  # which copyreg puts into a class when the first instance is pickled
# Dictionaries and the like that the language and its libraries make of a class,
# and leave as they are.
_MACHINERY = {
    *("__abstractmethods__", "__annotations__", "__annotations_cache__", "__dataclass_fields__"),
    *("__dataclass_params__", "__orig_bases__", "__parameters__", "__type_params__"),
    "_field_defaults",
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
        self._heavy: dict[str, int] = {}  # by function, how often it was pickled

    def __repr__(self) -> str:
        return f"<FunctionTable {len(self._entries)} functions, {len(self._numbers)} numbers>"

    def encode(self, fn: Callable[..., Any], shared: bool = False) -> tuple[int, Pickled]:
        """The function's number and pickle; number 0: it is to travel with its call.

        ``shared`` says that many calls will use it, so that it gets a number at once. A number
        stands for the same bytes for ever. Large parts of it may be attached.

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
        """What tells whether the last answer for a function still holds; None:
        it holds for no other call.
        """
        return self._entries.get(id(fn))

    def _encode(self, fn: Callable[..., Any], shared: bool) -> tuple[int, Pickled]:
        _check(fn)
        modules = set(by_value_modules())
        watches = fingerprint(fn)  # before it is pickled, so that what changes meanwhile is seen
        try:
            pickled = self._pickle(fn)
        except (Exception, SystemExit) as error:
            from achilles.runtime.blame import function_error

            is_far = self.arguments is not None and self.arguments.is_far
            raise function_error(fn, error, is_far=is_far) from error
        data = bytes_of(pickled)
        if watches is None and len(data) >= HEAVY:
            self._warn_of_weight(fn, len(data))
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

    def _warn_of_weight(self, fn: Callable[..., Any], size: int) -> None:
        """Say once what makes each `submit` slow, where it does so again and again."""
        name = describe(fn)
        times = self._heavy[name] = self._heavy.get(name, 0) + 1
        if times == HEAVY_TIMES:
            _LOG.warning(
                "%s is sent anew at each submit, with %d kB of what it refers to, for that may have changed: "
                "give it to tasks once, by map, an initializer or an imported module",
                name,
                size // 1000,
            )

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
        watches: list[Watch],
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


class Watch(Protocol):
    """Part of a fingerprint."""

    def holds(self) -> bool:
        """Whether everything is the same object as before."""


class _Watch:
    """All that the pickle of one function that travels by value depends on.

    Functions are held weakly, and cells and namespaces not at all: a function that is reachable
    from there must not be kept alive by its own entry.
    """

    __slots__ = (
        *(
            "annotations",
            "attributes",
            "closure",
            "code",
            "defaults",
            "functions",
            "kwdefaults",
            "modules",
        ),
        *("reference", "values"),
    )

    def __init__(self, fn: FunctionType) -> None:
        self.reference = weakref.ref(fn)
        self.code = fn.__code__
        self.defaults = fn.__defaults__
        self.kwdefaults = _items(fn.__kwdefaults__)
        self.annotations = _items(fn.__annotations__)
        self.attributes = _items(fn.__dict__)
        self.values: list[tuple[str, Any]] = []
        self.functions: list[tuple[str, weakref.ref[Any]]] = []  # and classes
        self.closure: list[Any] = []  # the contents of its cells
        self.modules = 0  # how many are loaded, if that matters

    def holds(self) -> bool:
        """Whether everything is the same object as before."""
        fn = self.reference()
        if (
            fn is None
            or fn.__code__ is not self.code
            or fn.__defaults__ is not self.defaults
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
        mapping = fn.__dict__
        if (mapping or self.attributes) and not _is_same(mapping, self.attributes):
            return False
        mapping = fn.__annotations__
        return not (mapping or self.annotations) or _is_same(mapping, self.annotations)


class _ClassWatch:
    """The same of one class, which is held weakly, too."""

    __slots__ = ("bases", "fixed", "ids", "parts", "reference", "registry", "size", "weak")

    def __init__(self, cls: type) -> None:
        self.reference = weakref.ref(cls)
        self.bases = cls.__bases__
        self.size = len(vars(cls)) - (SLOT_NAMES in vars(cls))
        # What `register` was called for is in there, and nothing else tells.
        self.registry = abc.get_cache_token() if isinstance(cls, abc.ABCMeta) else None
        self.parts: list[tuple[str, type, list[weakref.ref[Any]]]] = []  # of descriptors
        self.fixed: list[tuple[str, Any]] = []
        self.weak: list[tuple[str, weakref.ref[Any]]] = []
        self.ids: list[tuple[str, int]] = []  # of what is replaced, if it is, and does not change

    def holds(self) -> bool:
        """Whether everything is the same object as before."""
        cls = self.reference()
        if cls is None or cls.__bases__ != self.bases:
            return False
        if self.registry is not None and self.registry != abc.get_cache_token():
            return False
        members = vars(cls)
        if len(members) - (SLOT_NAMES in members) != self.size:
            return False
        get = members.get
        for name, value in self.fixed:
            if get(name, _ABSENT) is not value:
                return False
        for name, reference in self.weak:
            if get(name, _ABSENT) is not reference():
                return False
        for name, kind, references in self.parts:
            value = get(name, _ABSENT)
            if type(value) is not kind or not _are_same(_parts(value), references):
                return False
        for name, number in self.ids:  # noqa: SIM110 - a generator would take as long as the rest
            if id(get(name, _ABSENT)) != number:
                return False
        return True


def _are_same(values: list[Any], references: list[weakref.ref[Any]]) -> bool:
    return len(values) == len(references) and all(
        value is reference() for value, reference in zip(values, references)
    )


def fingerprint(fn: object) -> list[Watch] | None:
    """The fingerprint of a function, or of a class of the program; None if it has none."""
    if not isinstance(fn, FunctionType) and not _is_programs(fn):
        return [] if is_stateless(fn) and _is_importable(fn) else None
    watches: list[Watch] = []
    seen: set[object] = set()
    waiting: list[Any] = [fn]
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        watch: Watch | None
        if isinstance(found, type):
            watch = _watch_class(found, waiting)
        else:
            watch = _watch_one(found, waiting)
        if watch is None or len(watches) >= WATCHES_MAX:
            return None
        watches.append(watch)
    return watches


def _is_programs(value: object) -> bool:
    """Whether it is a class that travels by value, of a kind that can be watched."""
    return (
        isinstance(value, type)
        and type(value) in _METACLASSES
        and is_own(getattr(value, "__module__", None))
    )


def _watch_class(cls: type, waiting: list[Any]) -> _ClassWatch | None:
    """Watch a class, except for what it is made of: that is appended to ``waiting``."""
    watch = _ClassWatch(cls)
    for base in cls.__bases__:
        if _is_programs(base):
            waiting.append(base)
        elif not _is_importable(base):
            return None
    for name, value in vars(cls).items():
        if name == SLOT_NAMES:
            continue
        if _is_fixed(value):
            watch.fixed.append((name, value))
        elif isinstance(value, FunctionType) or _is_programs(value):
            watch.weak.append((name, weakref.ref(value)))
            waiting += _without_wrapper(value)
        elif isinstance(value, classmethod | staticmethod | property | functools.cached_property):
            parts = _parts(value)
            if not all(isinstance(part, FunctionType) for part in parts):
                return None
            watch.parts.append((name, type(value), [weakref.ref(part) for part in parts]))
            waiting += parts
        elif isinstance(value, _DESCRIPTORS) or name == "_abc_impl":
            watch.ids.append((name, id(value)))
        elif name in _MACHINERY:
            classes = _classes_in(value)
            if classes is None:
                return None
            waiting += classes
            watch.ids.append((name, id(value)))
        else:
            return None
    return watch


def _classes_in(value: Any, depth: int = 2 * DEPTH_MAX) -> list[Any] | None:
    """The program's classes and functions in annotations, or in what `dataclasses` and `typing`
    keep of a class; None: there may be others.
    """
    if _is_programs(value) or (isinstance(value, FunctionType) and not _is_importable(value)):
        return [value]
    if _is_fixed(value) or value is type(None) or isinstance(value, ForwardRef):
        return []
    if not depth:
        return None
    parts: Iterable[Any]
    if type(value) is dict:
        parts = value.values()
    elif type(value) is tuple or type(value) is list:
        parts = value
    elif type(value).__module__ == "dataclasses":
        parts = [value.type, value.default, value.default_factory]
    elif (origin := get_origin(value)) is not None:
        parts = [origin, *get_args(value)]
    elif isinstance(value, TypeVar):
        parts = [value.__bound__, *value.__constraints__]
    elif isinstance(value, NewType):
        parts = [value.__supertype__]
    elif type(value).__module__ == "typing":
        parts = []  # Union and the like
    else:
        return None
    found: list[Any] = []
    for part in parts:
        classes = _classes_in(part, depth - 1)
        if classes is None:
            return None
        found += classes
    return found


def _parts(value: Any) -> list[Any]:
    """The functions that a descriptor calls."""
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    return [value.func if isinstance(value, functools.cached_property) else value.__func__]


@functools.cache
def _repr_codes() -> set[CodeType]:
    """What a dataclass wraps its `__repr__` in, which has a set of what is being shown:
    it is no part of it.
    """
    import dataclasses
    import reprlib

    wraps = reprlib.recursive_repr(), getattr(dataclasses, "_recursive_repr", None)
    return {wrap(lambda self: "").__code__ for wrap in wraps if wrap is not None}


def _without_wrapper(value: Any) -> list[Any]:
    """A function, or what a dataclass has put its wrapper around."""
    if isinstance(value, FunctionType) and value.__code__ in _repr_codes():
        contents = [_content(cell) for cell in value.__closure__ or ()]
        return [content for content in contents if isinstance(content, FunctionType)]
    return [value]


def _watch_one(fn: FunctionType, waiting: list[Any]) -> _Watch | None:
    """Watch a function, except for those that it uses: they are appended to ``waiting``."""
    watch = _Watch(fn)
    named = (*watch.kwdefaults, *watch.attributes)
    if not _is_fixed(fn.__defaults__) or not all(_is_fixed(value) for _, value in named):
        return None
    for name in global_names(fn.__code__):
        value = fn.__globals__.get(name, _ABSENT)
        if _is_programs(value) or (isinstance(value, FunctionType) and not _is_importable(value)):
            watch.functions.append((name, weakref.ref(value)))
            waiting.append(value)
        elif value is _ABSENT or _is_fixed(value):
            watch.values.append((name, value))
        else:
            return None
        if isinstance(value, ModuleType) and hasattr(value, "__path__"):
            # cloudpickle sends those of its submodules along that are loaded.
            watch.modules = len(sys.modules)
    for _, value in watch.annotations:
        waiting += _classes_in(value) or []
    for cell in fn.__closure__ or ():
        value = _content(cell)
        if _is_programs(value) or (isinstance(value, FunctionType) and not _is_importable(value)):
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
    if type(value).__module__ == "dataclasses" and not hasattr(value, "default_factory"):
        return True  # MISSING and the like
    if type(value) in (tuple, frozenset):
        return depth > 0 and all(_is_fixed(member, depth - 1) for member in value)  # type: ignore[attr-defined]
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value and not _is_by_value(value.__name__)
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, type):
        return _is_importable(value.__self__)  # tuple.__new__
    return is_stateless(value) and _is_importable(value)


def _is_importable(value: Any) -> bool:
    """Whether a function or class is found by its name, in a module that the other process has."""
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or _is_by_value(module):
        return False
    found: Any = sys.modules.get(module)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _is_by_value(module: str) -> bool:
    """Whether the module is the program's own, or it, or a package that it is in,
    was registered to travel by value.
    """
    return is_own(module) or any(
        module == name or module.startswith(f"{name}.") for name in by_value_modules()
    )


_names: weakref.WeakKeyDictionary[CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def global_names(code: CodeType) -> tuple[str, ...]:
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
