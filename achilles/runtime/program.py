"""Which modules are the program's own: no import of their name leads another process to them, so
what they have travels by value.

Rules
    1. ``__main__`` is one, and ``__mp_main__``, as `multiprocessing` calls the same module in its
       children.
    2. So is a loaded module to whose file an import of its name would not lead: one that was loaded
       from its path (a plugin, a test of ``pytest --import-mode=importlib``),
       or whose folder is not in `sys.path` any more.
    3. So is one at the top that was made by hand or run (`runpy`): it has no specification. One
       that its package makes when it is imported has none either, and is found with the package.
    4. So is what is below such a package.
    5. On a runner only those of rule 1 are: what else a task loads, it loads for itself, and what
       came from the client, the client has.
    6. It is decided once for each module object, when a pickle or a function names it.
       Nothing is imported for that.

A pickle that names nothing is not looked at; and most modules lie where their names say, which is
seen without asking a finder.
"""

from __future__ import annotations

import os
import sys
import weakref
from types import FunctionType, ModuleType

from achilles.runtime import context

TYPE_CHECKING = False  # a runner starts without typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from typing import Any

MAIN = "__main__"
MAINS = frozenset({MAIN, "__mp_main__"})
A_MAIN = b"_main__"  # which is in the names of both, and nearly nowhere else
# STACK_GLOBAL, without which a pickle of protocol 4 or 5 names nothing;
# as a number it is found in a tenth of the time
NAMES = 0x93
_FETCHED = "achilles.runtime.imports"  # has the loader of modules that came from a client

_decided: dict[str, tuple[weakref.ref[ModuleType], bool]] = {}  # by name
_looked_at: dict[str, int] = {}  # the ids of modules, by name
_suspects: dict[str, bytes] = {}  # by name, what a pickle has of it
_count = 0  # of loaded modules, when they were looked at


def is_own(name: object) -> bool:
    """Whether the module of that name is the program's own."""
    if not isinstance(name, str):
        return False
    if name in MAINS or context.client:
        return name in MAINS
    module: Any = sys.modules.get(name)
    known = _decided.get(name)
    if known is not None and known[0]() is module:
        return known[1]
    if not issubclass(type(module), ModuleType):
        return False  # none, or one that is loaded when it is touched
    try:
        is_ours = _is_out_of_place(name, module) and not _is_found(name, module)
    except Exception:
        is_ours = False  # a finder or a specification of the user's own may raise anything
    _decided[name] = weakref.ref(module), is_ours
    if is_ours:
        _suspect(name)
    else:
        _suspects.pop(name, None)
    return is_ours


def names_own(data: bytes) -> bool:
    """Whether a pickle in which `NAMES` is names a module that is the program's own,
    or seems to.
    """
    find = data.find  # which takes a third of what `in` does
    if find(A_MAIN) >= 0:
        return True
    if context.client:
        return False
    if len(sys.modules) != _count:
        _look()
    if not _suspects:
        return False
    return any(find(written) >= 0 and is_own(name) for name, written in list(_suspects.items()))


def _look() -> None:
    """Find those of the modules loaded since that are not where their names say."""
    global _count
    modules = dict(sys.modules)
    for name, module in modules.items():
        if _looked_at.get(name) == id(module):
            continue
        try:
            is_suspect = issubclass(type(module), ModuleType) and _is_out_of_place(name, module)
        except Exception:
            is_suspect = False  # a specification of the user's own
        if is_suspect:
            _suspect(name)
        else:
            _suspects.pop(name, None)
        _looked_at[name] = id(module)
    _count = len(modules)  # not before: another thread would go by what is not there yet


def _suspect(name: str) -> None:
    written = name.encode("utf-8", "surrogatepass")
    if len(written) < 256:
        _suspects[name] = b"\x8c%c%b\x94" % (len(written), written)  # as any short string


def _values(module: Any) -> dict[str, Any]:
    """Its names, without loading it if it is lazy."""
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found


def _is_out_of_place(name: str, module: Any) -> bool:
    """Whether its file is not where its name says; no disk is asked."""
    values = _values(module)
    if name in MAINS or values.get("__name__") != name:
        return False
    spec = values.get("__spec__")
    parent, _, tail = name.rpartition(".")
    if spec is None:
        return _has_python(values) and (not parent or _is_below_suspect(parent))
    origin: Any = spec.origin
    is_source = isinstance(origin, str) and origin.endswith((".py", ".pyc"))
    if not is_source or not spec.has_location or type(spec.loader).__module__ == _FETCHED:
        return False
    place, _, file = origin.rpartition(os.sep)
    stem = file.rpartition(".")[0]
    if stem == "__init__" and spec.submodule_search_locations is not None:
        place, _, stem = place.rpartition(os.sep)
    if stem != tail:
        return True
    if not parent:
        return place not in sys.path and ("" not in sys.path or place != os.getcwd())
    return place not in getattr(sys.modules.get(parent), "__path__", ()) or _is_below_suspect(
        parent
    )


def _has_python(values: dict[str, Any]) -> bool:
    """Whether it is more than a place in which an extension keeps its types."""
    return "__builtins__" in values or any(
        isinstance(one, FunctionType) for one in list(values.values())
    )


def _is_below_suspect(parent: str) -> bool:
    above = sys.modules.get(parent)
    if above is not None and _looked_at.get(parent) == id(above):
        return parent in _suspects
    return not issubclass(type(above), ModuleType) or _is_out_of_place(parent, above)


def _is_found(name: str, module: Any) -> bool:
    """Whether an import of the name would find that module."""
    spec = _values(module).get("__spec__")
    parent = name.rpartition(".")[0]
    if spec is None and not parent and type(module) is ModuleType:
        return False  # even if its file would be found: to import that is to run it again
    if spec is None and parent:
        return _find_spec(parent) is not None if parent not in sys.modules else not is_own(parent)
    found = _find_spec(name)
    if found is None:
        return False
    origin = None if spec is None else spec.origin
    if origin is None or found.origin is None:
        return True
    return bool(os.path.realpath(found.origin) == os.path.realpath(origin))


def _find_spec(name: str) -> ModuleSpec | None:
    """Find a module as an import would in another process, package by package,
    without running any.
    """
    parent = name.rpartition(".")[0]
    path: Sequence[str] | None = None
    if parent:
        above = sys.modules.get(parent)
        if above is not None:
            if is_own(parent):
                return None
            path = above.__path__
        else:
            found = _find_spec(parent)
            path = None if found is None else found.submodule_search_locations
            if path is None:
                return None
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = None if find is None else find(name, path)
        if spec is not None:
            return spec
    return None
