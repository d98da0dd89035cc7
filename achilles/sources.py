"""The client's own modules, for runners on other machines that cannot import them.

What is served: the source of pure-Python modules that belong to the user's program, read anew at
each request, so that an edit is seen. What is not: the standard library, what is installed in
site-packages, extension modules and achilles itself. Those belong on the worker,
where the ImportError says so.
"""

from __future__ import annotations

import importlib
import marshal
import os
import site
import struct
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, NamedTuple

REQUEST = struct.Struct(
    "<I"
)  # the request's number, before the module's name; and before the answer
SOURCE_MAX = 4 << 20  # a source file of more than that is data


class Source(NamedTuple):
    """A module as a runner needs it; a namespace package has the source ``""``."""

    text: str
    origin: str  # the file's path on the client
    is_package: bool


def answer(request: bytes) -> bytes:
    """The answer to a runner's request for a module."""
    number, name = request[: REQUEST.size], request[REQUEST.size :]
    source = find_source(name.decode("utf-8", "replace"))
    return number + (b"" if source is None else marshal.dumps(tuple(source)))


def find_source(name: str) -> Source | None:
    """The source of the user's module of that name; None if there is none, or it is not the user's.

    Nothing is imported to find it.
    """
    if not _may_be_ours(name):
        return None
    spec = _find_spec(name)
    if spec is None:
        importlib.invalidate_caches()  # it may be younger than what the finders remember
        spec = _find_spec(name)
    if spec is None:
        return None
    is_package = spec.submodule_search_locations is not None
    if spec.origin is None or not spec.has_location:
        places = list(spec.submodule_search_locations or ())
        return Source("", places[0], True) if places and not _is_installed(places[0]) else None
    if _is_installed(spec.origin):
        return None
    text = _read(spec, name)
    return None if text is None else Source(text, spec.origin, is_package)


def _may_be_ours(name: str) -> bool:
    top = name.partition(".")[0]
    return (
        all(part.isidentifier() for part in name.split("."))
        and top not in sys.stdlib_module_names
        and top not in ("achilles", "__main__", "__mp_main__")
    )


def _find_spec(name: str) -> ModuleSpec | None:
    """Find a module as an import would, package by package, without running any of them."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        try:
            spec = PathFinder.find_spec(".".join(parts[:count]), path)
        except KeyError:
            spec = _namespace(parts[:count], path or [])
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _namespace(parts: list[str], path: list[str]) -> ModuleSpec | None:
    """A namespace package inside a package that is not imported,
    of which the path finder wants to know more.
    """
    places = [place for entry in path if os.path.isdir(place := os.path.join(entry, parts[-1]))]
    spec = ModuleSpec(".".join(parts), None, is_package=True)
    spec.submodule_search_locations = places
    return spec if places else None


def _read(spec: ModuleSpec, name: str) -> str | None:
    get_source: Any = getattr(spec.loader, "get_source", None)
    try:
        text = get_source(name) if get_source is not None else None
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return None
    return text if isinstance(text, str) and len(text) <= SOURCE_MAX else None


def _is_installed(path: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    real = os.path.realpath(path)
    return any(real.startswith(place + os.sep) for place in _installed_places())


def _installed_places() -> set[str]:
    paths = sysconfig.get_paths()
    places = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    places.update(site.getsitepackages())
    places.add(site.getusersitepackages())
    return {os.path.realpath(place) for place in places if place}
