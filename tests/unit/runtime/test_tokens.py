"""What tells that a value is not the one that came before."""

from __future__ import annotations

import gc
import weakref

import pytest

from achilles.runtime import tokens
from achilles.runtime.by_value import dumps
from achilles.runtime.serialize import LARGE
from achilles.runtime.tokens import adopt, function_token, unique, value_token
from tests.unit.runtime.test_by_value import arrive, client, program

__all__ = ["client"]  # a fixture


def test_the_same_has_the_same_token_and_another_has_not() -> None:
    scope = program("def f(): return 1\ndef g(): return 1")
    f, g = scope["f"], scope["g"]
    assert value_token([1, {"a": f}]) == value_token([1, {"a": f}])
    assert value_token([1, {"a": f}]) != value_token([1, {"a": g}])
    assert value_token(f) == function_token(f) != function_token(g)
    assert unique() != unique()
    f.__code__ = g.__code__
    assert value_token([1, {"a": f}]) == value_token([1, {"a": f}])


def test_what_is_large_has_none() -> None:
    for value in (b"x" * LARGE, "x" * LARGE):
        assert value_token(value) is None
    assert value_token(b"x" * (LARGE - 1)) is not None
    with pytest.raises(TypeError, match="pickle"):
        value_token(_ for _ in ())


def test_a_function_that_was_made_for_a_token_keeps_its_number() -> None:
    first, second = (program("def f(x=1): return x")["f"] for _ in range(2))
    token = function_token(first)
    assert token is not None
    assert function_token(second) != token
    adopt(second, token)
    assert function_token(second) == token


def test_tokens_keep_no_function_alive() -> None:
    scope = program("def f(): return 1")
    reference = weakref.ref(scope["f"])
    function_token(scope["f"])
    scope.clear()
    gc.collect()
    assert reference() is None


def test_another_process_has_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = program("def f(): return 1")
    monkeypatch.setattr(tokens, "_process", tokens._process)
    before = function_token(scope["f"])
    tokens.renew()
    assert function_token(scope["f"]) != before


HOLDERS = """
import functools
def make():
    n = 0
    def change():
        nonlocal n
        n += 1
    def get(): return n
    return change, get
change, get = make()
table, partial = {"get": get}, functools.partial(get)
def by_table(): return table["get"]()
def by_partial(): return partial()
"""


@pytest.mark.parametrize("name", ["by_table", "by_partial"])
def test_what_a_function_in_a_container_holds_is_seen(client: int, name: str) -> None:
    scope = program(HOLDERS)
    for wanted in (0, 1, 2):
        assert arrive(scope[name])() == wanted
        scope["change"]()


def test_functions_that_lead_to_themselves_have_tokens(client: int) -> None:
    scope = program(
        "def make():\n"
        "    def even(n): return n == 0 or odd(n - 1)\n"
        "    def odd(n): return n != 0 and even(n - 1)\n"
        "    return even\n"
        "even = make()\n"
        "table = [even]\n"
        "def f(n): return table[0](n)"
    )
    assert arrive(scope["f"])(10)
    assert dumps(scope["f"]) == dumps(scope["f"])


def test_what_changes_in_place_in_a_default_is_seen(client: int) -> None:
    scope = program("def f(x=[], *, k={}): return x, k")
    assert arrive(scope["f"])() == ([], {})
    scope["f"].__defaults__[0].append(1)
    assert arrive(scope["f"])() == ([1], {})
    scope["f"].__kwdefaults__["k"][2] = 3
    assert arrive(scope["f"])() == ([1], {2: 3})
