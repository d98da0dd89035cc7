"""How what cloudpickle has no way for, or takes by its name only, is taken apart;
each with what puts it together.
"""

from __future__ import annotations

import functools
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any, NewType, ParamSpec, TypeVar

from cloudpickle import Pickler as CloudPickler
from cloudpickle import cloudpickle

from achilles.runtime import context
from achilles.runtime.program import is_own

NO_FILE = "<dynamic-code>"  # cloudpickle's, in place of a file's name


def _reduce_cached(cached: Any) -> tuple[Any, ...]:
    return _cached, (cached.__wrapped__, cached.cache_parameters())


def _cached(fn: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    cached: Callable[..., Any] = functools.lru_cache(**parameters)(fn)
    return cached


def _reduce_new_type(kind: Any) -> tuple[Any, ...]:
    return _new_type, (kind.__name__, kind.__supertype__, kind.__module__)


def _new_type(name: str, supertype: Any, module: str) -> Any:
    kind: Any = NewType(name, supertype)  # type: ignore[misc] # known only now
    kind.__module__ = module
    return kind


def _reduce_type_var(variable: TypeVar) -> tuple[Any, ...]:
    return cloudpickle._make_typevar, cloudpickle._decompose_typevar(variable)


def _reduce_param_spec(parameters: Any) -> tuple[Any, ...]:
    return ParamSpec, (parameters.__name__,)


def _reduce_cached_property(cached: functools.cached_property[Any]) -> tuple[Any, ...]:
    return _cached_property, (cached.func, cached.attrname)


def _cached_property(func: Callable[..., Any], name: str) -> functools.cached_property[Any]:
    made = functools.cached_property(func)
    made.__set_name__(object, name)
    return made


def _reduce_weak_keys(mapping: weakref.WeakKeyDictionary[Any, Any]) -> tuple[Any, ...]:
    return weakref.WeakKeyDictionary, (dict(mapping),)


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    """As cloudpickle does it, with the file's name, which 3.1.3 and later leave out:
    a traceback without it shows no line.
    """
    make, args = cloudpickle._code_reduce(code)
    return make, tuple(
        code.co_filename if type(arg) is str and arg == NO_FILE else arg for arg in args
    )


# The first two hold what cannot be pickled: a lock, and (what singledispatch has) weak references.
_REDUCERS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    CodeType: _reduce_code,
    functools.cached_property: _reduce_cached_property,
    weakref.WeakKeyDictionary: _reduce_weak_keys,
}
# Those of modules that are the program's own, or not here;
# cloudpickle as well would pickle them by their name.
_BY_NAME: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    functools._lru_cache_wrapper: _reduce_cached,
    NewType: _reduce_new_type,
    ParamSpec: _reduce_param_spec,
    TypeVar: _reduce_type_var,
}


# What multiprocessing registers and cloudpickle can do as well, for functions of ``__main__``, too.
_PLAIN = frozenset(
    {MethodType, functools.partial, type([].append), type(list.append), type(int.__add__)}
)


def shared_reducer(obj: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    """That of `multiprocessing`, where something is registered there: for its connections,
    for sockets, or by the program.
    """
    reduction = sys.modules.get("multiprocessing.reduction")
    kind = type(obj)
    if reduction is None or kind in _PLAIN:
        return None
    reduce: Callable[[Any], tuple[Any, ...]] | None = reduction.ForkingPickler._extra_reducers.get(
        kind
    )
    if reduce is not None and (
        kind.__module__.startswith("multiprocessing.") or kind is socket.socket
    ):
        return functools.partial(_reduce_handle, reduce)
    return reduce


def _reduce_handle(reduce: Callable[[Any], tuple[Any, ...]], obj: Any) -> tuple[Any, ...]:
    # What a worker's runner pickles is for other machines, a result, too.
    if threading.get_ident() in context.far or _is_of_worker():
        raise TypeError(_refusal(type(obj).__name__))
    return _handle, (type(obj).__name__, *reduce(obj)[:2])


def _handle(name: str, rebuild: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What holds a descriptor, which comes from the process that has it."""
    if _is_of_worker():
        raise TypeError(_refusal(name))
    return rebuild(*args)


def _is_of_worker() -> bool:
    """Whether this is a runner, and not one of an embedded executor."""
    return bool(context.client) and not context.is_embedded


def _refusal(name: str) -> str:
    return f"a {name} is of the machine and the program that made it: tasks on a cluster can neither be given nor return one"


def reducer(obj: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    """Ours, where cloudpickle has none that does."""
    kind = type(obj)
    if kind in _BY_NAME and (is_own(obj.__module__) or obj.__module__ not in sys.modules):
        return _BY_NAME[kind]
    return _REDUCERS.get(kind)


class ProgramPickler(CloudPickler):  # type: ignore[misc]
    """cloudpickle's, which takes each loaded module but ``__main__`` for one that can be
    imported.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and is_own(obj.__module__):
            if isinstance(obj, FunctionType):
                return self._dynamic_function_reduce(obj)
            return cloudpickle._dynamic_class_reduce(obj)
        return super().reducer_override(obj)
