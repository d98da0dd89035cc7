"""Tokens: what tells whether a value, or a function, is the one that came before,
without the other one at hand.

That of a value is the hash of its pickle, in which functions stand by their tokens, and classes by
their tracker ids. That of a function is a number for the function object with its code, and the
hash of what it holds beside that. Whoever submits makes tokens,
and whoever runs the task compares them.
"""

from __future__ import annotations

import itertools
import threading
import uuid
import weakref
from hashlib import blake2b
from io import BytesIO
from pickle import PickleBuffer
from types import CodeType, FunctionType
from typing import Any

from cloudpickle import cloudpickle

from achilles.runtime.program import is_own
from achilles.runtime.reducers import ProgramPickler, reducer, shared_reducer
from achilles.runtime.serialize import LARGE

# The code that a function had when it got its number: an id could be another's by now.
_numbered: weakref.WeakKeyDictionary[FunctionType, tuple[CodeType, str]]
_numbered = weakref.WeakKeyDictionary()
_process = uuid.uuid4().hex
_numbers = itertools.count(1)
_open = threading.local()  # the functions whose token is being made


class _Large(Exception):
    """A value is too large for a token."""


def unique() -> str:
    """A token that nothing else has."""
    return f"{_process}-{next(_numbers)}"


def adopt(fn: FunctionType, token: str) -> None:
    """The function was made for that token: it keeps the number if it travels on."""
    _numbered[fn] = fn.__code__, "-".join(token.split("-", 2)[:2])


def renew() -> None:
    """In a forked child, whose tokens are not its parent's: a runner may serve both."""
    global _process
    _process = uuid.uuid4().hex
    _numbered.clear()


def value_token(value: object) -> str | None:
    """Raises whatever the pickler does, where the value cannot be pickled."""
    if isinstance(value, FunctionType) and (
        is_own(value.__module__) or not cloudpickle._should_pickle_by_reference(value)
    ):
        return function_token(value)
    if isinstance(value, bytes | str) and len(value) >= LARGE:
        return None
    try:
        return token_of(value)
    except _Large:
        return None


def function_token(fn: FunctionType) -> str | None:
    """A number for the function object, and what can change of it without another."""
    number = _number_of(fn)
    if not (fn.__closure__ or fn.__dict__ or fn.__defaults__ or fn.__kwdefaults__):
        return number
    try:
        cells = [_contents(cell) for cell in fn.__closure__ or ()]
        return f"{number}-{token_of((cells, fn.__dict__, fn.__defaults__, fn.__kwdefaults__))}"
    except Exception:
        return None


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _number_of(fn: FunctionType) -> str:
    """The number of the function object, as long as it has the same code."""
    known = _numbered.get(fn)
    if known is None or known[0] is not fn.__code__:
        known = _numbered[fn] = (fn.__code__, unique())
    return known[1]


def token_of(value: object) -> str:
    """The hash of the value's pickle.

    Raises:
        Exception: it cannot be pickled, or is too large.
    """
    file = BytesIO()
    _TokenPickler(file, 5, _refuse_large).dump(value)
    return blake2b(file.getvalue(), digest_size=16).hexdigest()


def _refuse_large(buffer: PickleBuffer) -> bool:
    if buffer.raw().nbytes >= LARGE:
        raise _Large
    return True


class _TokenPickler(ProgramPickler):
    """Names functions and classes that would travel by value, instead of going into them."""

    def reducer_override(self, obj: Any) -> Any:
        if (reduce := reducer(obj)) is not None:
            return reduce(obj)
        if shared_reducer(obj) is not None:  # which may have an effect
            raise TypeError(f"a {type(obj).__name__} has no content")
        reduced = super().reducer_override(obj)
        if type(reduced) is tuple and len(reduced) == 6:
            if reduced[5] is cloudpickle._class_setstate:
                return str, (cloudpickle._get_or_create_tracker_id(obj),)
            if reduced[5] is cloudpickle._function_setstate:
                return str, (self._token_of(obj),)
        return reduced

    def _token_of(self, fn: FunctionType) -> str:
        """With what it holds, but for functions that lead back to themselves."""
        inside: set[int] = _open.__dict__.setdefault("functions", set())
        token = None
        if id(fn) not in inside:
            inside.add(id(fn))
            try:
                token = function_token(fn)
            finally:
                inside.discard(id(fn))
        return token or _number_of(fn)
