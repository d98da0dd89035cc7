"""Exceptions to bytes: as themselves where that works,
else as a `RemoteError` that tells the same story.
"""

from __future__ import annotations

import builtins
import os
import platform
import sys
import traceback
from typing import Any

from achilles.runtime import context
from achilles.runtime.program import MAINS
from achilles.runtime.serialize import dumps, loads
from achilles.task_errors import RemoteError

REASON_MAX = 300
_TRACEBACK: Any = BaseException.__dict__[
    "__traceback__"
]  # what a class of the user's makes of the name is its own


def dump_error(error: BaseException, *, is_loaded: bool = True) -> bytes:
    """The pickle of ``(error, traceback text)``; it was tested that it can be unpickled.

    ``is_loaded`` False says that it arose while the function or its arguments were unpickled.
    """
    try:
        return _dump(error, is_loaded=is_loaded)
    except (
        BaseException
    ) as failure:  # a class of the user's can make anything of the names that are looked up here
        text = f"{type.__repr__(type(error))}, which cannot be looked at: {type(failure).__name__}"
        return dumps((RemoteError(text), f"{text}\n"))


def _dump(error: BaseException, *, is_loaded: bool) -> bytes:
    if not is_loaded:
        _say_where(error)
    text = _format(error)
    data = _round_trip(error, text)
    if isinstance(data, str):
        data = dumps((_portable(error, data), text))
    return data


def _format(error: BaseException) -> str:
    """The traceback from the user's first frame on."""
    frames = _TRACEBACK.__get__(error)
    while frames is not None and frames.tb_frame.f_globals.get("__package__") == __package__:
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except BaseException as failure:  # a __str__ or __notes__ of the user's that raises
        return f"{_name(error)} (its traceback cannot be formatted: {type(failure).__name__})\n"


def _round_trip(error: BaseException, text: str) -> bytes | str:
    """The pickle; or, if what comes back is not what went in, why that is."""
    try:
        data = dumps((error, text), is_result=True)
    except BaseException as failure:  # of the user's own methods, which may raise anything
        return f"it cannot be pickled: {_summary(failure)}"
    try:
        back, _ = loads(data)
    except BaseException as failure:
        return f"it cannot be made again from its args, which is what a pickle has of it: {_summary(failure)}"
    return data if type(back) is type(error) else f"its pickle is one of {_name(back)}"


def _portable(error: BaseException, reason: str) -> BaseException:
    """A stand-in that can be pickled; a group keeps its structure and its good members."""
    group: Any = getattr(builtins, "BaseExceptionGroup", ())  # Python 3.11 on
    if isinstance(error, group):
        members = [
            _portable(member, why) if isinstance(why := _round_trip(member, ""), str) else member
            for member in error.exceptions
        ]
        copy: BaseException = group(error.message, members)
        if not isinstance(_round_trip(copy, ""), str):
            return copy
    return RemoteError(
        f"{_summary(error)} (`except {type(error).__name__}` does not catch this RemoteError, which stands in for it: "
        f"{reason[:REASON_MAX]}. A __reduce__ of its own would let it travel)"
    )


def _summary(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as failure:
        text = f"<its str() raised {type(failure).__name__}>"
    return f"{_name(error)}: {text}" if text else _name(error)


def _name(error: BaseException) -> str:
    kind = type(error)
    if kind.__module__ == "builtins" or kind.__module__ in MAINS:
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _say_where(error: BaseException) -> None:
    """Name the interpreter, and the host of a worker, that lack what the client has."""
    python = f"Python {platform.python_version()}, {sys.executable}"
    where = f"on worker {os.uname().nodename} ({python})"
    lacks = f"is not installed {where}"
    if context.is_embedded:
        where = f"in a runner of this executor ({python})"
        lacks = f"cannot be imported {where}, whose sys.path is what the program's was at its first task"
    if isinstance(error, ModuleNotFoundError) and error.name:
        error.msg = f"module {error.name!r} {lacks}"
        error.args = (error.msg,)
    elif sys.version_info >= (3, 11):
        error.add_note(f"while the function and its arguments were unpickled {where}")
