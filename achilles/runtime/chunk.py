"""Many short calls as one task: what `achilles.Pool` sends where a call costs less than a task
does.

A runner imports this module: what it does not need at once is imported late.
"""

from __future__ import annotations

import functools
from time import perf_counter

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

FOREVER = float("inf")


class Chunk:
    """Calls ``func`` with one item after the other: as its argument,
    or with ``is_star`` as its arguments.

    After ``seconds`` it starts no further call:
    who made the chunk too long gives the rest out again, better cut.
    """

    def __init__(
        self, func: Callable[..., Any], *, is_star: bool = False, seconds: float = FOREVER
    ) -> None:
        self.func = func
        self.is_star = is_star
        self.seconds = seconds
        functools.update_wrapper(self, func, updated=())  # errors name the user's function

    def __call__(self, items: Sequence[Any]) -> tuple[list[Any], dict[int, bytes]]:
        """What the calls returned, as far as they were made,
        and by index the errors of those that raised.
        """
        func, is_star = self.func, self.is_star
        values: list[Any] = []
        errors: dict[int, bytes] = {}
        until = perf_counter() + self.seconds
        for item in items:
            try:
                values.append(func(*item) if is_star else func(item))
            except Exception as error:
                from achilles.runtime.tracebacks import dump_error

                errors[len(values)] = dump_error(error)
                values.append(None)
            if perf_counter() >= until:
                break
        return values, errors

    def __reduce__(self) -> tuple[Any, ...]:
        return _chunk, (self.func, self.is_star, self.seconds)

    def __repr__(self) -> str:
        return f"<Chunk of {self.func!r}>"


def _chunk(func: Callable[..., Any], is_star: bool, seconds: float) -> Chunk:
    return Chunk(func, is_star=is_star, seconds=seconds)
