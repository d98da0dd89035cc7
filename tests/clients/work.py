"""Functions that the programs have evaluated: importable by runners, and quick to import there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any


def sphere(x: Sequence[float]) -> float:
    return float(sum(value * value for value in x))


def rosenbrock(x: Sequence[float]) -> float:
    return float(sum(100.0 * (b - a * a) ** 2 + (1.0 - a) ** 2 for a, b in itertools.pairwise(x)))


def wave(x: float, low: float = 0.0) -> float:
    return low + math.sin(10.0 * x) * math.exp(-x)


def is_even(n: int) -> bool:
    return n % 2 == 0


def last_digit(n: int) -> int:
    return n * n % 10


def log_normal(x: Any) -> float:
    return -0.5 * sphere(x)


def to_cube(u: Any) -> Any:
    """A unit cube to one from -5 to 5."""
    return 10.0 * u - 5.0


def fail(*_: object) -> float:
    raise ArithmeticError("as wanted")


def first_value(individual: Sequence[float]) -> tuple[float]:
    return (sphere(individual),)


def two_goals(x: Sequence[float]) -> list[float]:
    return [sphere(x), sphere([value - 2.0 for value in x])]


class HereAndNow:
    """No pool, but of a size: that decides what dynesty samples."""

    def __init__(self, size: int) -> None:
        self.size = size

    map = staticmethod(map)
