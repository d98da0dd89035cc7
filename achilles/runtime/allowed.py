"""An allow-list for results: what they may hold is named,
so that a worker's key is no code on the client's machine.

Unpickling calls what the pickle names. With the list it may name:

- the plain types of Python and of a few modules of data
  (`PLAIN`), and the exceptions of Python and of achilles;
- for ``"numpy"``: arrays, data types and scalars;
- for a module or package, ``"mypackage.types"``: the classes that are defined in it. Whoever lists
  it trusts their constructors;
- for ``"mypackage.types.make"``: just that.

What makes code of data (`MAKERS`, and all else of builtins) is never allowed, listed or not:
whoever has that has everything. So functions and classes of the program itself, which travel by
value, are in no result then.

Everything else fails the task's future with a `ResultUnpickleError` that names it,
before it is even imported.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable
from io import BytesIO
from pickle import Unpickler, UnpicklingError
from typing import Any

from achilles.runtime.serialize import loads

PLAIN = {
    "builtins": {
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
        *("object", "range", "set", "slice", "str", "tuple", "Ellipsis", "NotImplemented"),
    },
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "concurrent.futures._base": {"BrokenExecutor", "CancelledError", "TimeoutError"},
    "concurrent.futures.process": {"BrokenProcessPool"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "uuid": {"UUID"},
}
_EXCEPTIONS = {
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
_OUR_ERRORS = ("achilles.errors", "achilles.task_errors")
_NUMPY_FUNCTIONS = {
    *("_reconstruct", "scalar"),  # of multiarray
    *("_frombuffer",),  # of numeric
}
_NUMPY_MODULES = {
    *("numpy.core.multiarray", "numpy._core.multiarray"),
    *("numpy.core.numeric", "numpy._core.numeric"),
}
MAKERS = ("achilles.runtime", "builtins", "cloudpickle", "marshal", "pickle", "types")


class Allowed:
    """What results may name."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def __repr__(self) -> str:
        return f"<Allowed {', '.join(sorted(self.names)) or 'plain data'}>"

    def guard(self, payload: Any) -> Guarded:
        """A payload that is only loaded with what is allowed."""
        return Guarded(self, payload)

    def unpickle(self, data: Any, buffers: Iterable[Any] | None = None) -> Any:
        """As `pickle.loads`.

        Raises:
            UnpicklingError: the pickle names what is not allowed.
            BaseException: whatever the objects' own methods raise.
        """
        return _Unpickler(self, data, buffers).load()

    def permits(self, module: str, name: str) -> bool:
        """Whether the text of a name does not rule it out;
        classes of a listed module are still to be looked at.
        """
        full = f"{module}.{name}"
        if name in PLAIN.get(module, ()):
            return True
        if module == "builtins":
            return name in _EXCEPTIONS
        if module in _OUR_ERRORS:
            return "." not in name
        if _makes_code(module):
            return False
        return (
            full in self.names
            or self.covers(full)
            or ("numpy" in self.names and module.split(".")[0] == "numpy")
        )

    def covers(self, full: str) -> bool:
        """Whether a name is in a listed module or package other than NumPy."""
        parts = full.split(".")
        heads = (".".join(parts[:count]) for count in range(1, len(parts)))
        return any(head != "numpy" and head in self.names for head in heads)

    def is_fine(self, module: str, name: str, found: object) -> bool:
        """Whether what was found under a name that is permitted is what it may be."""
        if name in PLAIN.get(module, ()) or f"{module}.{name}" in self.names:
            return True
        if not isinstance(found, type):
            return module in _NUMPY_MODULES and name in _NUMPY_FUNCTIONS
        if issubclass(found, BaseException) and found.__module__ in ("builtins", *_OUR_ERRORS):
            return True
        if self.covers(f"{found.__module__}.{found.__qualname__}"):
            return True
        numpy: Any = sys.modules.get("numpy")
        kinds = () if numpy is None else (numpy.generic, numpy.dtype)
        return "numpy" in self.names and (found is numpy.ndarray or issubclass(found, kinds))


class Guarded:
    """A payload, and what it may name."""

    __slots__ = ("_allowed", "_payload")

    def __init__(self, allowed: Allowed, payload: Any) -> None:
        self._allowed = allowed
        self._payload = payload

    def load(self) -> Any:
        """Its value.

        Raises:
            BaseException: as `Allowed.unpickle`.
        """
        return loads(self._payload, unpickle=self._allowed.unpickle)


class _Unpickler(Unpickler):
    def __init__(self, allowed: Allowed, data: Any, buffers: Iterable[Any] | None) -> None:
        super().__init__(BytesIO(data), buffers=buffers)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if self._allowed.permits(module, name):
            found = super().find_class(module, name)
            if self._allowed.is_fine(module, name, found):
                return found
        if _makes_code(module):
            raise UnpicklingError(
                f"it names {module}.{name}, which the setting client.results does not allow, listed or not: what makes "
                "functions and classes makes any. Put those that results are made of into a module, and list that"
            )
        raise UnpicklingError(
            f"it names {module}.{name}, which the setting client.results does not allow; add it there if you trust it"
        )


def _makes_code(module: str) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in MAKERS)
