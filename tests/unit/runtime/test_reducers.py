"""What has a reducer of ours arrives as what it was."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import reduction, resource_sharer
from typing import Any

import pytest

from achilles.errors import ResultPickleError
from achilles.runtime import context
from achilles.runtime.by_value import dumps
from achilles.runtime.reducers import reducer, shared_reducer
from achilles.runtime.serialize import ERROR, VALUE, dump_result, dumps_call, load_outcome, loads
from achilles.runtime.tokens import token_of
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


class Registered:
    """What nothing can pickle, but for what is registered."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.lock = threading.Lock()


def _reduce_registered(one: Registered) -> tuple[Any, ...]:
    return Registered, (one.n,)


def test_what_is_registered_with_multiprocessing_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    known = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    monkeypatch.setitem(known, Registered, _reduce_registered)
    assert loads(dumps([Registered(3)]))[0].n == 3
    with pytest.raises(TypeError, match="has no content"):
        token_of([Registered(3)])
    assert shared_reducer(functools.partial(abs, 1)) is None
    assert shared_reducer(3) is None


@pytest.fixture
def pipe() -> Iterator[tuple[Any, Any]]:
    near, far = multiprocessing.Pipe()
    yield near, far
    near.close()
    far.close()
    resource_sharer.stop(timeout=10)


def test_a_connection_is_handed_over_by_descriptor(pipe: tuple[Any, Any]) -> None:
    near, far = pipe
    payload = dumps_call((far,), {})
    (arrived,), _ = loads(payload)
    assert arrived.fileno() != far.fileno()
    arrived.send("hi")
    assert near.recv() == "hi"
    arrived.close()
    status, result = dump_result([far], len)
    (arrived,) = loads(result)
    assert status == VALUE
    assert arrived.fileno() != far.fileno()
    arrived.close()


def test_a_connection_is_refused_on_a_worker(
    pipe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = dumps_call(pipe[:1], {})
    resource_sharer.stop(timeout=10)
    sharer = resource_sharer._resource_sharer  # type: ignore[attr-defined]
    monkeypatch.setattr(context, "client", 7)
    with pytest.raises(TypeError, match="a Connection is of the machine"):
        loads(payload)
    status, result = dump_result(pipe[0], len)
    assert status == ERROR
    _, error = load_outcome(status, result)
    assert type(error) is ResultPickleError
    assert "cannot be pickled: a Connection is of the machine" in str(error)
    assert sharer._listener is None  # which would be there until somebody came


def test_importable_ones_are_left_to_others() -> None:
    assert reducer(functools.partial) is None
    assert reducer(functools.lru_cache(abs)) is None
