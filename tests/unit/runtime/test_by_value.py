"""Functions and classes of `__main__` in the process that they travel to: what they share, and what stays as it was."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from achilles.runtime import by_value, context
from achilles.runtime.by_value import dumps
from achilles.runtime.serialize import LARGE, loads

CLIENTS = itertools.count(1000)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process is the runner of that client's tasks, too."""
    number = next(CLIENTS)
    monkeypatch.setattr(context, "client", number)
    yield number
    by_value.forget(number)
    by_value.switch_to(0)


def program(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "__main__", "__file__": "program.py"}
    exec(text, scope)
    return scope


def arrive(value: Any, **options: Any) -> Any:
    return loads(dumps(value, **options))


COUNTER = """
calls, items = 0, []
def count():
    global calls
    calls += 1
    items.append(calls)
    return calls
def seen():
    return calls, items
"""


def test_functions_that_travel_apart_share_their_globals(client: int) -> None:
    scope = program(COUNTER)
    count, seen = arrive(scope["count"]), arrive(scope["seen"])
    assert [count(), count()] == [1, 2]
    assert seen() == arrive(scope["seen"])() == (2, [1, 2])
    assert scope["calls"] == 0
    assert scope["items"] == []


def test_a_function_that_comes_again_is_the_same(client: int) -> None:
    scope = program("def f(seen=[]): seen.append(1); return len(seen)")
    assert arrive(scope["f"]) is arrive(scope["f"])
    assert [arrive(scope["f"])() for _ in range(3)] == [1, 2, 3]


def test_what_the_program_changed_is_seen_and_the_rest_stays(client: int) -> None:
    scope = program("a, b = 1, 1\ndef f(): return a, b\ndef set_b(n):\n    global b\n    b = n")
    first, set_b = arrive(scope["f"]), arrive(scope["set_b"])
    set_b(7)
    assert first() == (1, 7)
    scope["a"] = 2
    second = arrive(scope["f"])
    assert second() == (2, 7)
    assert first() == (1, 7), "a task that was submitted before the change"
    scope["a"] = 1
    assert arrive(scope["f"])() == (1, 7)
    scope["b"] = 3
    assert arrive(scope["f"])() == (1, 3)


def test_a_helper_that_was_defined_anew_is_seen(client: int) -> None:
    scope = program("def h(): return 1\ndef f(): return h()")
    old = arrive(scope["f"])
    exec("def h(): return 2", scope)
    assert (old(), arrive(scope["f"])()) == (1, 2)
    scope["h"].__defaults__ = ()
    assert arrive(scope["f"])() == 2


def test_a_decorated_helper_keeps_its_state(client: int) -> None:
    text = """
def counting(fn):
    calls = []
    def wrapper():
        calls.append(fn())
        return len(calls)
    return wrapper
@counting
def h(): return 1
def f(): return h()
def g(): return h()
"""
    scope = program(text)
    assert [arrive(scope["f"])(), arrive(scope["g"])(), arrive(scope["f"])()] == [1, 2, 3]


def test_what_cannot_travel_on_is_the_other_runners_own(client: int) -> None:
    """A task that submits: what an initializer made on its runner, another makes on the next."""
    scope = program(
        "lock = None\ndef start(l):\n    global lock\n    lock = l\ndef f(): return lock"
    )
    arrive(scope["start"])(threading.Lock())
    here = arrive(scope["f"])
    assert here() is not None
    assert arrive(here) is here


def test_large_values_come_anew(client: int) -> None:
    scope = program(f"data = bytearray({LARGE})\ndef f(): return data")
    scope["data"] = b"x" * LARGE
    assert arrive(scope["f"])() == b"x" * LARGE
    scope["data"] = b"y" * LARGE
    assert arrive(scope["f"])() == b"y" * LARGE


