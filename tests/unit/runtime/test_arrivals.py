"""What a kept function was submitted with, and whether that is still there."""

from __future__ import annotations

from typing import Any

import pytest

from achilles.runtime import arrivals, context
from achilles.runtime.by_value import dumps
from achilles.runtime.serialize import LARGE, loads
from tests.unit.runtime.test_by_value import arrive, client, forget, program

__all__ = ["client"]  # a fixture


def numbered(monkeypatch: pytest.MonkeyPatch, number: str, data: bytes) -> Any:
    """What a runner makes of a pickle with a number, and its snapshot."""
    monkeypatch.setattr(context, "pickle", number)
    value = loads(data)
    monkeypatch.setattr(context, "pickle", "")
    return value, arrivals.take_snapshot()


def test_a_snapshot_holds_until_something_that_it_is_of_is_set(
    client: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = program("a = b = 1\ndef f(): return a\ndef g(): return b")
    first = dumps(scope["f"])
    f, snapshot = numbered(monkeypatch, "1", first)
    assert (f(), snapshot.holds()) == (1, True)
    scope["b"] = 2
    assert arrive(scope["g"])() == 2
    assert snapshot.holds(), "of which it is not"
    scope["a"] = 2
    arrive(scope["f"])
    assert not snapshot.holds()
    f, snapshot = numbered(monkeypatch, "1", first)
    assert (f(), snapshot.holds()) == (1, True)
    assert arrivals.take_snapshot() is None


@pytest.mark.parametrize("attribute", ["n = 0", "n, items = 0, []"])
def test_a_snapshot_is_of_classes_too(
    client: int, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    scope = program(f"class C: {attribute}\ndef f(): return C.n")
    datas = []
    for scope["C"].n in (0, 1):
        datas.append(dumps(scope["f"]))
    forget(scope)
    f, zero = numbered(monkeypatch, "1", datas[0])
    assert (f(), zero.holds()) == (0, True)
    f, one = numbered(monkeypatch, "2", datas[1])
    assert (f(), zero.holds(), one.holds()) == (1, False, True)
    f, zero = numbered(monkeypatch, "1", datas[0])
    assert (f(), zero.holds(), one.holds()) == (0, True, False)


def test_a_large_value_is_known_by_the_number_that_it_came_under(
    client: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = program("def f(): return data[0]\ndef g(): return data[0]")
    scope["data"] = b"x" * LARGE
    one = dumps(scope["f"])
    f, snapshot = numbered(monkeypatch, "1", one)
    numbered(monkeypatch, "1", one)
    assert snapshot.holds()
    scope["data"] = b"y" * LARGE
    g, other = numbered(monkeypatch, "2", dumps(scope["g"]))
    assert (g(), snapshot.holds(), other.holds()) == (ord("y"), False, True)
    f, _ = numbered(monkeypatch, "1", one)
    assert (f(), other.holds()) == (ord("x"), False)
