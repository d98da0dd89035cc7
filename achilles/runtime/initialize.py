"""An initializer that sets variables of the environment before anything of the user's is imported.

How many threads a numeric library starts is read from the environment when it is loaded, so that must be set before the
user's own initializer, which may load it, is even unpickled.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # a runner starts without typing
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def with_environ(
    environ: Mapping[str, str],
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """An executor's ``initializer`` and ``initargs`` that set these variables before they call the given ones.

    Raises:
        Exception: the given ones cannot be pickled.
    """
    from achilles.runtime.serialize import dumps

    given = b"" if initializer is None else dumps((initializer, initargs))
    return initialize, (dict(environ), given)


def initialize(environ: dict[str, str], given: bytes) -> None:
    """On a runner: set the variables, and call what was given."""
    from achilles.runtime.serialize import loads

    os.environ.update(environ)
    if given:
        initializer, initargs = loads(given)
        initializer(*initargs)