def test_clients_and_programs_are_apart(client: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = program(COUNTER)
    arrive(scope["count"])()
    assert arrive(program(COUNTER)["seen"])() == (0, [])
    mine = sys.modules["__main__"]
    other = next(CLIENTS)
    monkeypatch.setattr(context, "client", other)
    assert arrive(scope["seen"])() == (0, [])
    assert sys.modules["__main__"] is not mine
    by_value.switch_to(client)
    assert sys.modules["__main__"] is mine
    by_value.forget(other)


def test_a_client_that_is_gone_leaves_nothing(client: int) -> None:
    arrive(program(COUNTER)["count"])
    assert any(key[0] == client for key in by_value._namespaces)
    by_value.forget(client)
    assert not any(key[0] == client for key in by_value._namespaces)
    assert client not in by_value._mains


def test_old_states_are_bounded(client: int) -> None:
    scope = program("a = 0\ndef f(): return a")
    for scope["a"] in range(3 * by_value.NAMESPACES_MAX):
        assert arrive(scope["f"])() == scope["a"]
    (known,) = (found for key, found in by_value._namespaces.items() if key[0] == client)
    assert len(known) == by_value.NAMESPACES_MAX
    assert len(by_value._records) == sum(map(len, by_value._namespaces.values()))


def test_outside_of_a_runner_each_pickle_is_by_itself() -> None:
    scope = program(COUNTER)
    before = sys.modules["__main__"]
    assert [arrive(scope["count"])() for _ in range(2)] == [1, 1]
    assert sys.modules["__main__"] is before


def test_the_same_is_the_same_bytes() -> None:
    scope = program(COUNTER)
    assert dumps(scope["count"]) == dumps(scope["count"])
    scope["items"].append(1)
    assert dumps(scope["count"]) != dumps(program(COUNTER)["count"])


def test_a_function_says_in_which_file_it_is() -> None:
    """Tracebacks show the line then; cloudpickle 3.1.3 leaves the name out."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def outer(): return lambda: 1", "program.py", "exec"), scope)
    there = arrive(scope["outer"])
    assert there.__code__.co_filename == there().__code__.co_filename == "program.py"


def test_main_has_a_file_where_it_is_there(client: int) -> None:
    scope = program("def f(): return __file__")
    assert arrive(scope["f"])() == "program.py"
    assert not hasattr(sys.modules["__main__"], "__file__")
    scope["__file__"] = __file__
    assert arrive(scope["f"])() == __file__
    assert sys.modules["__main__"].__file__ == __file__


# --- Results --------------------------------------------------------------------------------------


def test_a_result_names_the_programs_own() -> None:
    def closure() -> int:
        return five

    five = 5
    found = arrive(test_the_same_is_the_same_bytes, is_result=True)
    assert found is test_the_same_is_the_same_bytes
    assert arrive(closure, is_result=True)() == 5
    scope = program("def f(): return 1\ndef g(): return f() + 1")
    made = arrive(scope["g"], is_result=True)
    assert made is not scope["g"]
    assert made() == 2


def test_a_class_that_is_there_stays_as_it_is() -> None:
    scope = program("class C:\n    n = 0\n    def get(self): return self.n")
    kind = scope["C"]
    get = kind.get
    for is_result in (False, True):
        data = dumps(kind(), is_result=is_result)
        kind.n = 5
        assert type(loads(data)) is kind
        assert (kind.n, kind.get) == (5, get)
        kind.n = 0


def forgotten(text: str) -> tuple[bytes, bytes]:
    """Two pickles of a class C, between which n was changed to 1; then nobody knows it any more."""
    scope = program(text)
    kind = scope["C"]
    first = dumps(kind)
    kind.n = 1
    second = dumps(kind)
    del kind
    scope.clear()
    gc.collect()
    return first, second


def test_a_class_comes_once_and_again_when_it_changed() -> None:
    first, second = forgotten("class C:\n    n = 0\n    def get(self): return self.n")
    kind = loads(first)
    kind.n = 7
    assert loads(first) is kind
    assert kind.n == 7
    assert loads(second) is kind
    assert kind.n == 1


def test_slots_are_slots() -> None:
    first, _ = forgotten(
        "class B:\n    __slots__ = ()\n"
        "class C(B):\n    __slots__ = ('__x', 'y')\n    n = 0\n    def __init__(self): self.__x = 3"
    )
    kind = loads(first)
    assert vars(kind)["_C__x"].__get__(kind()) == 3
    assert not hasattr(kind(), "__dict__")
    assert kind().__reduce_ex__(5)[2] == (None, {"_C__x": 3})


def test_a_class_within_a_class_keeps_its_name() -> None:
    first, _ = forgotten("class O:\n    class I: pass\nC = O.I")
    assert loads(first).__qualname__ == "O.I"
