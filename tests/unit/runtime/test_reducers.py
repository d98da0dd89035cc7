"""What has a reducer of ours arrives as what it was."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest

from achilles.runtime.by_value import dumps
from achilles.runtime.reducers import reducer
from achilles.runtime.serialize import loads
from tests.unit.runtime.test_by_value import program

PROGRAM = """
import functools, typing
@functools.lru_cache(maxsize=7)
def cached(n): return n + 1
Number = typing.NewType("Number", int)
P = typing.ParamSpec("P")
class C:
    @functools.cached_property
    def five(self): return 5
"""


@pytest.mark.parametrize("name", ["cached", "Number", "P"])
def test_what_travels_by_name_elsewhere_travels_by_value_from_main(name: str) -> None:
    value = program(PROGRAM)[name]
    assert reducer(value) is not None
    arrived = loads(dumps(value))
    assert type(arrived) is type(value)
    assert arrived is not value


def test_a_cache_keeps_its_size_and_not_its_contents() -> None:
    cached: Any = loads(dumps(program(PROGRAM)["cached"]))
    assert cached(1) == 2
    assert cached.cache_info() == (0, 1, 7, 1)


def test_a_cached_property_knows_its_name() -> None:
    scope = program(PROGRAM)
    data = dumps(scope["C"])
    scope.clear()
    gc.collect()
    one = loads(data)()
    assert (one.five, vars(one)) == (5, {"five": 5})


def test_weak_keys_are_weak_again() -> None:
    key = frozenset({1})
    arrived, kept = loads(dumps((weakref.WeakKeyDictionary({key: "value"}), key)))
    assert arrived == {kept: "value"}


def test_importable_ones_are_left_to_others() -> None:
    assert reducer(functools.partial) is None
    assert reducer(functools.lru_cache(abs)) is None
