"""Which part of a call cannot be pickled, in words:
what the pickler says seldom tells where that is.

All of this runs only when something cannot: parts are pickled one by one until one fails alone.
What a class pickles by methods of its own is not looked into.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from achilles.runtime import context
from achilles.runtime.serialize import describe, encode, why
from achilles.task_errors import ArgumentPickleError

DEPTH_MAX = 4  # of attributes of attributes
PARTS_MAX = 64  # that are tried of one object
_INSTEAD = "pass what it can be made from, and make it in the task"
_IN_INITIALIZER = "pass what it can be made from, and make it in the initializer"
_OF_GLOBALS = (
    "A function of the program itself is sent with the globals that it uses: make what cannot be sent in the task, or in an "
    "initializer, or put the function into a module that is imported"
)
_OF_OBJECTS = "What is called is sent with all that it holds: leave that out of its pickle (__getstate__), and make it in the task"
_OF_VALUES = "A function is sent with what it holds: make what cannot be sent in the task, or in an initializer"

Part = tuple[str, Any]  # how it is named, and what it is


def argument_error(
    args: Sequence[Any],
    kwargs: dict[str, Any],
    fn: object,
    error: BaseException,
    *,
    role: str = "",
    is_far: bool = False,
) -> ArgumentPickleError:
    """The error that names the argument that cannot be pickled;
    ``role`` is said before the function's name.
    """
    names = _parameter_names(fn, len(args))
    labelled: list[Part] = [
        *((f"argument {at + 1}{names[at]}", value) for at, value in enumerate(args)),
        *((f"argument {name!r}", value) for name, value in kwargs.items()),
    ]
    label, kind = "the arguments", ""
    with context.Pickling(is_far):
        for candidate, value in labelled:
            cause = _refusal(value)
            if cause is not None:
                label, error = candidate, cause
                place = "" if "recursion" in why(cause) else _place(value)
                kind = f" (it is of type {type(value).__qualname__}{place and f', which has that as {place}'})"
                break
    whose = f" of {role}{describe(fn)}" if fn is not None else ""
    made = ArgumentPickleError(
        f"{label}{whose} cannot be pickled: {why(error)}{kind}; nothing was sent; {_IN_INITIALIZER if role else _INSTEAD}"
    )
    made.__cause__ = error
    return made


def function_error(
    fn: object, error: BaseException, *, role: str = "", is_far: bool = False
) -> ArgumentPickleError:
    """The error that names what of a function, or of another callable, cannot be pickled."""
    with context.Pickling(is_far):
        what, advice = _culprit(fn)
    made = ArgumentPickleError(
        f"{role}{describe(fn)} cannot be pickled: {why(error)}{what and f', which is {what}'}; nothing was sent. {advice}"
    )
    made.__cause__ = error
    return made


def initializer_error(
    initializer: object, initargs: tuple[Any, ...], error: BaseException, *, is_far: bool = False
) -> ArgumentPickleError:
    """The error that names what of an initializer, or of its arguments, cannot be pickled."""
    role = "the initializer "
    with context.Pickling(is_far):
        cause = _refusal(initializer)
    if cause is not None:
        return function_error(initializer, cause, role=role, is_far=is_far)
    return argument_error(initargs, {}, initializer, error, role=role, is_far=is_far)


def _refusal(value: object) -> BaseException | None:
    """Why it cannot be pickled; None: it can."""
    try:
        encode(value)
    except (Exception, SystemExit) as error:
        return error
    return None


def _first_bad(parts: Iterable[Part]) -> Part | None:
    for at, part in enumerate(parts):
        if at >= PARTS_MAX:
            break
        if _refusal(part[1]) is not None:
            return part
    return None


def _culprit(fn: Any) -> tuple[str, str]:
    """What of a callable cannot be pickled (empty if that is none of its parts alone),
    and what to do.
    """
    if isinstance(fn, functools.partial):
        held = [
            *((f"argument {at + 1} of the partial", value) for at, value in enumerate(fn.args)),
            *((f"the argument {name!r} of the partial", one) for name, one in fn.keywords.items()),
        ]
        if (bad := _first_bad(held)) is not None:
            return _or_part(bad), f"Instead of that, {_INSTEAD}"
        return _culprit(fn.func)
    if isinstance(fn, MethodType):
        owner = fn.__self__
        if _refusal(owner) is not None:
            whole = f"the {type(owner).__qualname__} object that the method is bound to"
            place = _place(owner)
            return (f"{place} of {whole}" if place else f"{whole}, or part of it"), _OF_OBJECTS
        return _culprit(fn.__func__)
    if not isinstance(fn, FunctionType):
        place = _place(fn)
        return (f"{place} of that object" if place else ""), _OF_OBJECTS
    if (bad := _first_bad(_globals_of(fn))) is not None:
        return f"{bad[0]} or part of it", _OF_GLOBALS
    bad = _first_bad(_held_by(fn))
    return ("", _OF_GLOBALS) if bad is None else (_or_part(bad), _OF_VALUES)


def _or_part(bad: Part) -> str:
    name, value = bad
    place = _place(value)
    return f"{place} of {name}" if place else f"{name}, or part of it"


def _globals_of(fn: FunctionType) -> Iterator[Part]:
    from achilles.runtime.functions import global_names

    for name in global_names(fn.__code__):
        yield f"the global {name!r}", fn.__globals__.get(name)


def _held_by(fn: FunctionType) -> Iterator[Part]:
    """What a function has beside its globals."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
        try:
            yield f"the variable {name!r} of an enclosing function", cell.cell_contents
        except ValueError:
            pass  # without a value, so far
    defaults = fn.__defaults__ or ()
    positional = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    named = dict(zip(reversed(positional), reversed(defaults)))
    for name, value in {**named, **(fn.__kwdefaults__ or {})}.items():
        yield f"the default of the parameter {name!r}", value
    for name, value in vars(fn).items():
        yield f"the attribute {name!r} of the function", value


