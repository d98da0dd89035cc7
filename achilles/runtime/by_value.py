"""Functions and classes of the program, which travel by value,
as if the other process had the program.

cloudpickle takes them apart and puts them together. This module and `achilles.runtime.arrivals`,
the other end, see to what it leaves open: what they share with each other, and with those that were
there before.

Rules
    1. A runner has the program's ``__main__`` as a module, and each other module that is the
       program's own: all functions of one that came there have its globals. So what an initializer
       or a task sets, the tasks after it see, as in a process of `multiprocessing`.
    2. A task sees its globals as they were at the call of `submit`, but for what was set on its
       runner. So a global has a *token*, which changes with its value: where it is the one that
       came before, what is there stays, and where it is another, it is set, for all functions. What
       a kept function was submitted with is its `Snapshot`: where that does not hold any more,
       it is unpickled again.
    3. A class is made once in each process;
       of one that is there its state is set again if its token changed.
    4. What a task returns changes nothing of the program:
       its own classes and functions are found again, not made.

What is large has no token: it is known by the pickle that it came in, where that has a number,
and set each time else.
"""

from __future__ import annotations

import marshal
import os
import weakref
from collections.abc import Callable
from io import BytesIO
from pickle import PickleBuffer
from struct import Struct
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from cloudpickle import cloudpickle

from achilles.runtime.arrivals import (
    MEMBERS,
    Namespace,
    begin,
    find_function,
    known_class,
    make_class,
    make_function,
    make_module,
    namespace,
    own_class,
    records,
    set_class,
    set_function,
    set_module,
    set_new_class,
    set_new_function,
)
from achilles.runtime.functions import Watch, fingerprint
from achilles.runtime.program import MAINS, is_own
from achilles.runtime.reducers import ProgramPickler, reducer, shared_reducer
from achilles.runtime.tokens import function_token, renew, token_of, unique, value_token

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
    """A pickle of ``obj`` with what is not importable by value; of a call or function,
    or of a result.

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
        """What is unpickled first: the tokens, which choose the module.
        It leaves nothing on the stack, and in the memo.
        """
        if not self.scopes:
            return b""
        tokens = [
            (scope.number, scope.base["__name__"], sorted(scope.tokens.items()))
            for scope in self.scopes.values()
        ]
        data = marshal.dumps(tokens, 2)  # without references, so that the same is the same bytes
        name = f"c{begin.__module__}\nbegin\n".encode()
        return b"".join((b"\x80\x05", name, b"B", _LENGTH.pack(len(data)), data, b"\x85R0"))

    def _reduce_function(self, fn: FunctionType, args: Any, state: Any) -> tuple[Any, ...]:
        code, base, *rest = args
        slots = state[1]
        if self.is_result:
            args = (fn.__module__, fn.__qualname__, code, base, *rest)
            return find_function, args, state, None, None, set_new_function
        token = function_token(fn)
        record = records.get(id(fn.__globals__))
        if record is not None or is_own(fn.__globals__.get("__name__")):
            scope = self._scope(fn.__globals__, base)
            slots["__globals__"] = _with_tokens(slots["__globals__"], scope, record)
            args = (code, scope, *rest)
        return make_function, (token, *args), state, None, None, set_function

    def _scope(self, values: dict[str, Any], base: dict[str, Any]) -> _Scope:
        key = id(values)
        scope = self.scopes.get(key)
        if scope is None:
            record = records.get(key)
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
        state = _with_tokens(others, scope, records.get(id(values)), is_whole=False)
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
    """A class as it was taken apart once, and what it is put together with:
    the scopes of its functions.
    """

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
    if id(vars(module)) in records:
        return module.__name__ not in MAINS
    return module.__name__ not in MAINS and is_own(module.__name__)


def _with_tokens(
    values: dict[str, Any], scope: _Scope, record: Namespace | None, *, is_whole: bool = True
) -> dict[str, Any]:
    """The globals that are to travel; their tokens are noted in ``scope``. Without ``is_whole``,
    those that can.
    """
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
    """What an enumeration's own ``__init__`` or ``__new__`` has given to a member: neither is
    called where it is made anew.
    """
    return {name: value for name, value in vars(member).items() if name not in _OF_EACH_MEMBER}


def _is_slot(value: object, cls: type) -> bool:
    return isinstance(value, MemberDescriptorType) and value.__objclass__ is cls


def _slots_of(cls: type) -> Any:
    given = cls.__dict__["__slots__"]
    if isinstance(given, str | tuple | list | dict):
        return given
    return tuple(name for name, value in vars(cls).items() if _is_slot(value, cls))


def _renew() -> None:
    """In a forked child."""
    renew()
    _class_pickles.clear()


os.register_at_fork(after_in_child=_renew)
