"""What of a client's program came to this process by value: its modules, functions and classes,
put together and kept.

What `achilles.runtime.by_value` takes apart refers to the makers and setters here, and says by
which rules.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import pickle
import sys
import threading
import weakref
from types import FunctionType, ModuleType
from typing import Any

from cloudpickle import cloudpickle

from achilles.runtime import context
from achilles.runtime.program import MAIN, MAINS
from achilles.runtime.tokens import adopt, unique

NAMESPACES_MAX = 64  # of one client, whose program has one or a few; those beyond begin anew
MEMBERS = "__achilles_members__"  # in an enumeration's state, the attributes of its members

# --- Modules and functions ------------------------------------------------------------------------


class _Main(ModuleType):
    """A ``__main__`` on a runner. It has a file only where that is there:
    `multiprocessing` would run it.
    """

    @property
    def __file__(self) -> str:  # type: ignore[override]
        path = vars(self).get("__file__")
        if path is None or not os.path.exists(path):
            raise AttributeError("__file__")
        return str(path)


class Namespace:
    """A module of a client's program, with the tokens of what came from there."""

    def __init__(self, scope: int, name: str) -> None:
        self.scope = scope
        self.module = _Main(name) if name in MAINS else ModuleType(name)
        self.tokens: dict[str, str] = {}
        # The tokens of what the pickle that is being read is to set
        self.wanted: dict[str, str] = {}
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
        self.wants: list[tuple[Namespace, dict[str, str]]] = []
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


_namespaces: dict[int, dict[int, Namespace]] = {}  # by client and scope
records: dict[int, Namespace] = {}  # the same by the id of the module's dictionary
_mains: dict[int, ModuleType] = {}  # by client, the last used
_original_main = sys.modules[MAIN]
_chosen = threading.local()
_version = 0  # how often a global or a class was set


def begin(data: bytes) -> None:
    """Choose the modules for the functions of the pickle that follows. On a runner only;
    elsewhere each pickle has its own.
    """
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
                del records[id(vars(known.pop(next(iter(known))).module))]
            if one is not None:  # of another module, which had the same place in memory
                del records[id(vars(one.module))]
            one = known[scope] = Namespace(scope, name)
            records[id(vars(one.module))] = one
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
        del records[id(vars(one.module))]
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
    """A module of the program, or a copy of it, that is still empty;
    ``values`` are its functions' globals.
    """
    record = records.get(id(values))
    return ModuleType(values["__name__"]) if record is None else record.module


def set_module(module: ModuleType, values: dict[str, Any]) -> None:
    """What a module of the program has."""
    record = records.get(id(vars(module)))
    if record is None:
        vars(module).update(values)
    else:
        record.set(values)


_new_functions: weakref.WeakSet[FunctionType] = weakref.WeakSet()


def make_function(token: str | None, code: Any, scope: dict[str, Any], *args: Any) -> FunctionType:
    """The function of that token, if it came before with the same globals,
    or else a new one that is still empty.
    """
    record = records.get(id(scope))
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
    record = records.get(id(fn.__globals__))
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


# --- Classes --------------------------------------------------------------------------------------

_new_classes: weakref.WeakSet[type] = weakref.WeakSet()
# By class, the last token, and the names of the attributes that came with it.
_arrived: weakref.WeakKeyDictionary[type, tuple[str | None, frozenset[str]]]
_arrived = weakref.WeakKeyDictionary()
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()  # by token
# The last token of each, and the states of ``__main__`` that it brought its globals to.
_states: weakref.WeakKeyDictionary[type, tuple[str, dict[int, weakref.ref[Namespace]]]]
_states = weakref.WeakKeyDictionary()


def known_class(token: str, data: bytes) -> type:
    """A class that was submitted: as it is here, if it came with that token last,
    and to where it is wanted now.
    """
    global _version
    chosen: dict[int, Namespace] = getattr(_chosen, "by_scope", {})
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


def own_class(token: str, data: bytes) -> type:
    """A class that a task's result is made of: the program's own, or one that came before,
    or a new one.
    """
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
    """The state of a class that was submitted: of a new one,
    or of one that came here before and has changed since.
    """
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
