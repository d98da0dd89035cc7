"""Functions and classes of the program, which travel by value, as if the other process had the program.

cloudpickle takes them apart and puts them together. This module sees to what it leaves open: what they share with each other,
and with those that were there before.

Rules
    1. A runner has the program's ``__main__`` as a module, and each other module that is the program's own: all functions of one
       that came there have its globals. So what an initializer or a task sets, the tasks after it see, as in a process of
       `multiprocessing`.
    2. A task sees its globals as they were at the call of `submit`, but for what was set on its runner. So a global has a
       *token*, which changes with its value: where it is the one that came before, what is there stays, and where it is another,
       it is set, for all functions. What a kept function was submitted with is its `Snapshot`: where that does not hold any more,
       it is unpickled again.
    3. A class is made once in each process; of one that is there its state is set again if its token changed.
    4. What a task returns changes nothing of the program: its own classes and functions are found again, not made.

What is large has no token: it is known by the pickle that it came in, where that has a number, and set each time else.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from io import BytesIO
from pickle import PickleBuffer
from struct import Struct
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from cloudpickle import cloudpickle

from achilles.runtime import context
from achilles.runtime.functions import Watch, fingerprint
from achilles.runtime.program import MAIN, MAINS, is_own
from achilles.runtime.reducers import ProgramPickler, reducer, shared_reducer
from achilles.runtime.tokens import adopt, function_token, renew, token_of, unique, value_token

NAMESPACES_MAX = 64  # of one client, whose program has one or a few; those beyond begin anew
MEMBERS = "__achilles_members__"  # in an enumeration's state, the attributes of its members
_OF_EACH_MEMBER = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_"})
_OF_MODULES = (
    "__package__",
    "__name__",
    "__path__",
    "__file__",
)  # which cloudpickle gives to each function
_OF_IMPORT = {*_OF_MODULES, "__builtins__", "__cached__", "__loader__", "__spec__"}
_LENGTH = Struct("<I")


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
    """The globals of a module of the program's own, as functions that travel refer to them."""

    def __init__(self, number: int, base: dict[str, Any]) -> None:
        self.number = number
        self.base = base
        self.tokens: dict[str, str | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace, (self.number, self.base)


class _Pickler(ProgramPickler):
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
        if (reduce := reducer(obj) or shared_reducer(obj)) is not None:
            return reduce(obj)
        if isinstance(obj, ModuleType) and not self.is_result and _is_apart(obj):
            return self._reduce_module(obj)
        if isinstance(obj, type) and self.whole is None and is_own(obj.__module__):
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
        tokens = [
            (scope.number, scope.base["__name__"], sorted(scope.tokens.items()))
            for scope in self.scopes.values()
        ]
        data = marshal.dumps(tokens, 2)  # without references, so that the same is the same bytes
        name = f"c{__name__}\nbegin\n".encode()
        return b"".join((b"\x80\x05", name, b"B", _LENGTH.pack(len(data)), data, b"\x85R0"))

    def _reduce_function(self, fn: FunctionType, args: Any, state: Any) -> tuple[Any, ...]:
        code, base, *rest = args
        slots = state[1]
        if self.is_result:
            args = (fn.__module__, fn.__qualname__, code, base, *rest)
            return find_function, args, state, None, None, set_new_function
        token = function_token(fn)
        record = _records.get(id(fn.__globals__))
        if record is not None or is_own(fn.__globals__.get("__name__")):
            scope = self._scope(fn.__globals__, base)
            slots["__globals__"] = _with_tokens(slots["__globals__"], scope, record)
            args = (code, scope, *rest)
        return make_function, (token, *args), state, None, None, set_function

    def _scope(self, values: dict[str, Any], base: dict[str, Any]) -> _Scope:
        key = id(values)
        scope = self.scopes.get(key)
        if scope is None:
            record = _records.get(key)
            number = key if record is None else record.scope
            scope = self.scopes[key] = _Scope(number, base)
        return scope

    def _reduce_module(self, module: ModuleType) -> tuple[Any, ...]:
        """With all that can be pickled: what of it will be used, nobody knows."""
        values = vars(module)
        base = self.globals_ref.setdefault(id(values), {})
        base.update({name: values[name] for name in _OF_MODULES if name in values})
        scope = self._scope(values, base)
        others = {name: one for name, one in values.items() if name not in _OF_IMPORT}
        state = _with_tokens(others, scope, _records.get(id(values)), is_whole=False)
        return make_module, (scope,), state, None, None, set_module

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
        if is_enum:
            bases, name, qualname, _, *rest = args
            members: dict[str, Any] = cls.__members__  # type: ignore[attr-defined]
            for name_of_member in members:  # an alias among them
                state.pop(name_of_member, None)
            state[MEMBERS] = {name: _own_attributes(one) for name, one in members.items()}
            values = {name: one.value for name, one in members.items()}
            args = (bases, name, qualname, values, *rest)
        else:
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
            token = token_of(state)
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
    kept = _ClassPickle(unique(), file.getvalue(), scopes, watches)
    _class_pickles.setdefault(cls, {})[is_result] = kept
    return kept


class _PicklerWithIds(_Pickler):
    def persistent_id(self, one: Any) -> Any:
        return self.ids.get(id(one))


def _is_apart(module: ModuleType) -> bool:
    """Whether a module that is no ``__main__`` travels by value."""
    if id(vars(module)) in _records:
        return module.__name__ not in MAINS
    return module.__name__ not in MAINS and is_own(module.__name__)


def _with_tokens(
    values: dict[str, Any], scope: _Scope, record: _Namespace | None, *, is_whole: bool = True
) -> dict[str, Any]:
    """The globals that are to travel; their tokens are noted in ``scope``. Without ``is_whole``, those that can."""
    travelling = {}
    for name, value in values.items():
        if name not in scope.tokens:
            try:
                scope.tokens[name] = value_token(value)
            except Exception:
                if record is not None or not is_whole:
                    continue  # made on this runner, as an initializer makes one on each
                scope.tokens[name] = None
        travelling[name] = value
    return travelling


def _own_attributes(member: Any) -> dict[str, Any]:
    """What an enumeration's own ``__init__`` or ``__new__`` has given to a member: neither is called where it is made anew."""
    return {name: value for name, value in vars(member).items() if name not in _OF_EACH_MEMBER}


def _is_slot(value: object, cls: type) -> bool:
    return isinstance(value, MemberDescriptorType) and value.__objclass__ is cls


def _slots_of(cls: type) -> Any:
    given = cls.__dict__["__slots__"]
    if isinstance(given, str | tuple | list | dict):
        return given
    return tuple(name for name, value in vars(cls).items() if _is_slot(value, cls))


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
    """A module of a client's program, with the tokens of what came from there."""

    def __init__(self, scope: int, name: str) -> None:
        self.scope = scope
        self.module = _Main(name) if name in MAINS else ModuleType(name)
        self.tokens: dict[str, str] = {}
        self.wanted: dict[
            str, str
        ] = {}  # the tokens of what the pickle that is being read is to set
        self.functions: weakref.WeakValueDictionary[str, FunctionType] = (
            weakref.WeakValueDictionary()
        )

    def lacks(self, tokens: dict[str, str]) -> dict[str, str]:
        """Those that are not of what is there."""
        return {name: token for name, token in tokens.items() if self.tokens.get(name) != token}

    def set(self, values: dict[str, Any]) -> None:
        """Set those that are wanted."""
        global _version
        for name in self.wanted.keys() & values.keys():
            vars(self.module)[name] = values[name]
            self.tokens[name] = self.wanted.pop(name)
            _version += 1


class Snapshot:
    """What a pickle with a number wants of globals and classes."""

    def __init__(self) -> None:
        self.wants: list[tuple[_Namespace, dict[str, str]]] = []
        self.classes: list[tuple[type, str | None]] = []
        self._version = -1

    def holds(self) -> bool:
        """Whether globals and classes are those of that pickle, but for what tasks have set."""
        if self._version != _version:
            if any(one.lacks(tokens) for one, tokens in self.wants):
                return False
            if any(token is None or _last_token(cls) != token for cls, token in self.classes):
                return False
            self._version = _version
        return True


_namespaces: dict[int, dict[int, _Namespace]] = {}  # by client and scope
_records: dict[int, _Namespace] = {}  # the same by the id of the module's dictionary
_mains: dict[int, ModuleType] = {}  # by client, the last used
_original_main = sys.modules[MAIN]
_chosen = threading.local()
_version = 0  # how often a global or a class was set


def begin(data: bytes) -> None:
    """Choose the modules for the functions of the pickle that follows. On a runner only; elsewhere each pickle has its own."""
    _chosen.by_scope = {}
    client = context.client
    if not client:
        return
    place = context.pickle or unique()
    known = _namespaces.setdefault(client, {})
    for scope, name, pairs in marshal.loads(data):
        tokens = {key: f"#{place}" if token is None else token for key, token in pairs}
        one = known.get(scope)
        if one is None or one.module.__name__ != name:
            if one is None and len(known) >= NAMESPACES_MAX:
                del _records[id(vars(known.pop(next(iter(known))).module))]
            if one is not None:  # of another module, which had the same place in memory
                del _records[id(vars(one.module))]
            one = known[scope] = _Namespace(scope, name)
            _records[id(vars(one.module))] = one
        one.wanted = one.lacks(tokens)
        if context.pickle:
            _snapshot().wants.append((one, tokens))
        _chosen.by_scope[scope] = one
        if name in MAINS:
            _mains[client] = one.module
    switch_to(client)


def _snapshot() -> Snapshot:
    """That of the pickle that is being read."""
    found: Snapshot | None = getattr(_chosen, "snapshot", None)
    if found is None:
        found = _chosen.snapshot = Snapshot()
    return found


def take_snapshot() -> Snapshot | None:
    """What the pickle with a number that was read last wants; None: nothing."""
    found, _chosen.snapshot = getattr(_chosen, "snapshot", None), None
    return found


def switch_to(client: int) -> None:
    """Let ``__main__`` be that of the client whose tasks come next."""
    main = sys.modules[MAIN] = _mains.get(client, _original_main)
    if main.__name__ != MAIN:  # a process of multiprocessing has the same by both names
        sys.modules[main.__name__] = main


def forget(client: int) -> None:
    """That client is gone."""
    for one in _namespaces.pop(client, {}).values():
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


def make_module(values: dict[str, Any]) -> ModuleType:
    """A module of the program, or a copy of it, that is still empty; ``values`` are its functions' globals."""
    record = _records.get(id(values))
    return ModuleType(values["__name__"]) if record is None else record.module


def set_module(module: ModuleType, values: dict[str, Any]) -> None:
    """What a module of the program has."""
    record = _records.get(id(vars(module)))
    if record is None:
        vars(module).update(values)
    else:
        record.set(values)


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
        adopt(made, token)
    return made


def set_function(fn: FunctionType, state: Any) -> None:
    """The state of a function that was submitted."""
    attributes, slots = state
    record = _records.get(id(fn.__globals__))
    if record is not None:
        record.set(slots["__globals__"])
        slots["__globals__"] = {}
    if fn not in _new_functions:
        return
    _new_functions.discard(fn)
    cloudpickle._function_setstate(fn, (attributes, slots))
    if record is None:
        return
    if fn.__qualname__ == fn.__name__ and fn.__name__ not in record.tokens:
        fn.__globals__.setdefault(fn.__name__, fn)


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
# By class, the last token, and the names of the attributes that came with it.
_arrived: weakref.WeakKeyDictionary[type, tuple[str | None, frozenset[str]]]
_arrived = weakref.WeakKeyDictionary()
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()  # by token
# The last token of each, and the states of ``__main__`` that it brought its globals to.
_states: weakref.WeakKeyDictionary[type, tuple[str, dict[int, weakref.ref[_Namespace]]]]
_states = weakref.WeakKeyDictionary()


def known_class(token: str, data: bytes) -> type:
    """A class that was submitted: as it is here, if it came with that token last, and to where it is wanted now."""
    global _version
    chosen: dict[int, _Namespace] = getattr(_chosen, "by_scope", {})
    found = _classes.get(token)
    known, places = ("", {}) if found is None else _states.get(found, ("", {}))
    is_there = known == token and not any(
        one.wanted or (place := places.get(scope)) is None or place() is not one
        for scope, one in chosen.items()
    )
    if found is None or not is_there:
        found = _classes[token] = pickle.loads(data)
        _states[found] = token, {scope: weakref.ref(one) for scope, one in chosen.items()}
        _version += 1
    if context.pickle:
        snapshot = _snapshot()  # without what was noted of it while its own data was read
        snapshot.classes = [one for one in snapshot.classes if one[0] is not found]
        snapshot.classes.append((found, token))
    return found


def _last_token(cls: type) -> str | None:
    """Of the state that the class has."""
    return _states[cls][0] if cls in _states else _arrived.get(cls, (None,))[0]


def _renew() -> None:
    """In a forked child."""
    renew()
    _class_pickles.clear()


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
        if not is_enum and found in _arrived and found.__bases__ != args[2]:
            with contextlib.suppress(TypeError):  # of another layout
                found.__bases__ = args[2]
        return found  # type: ignore[no-any-return]
    make = cloudpickle._make_skeleton_enum if is_enum else cloudpickle._make_skeleton_class
    made: type = make(*args)
    _new_classes.add(made)
    return made


def set_class(cls: type, state: Any) -> None:
    """The state of a class that was submitted: of a new one, or of one that came here before and has changed since."""
    attributes, token = state
    global _version
    if context.pickle:
        _snapshot().classes.append((cls, token))
    known, names = _arrived.get(cls, (None, frozenset()))
    is_changed = cls in _arrived and (token is None or known != token)
    if cls in _new_classes or is_changed:
        _new_classes.discard(cls)
        _arrived[cls] = token, frozenset(attributes) - {MEMBERS}
        _set_state(cls, attributes)
        for name in names - attributes.keys():  # deleted by the program, since
            if name in vars(cls):
                delattr(cls, name)
        _states.pop(cls, None)
        _version += 1


def set_new_class(cls: type, state: dict[str, Any]) -> None:
    """The state of a class that a task returned; nothing is done to the program's own."""
    if cls in _new_classes:
        _new_classes.discard(cls)
        _set_state(cls, state)


def _set_state(cls: Any, attributes: dict[str, Any]) -> None:
    members = attributes.get(MEMBERS)
    if members is not None:
        attributes = {name: one for name, one in attributes.items() if name != MEMBERS}
    cloudpickle._class_setstate(cls, (attributes, {}))
    for name, own in (members or {}).items():
        vars(cls.__members__[name]).update(own)
