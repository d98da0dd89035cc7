"""The key by which processes of one program recognise each other,
as multiprocessing's own children have it.

With it a task may use proxies of its program's `multiprocessing.Manager`. Few tasks do, and loading
multiprocessing takes longer than a runner's start, so the key waits until a task loads it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # a runner starts without typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

MODULE = "multiprocessing.process"


def own_authkey() -> bytes:
    """The key of this process."""
    from multiprocessing import current_process

    return bytes(current_process().authkey)


def set_authkey(key: bytes) -> None:
    """Make it the key of this process: now, or as soon as there is something that has it."""
    module = sys.modules.get(MODULE)
    if module is None:
        sys.meta_path.insert(0, _Finder(key))
    else:
        module.current_process().authkey = key


class _Finder:
    """Finds one module, once, and gives it the key when it is loaded."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader, self._key)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The module's own loader, and the key after it."""

    def __init__(self, loader: Any, key: bytes) -> None:
        self._loader = loader
        self._key = key

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        module.current_process().authkey = self._key