def _place(value: object) -> str:
    """Where in an object what cannot be pickled is,
    as ``.session.lock``; empty if that is not known.
    """
    place = ""
    for _ in range(DEPTH_MAX):
        bad = _first_bad(_members(value))
        if bad is None:
            break
        place, value = place + bad[0], bad[1]
    return place


def _members(value: Any) -> Iterable[Part]:
    """The parts of which a value's pickle is made."""
    kind = type(value)
    if kind is dict:
        return [(f"[{_short(key)}]", one) for key, one in value.items()]
    if kind is list or kind is tuple:
        return [(f"[{at}]", one) for at, one in enumerate(value)]
    if isinstance(value, type) or not _is_pickled_plainly(kind):
        return []
    names = [name for one in kind.__mro__ for name in _slots(one)]
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return [(f".{name}", one) for name, one in {**held, **getattr(value, "__dict__", {})}.items()]


def _is_pickled_plainly(kind: type) -> bool:
    """Whether instances are pickled as their attributes."""
    no_state = getattr(object, "__getstate__", None)  # Python 3.11 on
    return (
        getattr(kind, "__getstate__", no_state) is no_state
        and getattr(kind, "__reduce__") is object.__reduce__  # noqa: B009 - mypy takes a method for another each time
        and getattr(kind, "__reduce_ex__") is object.__reduce_ex__  # noqa: B009 - the same
    )


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if name != "__dict__"]


def _short(key: object) -> str:
    return repr(key) if type(key) in (str, int) and len(repr(key)) <= 40 else "…"


def _parameter_names(fn: object, count: int) -> list[str]:
    """`` ('lock')`` for each positional argument, or empty texts where that is not known."""
    names: list[str] = []
    try:
        parameters = inspect.signature(fn).parameters.values()  # type: ignore[arg-type]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [f" ({parameter.name!r})" for parameter in parameters if parameter.kind in kinds]
    except (TypeError, ValueError):
        pass  # no function, or a builtin that does not tell
    return (names + [""] * count)[:count]
