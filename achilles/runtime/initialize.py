"""Initializers as they are sent; and one that sets variables of the environment before anything of
the user's is imported.

How many threads a numeric library starts is read from the environment when it is loaded, so that
must be set before the user's own initializer, which may load it, is even unpickled.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # a runner starts without typing
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def dumps_initializer(
    initializer: Callable[..., object] | None, initargs: tuple[Any, ...], *, is_far: bool = False
) -> bytes:
    """The pickle of both, empty without an initializer; ``is_far``: for other machines.

    Raises:
        ArgumentPickleError: one of them cannot be pickled.
        RuntimeError: an argument is what `multiprocessing` lets its processes inherit.
    """
    from achilles.runtime.context import Pickling
    from achilles.runtime.serialize import dumps

    if initializer is None:
        return b""
    try:
        with Pickling(is_far):
            return dumps((initializer, initargs))
    except (Exception, SystemExit) as error:
        if isinstance(error, RuntimeError) and "through inheritance" in str(error):
            raise RuntimeError(
                f"{error}, and runners inherit nothing: "
                "pass those of a multiprocessing.Manager() in initargs instead, which embedded runners can use"
            ) from error
        from achilles.runtime.blame import initializer_error

        raise initializer_error(initializer, initargs, error, is_far=is_far) from error


def with_environ(
    environ: Mapping[str, str],
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """An executor's ``initializer`` and ``initargs`` that set these variables before they call the
    given ones.

    Raises:
        ArgumentPickleError, RuntimeError: as `dumps_initializer` does.
    """
    return initialize, (dict(environ), dumps_initializer(initializer, initargs))


def initialize(environ: dict[str, str], given: bytes) -> None:
    """On a runner: set the variables, and call what was given."""
    from achilles.runtime.serialize import loads

    os.environ.update(environ)
    if given:
        initializer, initargs = loads(given)
        initializer(*initargs)
