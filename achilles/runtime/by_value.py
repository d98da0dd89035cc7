"""Functions and classes of the program, which travel by value, as if the other process had the program.

cloudpickle takes them apart and puts them together. This module sees to what it leaves open: what they share with each other,
and with those that were there before.

Rules
    1. A runner has the program's ``__main__`` as a module: all functions of it that came there have its globals. So what an
       initializer or a task sets, the tasks after it see, as in a process of `multiprocessing`.
    2. A task sees its globals as they were at the call of `submit`, but for what was set on its runner. So a global has a
       *token*, which changes with its value: where it is the one that came before, what is there stays. Where it is another,
       there is a new module from then on, with that value and all else as in the last one; functions that came before keep theirs.
    3. A class is made once in each process; of one that is there its state is set again if its token changed.
    4. What a task returns changes nothing of the program: its own classes and functions are found again, not made.

A token is compared with tokens only, by whoever runs the task; it is made by whoever submits it. That of a function is a
number for the function object, that of a class its content's, and that of a value its pickle's hash. There is none for what is
large: that comes anew each time.
"""

from __future__ import annotations

import itertools
import marshal
import os
import pickle
import sys
import threading
import uuid
import weakref
from collections.abc import Callable
from hashlib import blake2b
from io import BytesIO
from pickle import PickleBuffer
from struct import Struct
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from cloudpickle import Pickler as CloudPickler
from cloudpickle import cloudpickle

from achilles.runtime import context
from achilles.runtime.functions import Watch, fingerprint
from achilles.runtime.reducers import MAIN, reducer
from achilles.runtime.serialize import LARGE

NAMESPACES_MAX = 8  # of one client: those beyond are not found again
_LENGTH = Struct("<I")

_function_tokens: weakref.WeakKeyDictionary[FunctionType, tuple[tuple[int, ...], str]]
_function_tokens = weakref.WeakKeyDictionary()
_process = uuid.uuid4().hex
_numbers = itertools.count(1)


class _Large(Exception):
    """A value is too large for a token."""


def dumps(
    obj: object,
    buffer_callback: Callable[[PickleBuffer], bool] | None = None,
    *,
    is_result: bool = False,
    ids: dict[int, tuple[int, int]] | None = None,
) -> bytes:
    """A pickle of ``obj`` with what is not importable by value; of a call or function, or of a result.

    ``ids`` are persistent ids, by the ids of objects.

    Raises:
        Exception: whatever the pickler or the object's own methods raise.
    """
    file = BytesIO()
    kind = _Pickler if ids is None else _PicklerWithIds
    pickler = kind(file, buffer_callback, is_result=is_result)
    pickler.ids = ids or {}
    pickler.dump(obj)
    return pickler.prefix() + file.getvalue()


# --- Taken apart ----------------------------------------------------------------------------------


class _Scope:
    """The globals of a ``__main__``, as functions that travel refer to them."""

    def __init__(self, number: int, base: dict[str, Any]) -> None:
        self.number = number
        self.base = base
        self.tokens: dict[str, str | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace, (self.number, self.base)


class _Pickler(CloudPickler):  # type: ignore[misc]
    """cloudpickle's, with makers and setters of ours for functions and classes."""

    def __init__(
        self,
        file: BytesIO,
        buffer_callback: Callable[[PickleBuffer], bool] | None,
        *,
        is_result: bool,
    ) -> None:
        super().__init__(file, 5, buffer_callback)
        self.is_result = is_result
        self.scopes: dict[int, _Scope] = {}
        self.whole: type | None = None  # a class that is to be taken apart here
        self.ids: dict[int, tuple[int, int]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if (reduce := reducer(obj)) is not None:
            return reduce(obj)
        if isinstance(obj, type) and obj.__module__ == MAIN and self.whole is None:
            kept = _pickle_of(obj, self.is_result)
            if kept is not None:
                return self._refer_to_class(kept)
        reduced = super().reducer_override(obj)
        if type(reduced) is tuple and len(reduced) == 6:
            if reduced[5] is cloudpickle._function_setstate:
                return self._reduce_function(obj, reduced[1], reduced[2])
            if reduced[5] is cloudpickle._class_setstate:
                is_enum = reduced[0] is cloudpickle._make_skeleton_enum
                return self._reduce_class(obj, is_enum, reduced[1], reduced[2][0])
        return reduced

    def prefix(self) -> bytes:
        """What is unpickled first: the tokens, which choose the module. It leaves nothing on the stack, and in the memo."""
        if not self.scopes:
            return b""
        tokens = [(scope.number, sorted(scope.tokens.items())) for scope in self.scopes.values()]
        data = marshal.dumps(tokens, 2)  # without references, so that the same is the same bytes
        name = f"c{__name__}\nbegin\n".encode()
        return b"".join((b"\x80\x05", name, b"B", _LENGTH.pack(len(data)), data, b"\x85R0"))

    def _reduce_function(self, fn: FunctionType, args: Any, state: Any) -> tuple[Any, ...]:
        code, base, *rest = args
        slots = state[1]
        if self.is_result:
            args = (fn.__module__, fn.__qualname__, code, base, *rest)
            return find_function, args, state, None, None, set_new_function
        token = _function_token(fn)
        if fn.__globals__.get("__name__") == MAIN:
            key = id(fn.__globals__)
            record = _records.get(key)
            scope = self.scopes.get(key)
            if scope is None:
                number = key if record is None else record.scope
                scope = self.scopes[key] = _Scope(number, base)
            slots["__globals__"] = _with_tokens(slots["__globals__"], scope, record)
            args = (code, scope, *rest)
        return make_function, (token, *args), state, None, None, set_function

    def _refer_to_class(self, kept: _ClassPickle) -> tuple[Any, ...]:
        for key, number, base, tokens in kept.scopes:
            scope = self.scopes.setdefault(key, _Scope(number, base))
            for name, token in tokens.items():
                scope.tokens.setdefault(name, token)
        return own_class if self.is_result else known_class, (kept.token, kept.data)

    def _reduce_class(
        self, cls: type, is_enum: bool, args: Any, state: dict[str, Any]
    ) -> tuple[Any, ...]:
        slots = [name for name, value in state.items() if _is_slot(value, cls)]
        for name in slots:
            del state[name]
        if not is_enum:
            kind, name, bases, more, *rest = args
            more = {**more, "__qualname__": cls.__qualname__}
            if "__slots__" in state and (
                slots or not issubclass(cls, tuple)
            ):  # a NamedTuple adds ()
                more["__slots__"] = _slots_of(cls)
            args = (kind, name, bases, more, *rest)
        if self.is_result:
            return make_class, (is_enum, *args), state, None, None, set_new_class
        try:
            token = _token(state)
        except Exception:
            token = None
        return make_class, (is_enum, *args), (state, token), None, None, set_class


class _ClassPickle(NamedTuple):
    """A class as it was taken apart once, and what it is put together with: the scopes of its functions."""

    token: str
    data: bytes
    scopes: list[tuple[int, int, dict[str, Any], dict[str, str | None]]]
    watches: list[Watch]


_class_pickles: weakref.WeakKeyDictionary[type, dict[bool, _ClassPickle]]
_class_pickles = weakref.WeakKeyDictionary()


def _pickle_of(cls: type, is_result: bool) -> _ClassPickle | None:
    """What is kept of a class, as it is now; None if its changes cannot be told."""
    kept = _class_pickles.get(cls, {}).get(is_result)
    if kept is not None and all(watch.holds() for watch in kept.watches):
        return kept
    watches = fingerprint(cls)  # before it is pickled, so that what changes meanwhile is seen
    if watches is None:
        return None
    file = BytesIO()
    pickler = _Pickler(file, None, is_result=is_result)
    pickler.whole = cls
    pickler.dump(cls)
    scopes = [(key, one.number, one.base, one.tokens) for key, one in pickler.scopes.items()]
    kept = _ClassPickle(f"{_process}-{next(_numbers)}", file.getvalue(), scopes, watches)
    _class_pickles.setdefault(cls, {})[is_result] = kept
    return kept


class _PicklerWithIds(_Pickler):
    def persistent_id(self, one: Any) -> Any:
        return self.ids.get(id(one))


def _with_tokens(
    values: dict[str, Any], scope: _Scope, record: _Namespace | None
) -> dict[str, Any]:
    """The globals that are to travel; their tokens are noted in ``scope``."""
    travelling = {}
    for name, value in values.items():
        if name not in scope.tokens:
            try:
                scope.tokens[name] = _value_token(value)
            except Exception:
                if record is not None:
                    continue  # made on this runner, as an initializer makes one on each
                scope.tokens[name] = None
        travelling[name] = value
    return travelling


def _is_slot(value: object, cls: type) -> bool:
    return isinstance(value, MemberDescriptorType) and value.__objclass__ is cls


def _slots_of(cls: type) -> Any:
    given = cls.__dict__["__slots__"]
    if isinstance(given, str | tuple | list | dict):
        return given
    return tuple(name for name, value in vars(cls).items() if _is_slot(value, cls))


# --- Tokens ---------------------------------------------------------------------------------------


def _value_token(value: object) -> str | None:
    """Raises whatever the pickler does, where the value cannot be pickled."""
    if isinstance(value, FunctionType) and cloudpickle._should_pickle_by_reference(value) is False:
        return _function_token(value)
    if isinstance(value, bytes | str) and len(value) >= LARGE:
        return None
    try:
        return _token(value)
    except _Large:
        return None


def _function_token(fn: FunctionType) -> str | None:
    """A number for the function object, and what can change of it without another."""
    facts = _facts(fn)
    known = _function_tokens.get(fn)
    if known is None or known[0] != facts:
        known = _function_tokens[fn] = (facts, f"{_process}-{next(_numbers)}")
    if not fn.__closure__ and not fn.__dict__:
        return known[1]
    try:
        cells = [cloudpickle._get_cell_contents(cell) for cell in fn.__closure__ or ()]
        return f"{known[1]}-{_token((cells, fn.__dict__))}"
    except Exception:
        return None


def _facts(fn: FunctionType) -> tuple[int, ...]:
    return id(fn.__code__), id(fn.__defaults__), id(fn.__kwdefaults__)


def _token(value: object) -> str:
    file = BytesIO()
    _TokenPickler(file, 5, _refuse_large).dump(value)
    return blake2b(file.getvalue(), digest_size=16).hexdigest()


def _refuse_large(buffer: PickleBuffer) -> bool:
    if buffer.raw().nbytes >= LARGE:
        raise _Large
    return True


class _TokenPickler(CloudPickler):  # type: ignore[misc]
    """Names functions and classes that would travel by value, instead of going into them."""

    def reducer_override(self, obj: Any) -> Any:
        if (reduce := reducer(obj)) is not None:
            return reduce(obj)
        reduced = super().reducer_override(obj)
        if type(reduced) is tuple and len(reduced) == 6:
            if reduced[5] is cloudpickle._class_setstate:
                return str, (cloudpickle._get_or_create_tracker_id(obj),)
            if reduced[5] is cloudpickle._function_setstate:
                known = _function_tokens.get(obj)
                if known is None:
                    _function_token(obj)
                    known = _function_tokens[obj]
                return str, (known[1],)
        return reduced


# --- Put together: functions ----------------------------------------------------------------------


class _Main(ModuleType):
    """A ``__main__`` on a runner. It has a file only where that is there: `multiprocessing` would run it."""

    @property
    def __file__(self) -> str:  # type: ignore[override]
        path = vars(self).get("__file__")
        if path is None or not os.path.exists(path):
            raise AttributeError("__file__")
        return str(path)


class _Namespace:
    """One state of a client's ``__main__``."""

    def __init__(self, scope: int, last: _Namespace | None, tokens: dict[str, str | None]) -> None:
        self.scope = scope
        self.module = _Main(MAIN)
        self.tokens: dict[str, str | None] = {}
        self.functions: weakref.WeakValueDictionary[str, FunctionType] = (
            weakref.WeakValueDictionary()
        )
        self.kept: set[str] = set()  # what the pickle that is being read does not change
        if last is not None:
            vars(self.module).update(vars(last.module))
            self.tokens.update(last.tokens)
            for name in last.conflicts(tokens):
                vars(self.module).pop(name, None)
                del self.tokens[name]

    def conflicts(self, tokens: dict[str, str | None]) -> list[str]:
        return [
            name
            for name, token in tokens.items()
            if token is not None and self.tokens.get(name, token) != token
        ]

    def take(self, tokens: dict[str, str | None]) -> None:
        self.kept = {
            name for name, token in tokens.items() if token is not None and name in self.tokens
        }
        self.tokens.update(tokens)


_namespaces: dict[tuple[int, int], list[_Namespace]] = {}  # by client and scope, the last used last
_records: dict[int, _Namespace] = {}  # the same by the id of the module's dictionary
_mains: dict[int, ModuleType] = {}  # by client, the last used
_original_main = sys.modules[MAIN]
_chosen = threading.local()


def begin(data: bytes) -> None:
    """Choose the modules for the functions of the pickle that follows. On a runner only; elsewhere each pickle has its own."""
    _chosen.by_scope = {}
    client = context.client
    if not client:
        return
    for scope, pairs in marshal.loads(data):
        tokens = dict(pairs)
        known = _namespaces.setdefault((client, scope), [])
        for one in reversed(known):
            if not one.conflicts(tokens):
                known.remove(one)
                break
        else:
            one = _Namespace(scope, known[-1] if known else None, tokens)
            _records[id(vars(one.module))] = one
        known.append(one)
        if len(known) > NAMESPACES_MAX:
            del _records[id(vars(known.pop(0).module))]
        one.take(tokens)
        _chosen.by_scope[scope] = one
        _mains[client] = one.module
    switch_to(client)


def switch_to(client: int) -> None:
    """Let ``__main__`` be that of the client whose tasks come next."""
    sys.modules[MAIN] = _mains.get(client, _original_main)


def forget(client: int) -> None:
    """That client is gone."""
    for key in [key for key in _namespaces if key[0] == client]:
        for one in _namespaces.pop(key):
            del _records[id(vars(one.module))]
    _mains.pop(client, None)


def namespace(scope: int, base: dict[str, Any]) -> dict[str, Any]:
    """The globals of the functions of a pickle."""
    one = getattr(_chosen, "by_scope", {}).get(scope)
    if one is None:
        return base
    found: dict[str, Any] = vars(one.module)
    found.update(base)
    return found


_new_functions: weakref.WeakSet[FunctionType] = weakref.WeakSet()


def make_function(token: str | None, code: Any, scope: dict[str, Any], *args: Any) -> FunctionType:
    """The function of that token, if it came before with the same globals, or else a new one that is still empty."""
    record = _records.get(id(scope))
    if record is not None and token is not None and token in record.functions:
        return record.functions[token]
    made: FunctionType = cloudpickle._make_function(code, scope, *args)
    _new_functions.add(made)
    if record is not None and token is not None:
        record.functions[token] = made
        number = "-".join(token.split("-", 2)[:2])
        _function_tokens[made] = ((), number)
    return made


def set_function(fn: FunctionType, state: Any) -> None:
    """The state of a function that was submitted."""
    attributes, slots = state
    record = _records.get(id(fn.__globals__))
    if record is not None:
        slots["__globals__"] = {
            name: value for name, value in slots["__globals__"].items() if name not in record.kept
        }
    if fn not in _new_functions:
        fn.__globals__.update(slots["__globals__"])
        return
    _new_functions.discard(fn)
    cloudpickle._function_setstate(fn, (attributes, slots))
    if record is None:
        return
    if fn.__qualname__ == fn.__name__ and fn.__name__ not in record.tokens:
        fn.__globals__.setdefault(fn.__name__, fn)
    if fn in _function_tokens:
        _function_tokens[fn] = (_facts(fn), _function_tokens[fn][1])


def find_function(module: str, qualname: str, code: Any, *args: Any) -> FunctionType:
    """The program's own function that a result names, or else a new one."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if isinstance(found, FunctionType) and found.__code__ == code and not found.__closure__:
        return found
    made: FunctionType = cloudpickle._make_function(code, *args)
    _new_functions.add(made)
    return made


def set_new_function(fn: FunctionType, state: Any) -> None:
    """The state of a function that a task returned; nothing is done to the program's own."""
    if fn in _new_functions:
        _new_functions.discard(fn)
        cloudpickle._function_setstate(fn, state)


# --- Put together: classes ------------------------------------------------------------------------

_new_classes: weakref.WeakSet[type] = weakref.WeakSet()
_arrived: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()  # by token
# The last token of each, and the states of ``__main__`` that it brought its globals to.
_states: weakref.WeakKeyDictionary[type, tuple[str, dict[int, weakref.ref[_Namespace]]]]
_states = weakref.WeakKeyDictionary()


def known_class(token: str, data: bytes) -> type:
    """A class that was submitted: as it is here, if it came with that token last, and to where it is wanted now."""
    chosen = getattr(_chosen, "by_scope", {})
    found = _classes.get(token)
    if found is not None:
        known, places = _states.get(found, ("", {}))
        if known == token and all(
            (place := places.get(scope)) is not None and place() is one
            for scope, one in chosen.items()
        ):
            return found
    made: type = pickle.loads(data)
    _classes[token] = made
    _states[made] = token, {scope: weakref.ref(one) for scope, one in chosen.items()}
    return made


def _renew() -> None:
    """In a forked child, whose tokens are not its parent's: a runner may serve both."""
    global _process
    _process = uuid.uuid4().hex
    _class_pickles.clear()
    _function_tokens.clear()


os.register_at_fork(after_in_child=_renew)


def own_class(token: str, data: bytes) -> type:
    """A class that a task's result is made of: the program's own, or one that came before, or a new one."""
    found = _classes.get(token)
    if found is None:
        found = _classes[token] = pickle.loads(data)
    return found


def make_class(is_enum: bool, *args: Any) -> type:
    """The class of that tracker id, or else a new one that is still empty."""
    found = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(args[-2])
    if found is not None:
        return found  # type: ignore[no-any-return]
    make = cloudpickle._make_skeleton_enum if is_enum else cloudpickle._make_skeleton_class
    made: type = make(*args)
    _new_classes.add(made)
    return made


def set_class(cls: type, state: Any) -> None:
    """The state of a class that was submitted: of a new one, or of one that came here before and has changed since."""
    attributes, token = state
    is_changed = cls in _arrived and (token is None or _arrived[cls] != token)
    if cls in _new_classes or is_changed:
        _new_classes.discard(cls)
        cloudpickle._class_setstate(cls, (attributes, {}))
        _arrived[cls] = token
        _states.pop(cls, None)


def set_new_class(cls: type, state: dict[str, Any]) -> None:
    """The state of a class that a task returned; nothing is done to the program's own."""
    if cls in _new_classes:
        _new_classes.discard(cls)
        cloudpickle._class_setstate(cls, (state, {}))
