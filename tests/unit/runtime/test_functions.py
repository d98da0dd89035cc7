"""Functions are sent as they are at the call, and pickled as seldom as that allows."""

from __future__ import annotations

import gc
import math
import os
import os.path
import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from achilles.errors import ArgumentPickleError
from achilles.runtime import functions, serialize
from achilles.runtime.functions import INLINE_MAX, FunctionTable, Pickled, bytes_of
from achilles.runtime.serialize import loads
from tests.unit.runtime import tasks


@pytest.fixture
def table() -> FunctionTable:
    return FunctionTable()


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was really pickled, in order."""
    seen: list[object] = []
    original = serialize.dumps

    def dumps(obj: object) -> bytes:
        seen.append(obj)
        return original(obj)

    monkeypatch.setattr(functions, "dumps", dumps)
    return seen


def main_module(source: str) -> dict[str, Any]:
    """The namespace of a `__main__` with that source."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<main>", "exec", dont_inherit=True), scope)
    return scope


def call(encoded: tuple[int, Pickled], *args: Any) -> Any:
    return loads(bytes_of(encoded[1]))(*args)


def test_importable_functions_are_pickled_once_and_numbered(
    table: FunctionTable, pickled: list[object]
) -> None:
    for fn in (tasks.add, os.getpid, tasks.Counter, math.sin):
        number, data = table.encode(fn)
        assert number > 0
        assert table.encode(fn) == (number, data)
        assert loads(data) is fn
    assert len(pickled) == 4
    assert len({table.encode(fn)[0] for fn in (tasks.add, os.getpid, tasks.Counter)}) == 3
    assert repr(table) == "<FunctionTable 4 functions, 4 numbers>"


def test_a_function_by_value_goes_inline_first_and_by_number_then(
    table: FunctionTable, pickled: list[object]
) -> None:
    f = main_module("def f(x): return x + 1")["f"]
    assert table.encode(f)[0] == 0
    number, data = table.encode(f)
    assert number > 0
    assert table.encode(f) == (number, data)
    assert call((number, data), 4) == 5
    assert pickled == [f]


def test_shared_functions_get_a_number_at_once(table: FunctionTable) -> None:
    f = main_module("def f(x): return x + 1")["f"]
    assert table.encode(f, shared=True)[0] > 0
    assert table.encode(partial(tasks.add, 1), shared=True)[0] > 0


def test_large_functions_get_a_number_at_once(table: FunctionTable) -> None:
    text = "x" * INLINE_MAX
    first = table.encode(lambda: text)
    assert first[0] > 0
    assert call(first) == text


def test_equal_bytes_have_one_number(table: FunctionTable) -> None:
    numbers = {table.encode(partial(tasks.add, 1), shared=True)[0] for _ in range(3)}
    assert len(numbers) == 1
    assert table.encode(partial(tasks.add, 2), shared=True)[0] not in numbers


def test_numbers_are_bounded_and_never_used_twice(
    table: FunctionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "NUMBERS_MAX", 3)
    calls = [partial(tasks.add, n) for n in range(6)]
    numbers = [table.encode(one, shared=True)[0] for one in (*calls, calls[0])]
    assert numbers == [1, 2, 3, 4, 5, 6, 7]
    assert len(table._numbers) == 3


# --- Changes must be seen -------------------------------------------------------------------------

CHANGES: dict[str, tuple[str, str, Any, Any]] = {
    # what changes: the module, the change, the result before and after it
    "global": (
        """
K = 1
def f(): return K
""",
        "K = 2",
        1,
        2,
    ),
    "global in a nested function": (
        """
K = 1
def f():
  def g(): return K
  return g()
""",
        "K = 2",
        1,
        2,
    ),
    "global in a comprehension": (
        """
K = 1
def f(): return [K for _ in 'a']
""",
        "K = 2",
        [1],
        [2],
    ),
    "global that was missing": (
        """
def f():
  try: return K
  except NameError: return 0
""",
        "K = 2",
        0,
        2,
    ),
    "builtin that is hidden": ("def f(): return len('ab')", "len = lambda _: 7", 2, 7),
    "list": (
        """
K = [1]
def f(): return K
""",
        "K.append(2)",
        [1],
        [1, 2],
    ),
    "list in a tuple": (
        """
K = ([1],)
def f(): return K
""",
        "K[0].append(2)",
        ([1],),
        ([1, 2],),
    ),
    "dict": (
        """
K = {}
def f(): return K
""",
        "K[1] = 2",
        {},
        {1: 2},
    ),
    "instance": (
        """
class C: pass
K = C()
K.a = 1
def f(): return K.a
""",
        "K.a = 2",
        1,
        2,
    ),
    "class": (
        """
class C: a = 1
def f(): return C.a
""",
        "C.a = 2",
        1,
        2,
    ),
    "helper": (
        """
def g(): return 1
def f(): return g()
""",
        "def g(): return 2",
        1,
        2,
    ),
    "helper's global": (
        """
K = 1
def g(): return K
def f(): return g()
""",
        "K = 2",
        1,
        2,
    ),
    "helper's code": (
        """
def g(): return 1
def f(): return g()
""",
        "g.__code__ = (lambda: 2).__code__",
        1,
        2,
    ),
    "code": ("def f(): return 1", "f.__code__ = (lambda: 2).__code__", 1, 2),
    "default": ("def f(x=1): return x", "f.__defaults__ = (2,)", 1, 2),
    "mutable default": ("def f(x=[1]): return x", "f.__defaults__[0].append(2)", [1], [1, 2]),
    "keyword default": ("def f(*, x=1): return x", "f.__kwdefaults__['x'] = 2", 1, 2),
    "keyword default that is new": (
        """
def f(*, x): return x
f.__kwdefaults__ = {'x': 1}
""",
        "f.__kwdefaults__ = {'x': 2}",
        1,
        2,
    ),
    "mutable keyword default": (
        "def f(*, x=[1]): return x",
        "f.__kwdefaults__['x'].append(2)",
        [1],
        [1, 2],
    ),
    "attribute": ("def f(): return getattr(f, 'a', 1)", "f.a = 2", 1, 2),
    "closure": (
        """
def make():
  k = 1
  def f(): return k
  def change():
    nonlocal k
    k = 2
  return f, change
f, change = make()
""",
        "change()",
        1,
        2,
    ),
    "mutable closure": (
        """
def make():
  k = []
  return lambda: k, lambda: k.append(2)
f, change = make()
""",
        "change()",
        [],
        [2],
    ),
    "function in a closure": (
        """
def make():
  def g(): return 1
  def f(): return g()
  def change():
    nonlocal g
    g = lambda: 2
  return f, change
f, change = make()
""",
        "change()",
        1,
        2,
    ),
    "closure without a value": (
        """
def make():
  def f():
    try: return k
    except NameError: return 0
  def change():
    nonlocal k
    k = 2
  if 0: k = 1
  return f, change
f, change = make()
""",
        "change()",
        0,
        2,
    ),
    "annotation": (
        "def f(x: 'int' = 0): return f.__annotations__['x']",
        "f.__annotations__['x'] = 'str'",
        "int",
        "str",
    ),
    "redefinition": ("def f(): return 1", "def f(): return 2", 1, 2),
}


@pytest.mark.bad_input(67)
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(table: FunctionTable, what: str) -> None:
    source, change, before, after = CHANGES[what]
    scope = main_module(source)
    for _ in range(3):
        assert call(table.encode(scope["f"])) == before
    exec(change, scope)
    for _ in range(3):
        assert call(table.encode(scope["f"])) == after


CACHED = {
    "constants": "A, B, C = 1, 'b', (2.5, None, (b'',))\ndef f(): return A, B, C",
    "modules": "import math, os\ndef f(): return math.pi, os.getcwd()",
    "importable functions": "from os.path import join\ndef f(): return join('a', 'b')",
    "importable classes": "from collections import OrderedDict\ndef f(): return OrderedDict()",
    "helpers": "def g(): return h()\ndef h(): return 1\ndef f(): return g()",
    "recursion": "def f(n=3): return n and f(n - 1)",
    "mutual recursion": "def g(n): return n and f(n - 1)\ndef f(n=3): return n and g(n - 1)",
    "closures": "def make(k):\n  return lambda: k\nf = make(3)",
    "recursive closures": "def make():\n  def f(n=3): return n and f(n - 1)\n  return f\nf = make()",
    "annotations": "def f(x: int = 1) -> list[int]: return [x]",
    "keyword defaults": "def f(*, x=1): return x",
}


@pytest.mark.parametrize("what", CACHED)
def test_what_cannot_change_is_pickled_once(
    table: FunctionTable, pickled: list[object], what: str
) -> None:
    scope = main_module(CACHED[what])
    wanted = scope["f"]()
    for _ in range(4):
        assert call(table.encode(scope["f"])) == wanted
    assert len(pickled) == 1


def test_submodules_that_are_loaded_later_are_seen(
    table: FunctionTable, pickled: list[object]
) -> None:
    f = main_module("import os\nimport xml\ndef f(): return xml.etree")["f"]
    table.encode(f)
    table.encode(f)
    assert len(pickled) == 1
    sys.modules["loaded_for_this_test"] = ModuleType("loaded_for_this_test")
    try:
        table.encode(f)
    finally:
        del sys.modules["loaded_for_this_test"]
    assert len(pickled) == 2


def test_a_module_that_is_registered_by_value_is_seen(
    table: FunctionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("registered_later")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("def g(): return 5", module.__dict__)
    f = main_module("from registered_later import g\ndef f(): return g()")["f"]
    g = module.g
    table.encode(f)
    table.encode(g)
    cloudpickle.register_pickle_by_value(module)
    try:
        by_value = [table.encode(one) for one in (f, g, f, g)]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    monkeypatch.delitem(sys.modules, module.__name__)
    assert [call(one) for one in by_value] == [5] * 4


def test_too_large_a_web_of_functions_is_not_watched(
    table: FunctionTable, pickled: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "WATCHES_MAX", 3)
    source = "\n".join(f"def f{n}(): return f{n + 1}()" for n in range(5)) + "\ndef f5(): return 7"
    f = main_module(source)["f0"]
    for _ in range(2):
        assert call(table.encode(f)) == 7
    assert len(pickled) == 2


# --- Callables with state, and errors -------------------------------------------------------------


def test_callables_with_state_are_pickled_at_each_call(table: FunctionTable) -> None:
    counter = tasks.Counter()
    for count in range(3):
        assert call(table.encode(counter)) == count + 1
        assert call(table.encode(counter.__call__)) == count + 1
        assert call(table.encode(partial(counter))) == count + 1
        counter()


def test_what_is_not_callable(table: FunctionTable) -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match="a callable is needed, not int"):
        table.encode(wrong)


@pytest.mark.bad_input(33)
def test_coroutine_functions(table: FunctionTable) -> None:
    async def coroutine() -> None: ...

    async def generator() -> Any:
        yield

    for fn in (coroutine, generator):
        with pytest.raises(TypeError, match="is a coroutine function; achilles runs plain"):
            table.encode(fn)


def test_a_function_that_uses_what_cannot_be_pickled_names_it(table: FunctionTable) -> None:
    scope = main_module("import threading\nLOCK = [threading.Lock()]\ndef f(): return LOCK, len")
    with pytest.raises(
        ArgumentPickleError, match="which is the global 'LOCK' or part of it; nothing was sent"
    ):
        table.encode(scope["f"])


def test_a_heavy_function_that_is_pickled_again_and_again_is_said_once(
    table: FunctionTable, caplog: pytest.LogCaptureFixture
) -> None:
    """A list may have changed between two calls of `submit`; small ones are sent in silence."""
    scope = main_module(
        "TABLE = list(range(100_000))\nFEW = [1]\ndef f(): return TABLE\ndef g(): return FEW"
    )
    for _ in range(3 * functions.HEAVY_TIMES):
        table.encode(scope["f"])
        table.encode(scope["g"])
    (record,) = caplog.records
    assert "f() is sent anew at each submit" in record.getMessage()


@pytest.mark.parametrize("error", [TypeError("no"), SystemExit(1)], ids=repr)
def test_functions_that_cannot_be_pickled(table: FunctionTable, error: BaseException) -> None:
    held = tasks.Unpicklable(error)
    with pytest.raises(ArgumentPickleError, match=r"<lambda>\(\) cannot be pickled: "):
        table.encode(lambda: held)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["def f(n=3): return n and f(n - 1)", CACHED["recursive closures"]]
)
def test_functions_are_not_kept_alive(table: FunctionTable, source: str) -> None:
    scope = main_module(source)
    f: Callable[..., Any] = scope.pop("f")
    table.encode(f)
    reference = weakref.ref(f)
    del f, scope
    gc.collect()
    assert reference() is None
    assert not table._entries


def test_entries_are_bounded(table: FunctionTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "ENTRIES_MAX", 3)
    kept = [main_module(f"def f(): return {n}")["f"] for n in range(10)]
    for n, f in enumerate(kept):
        assert call(table.encode(f)) == n
        assert len(table._entries) <= 3


def test_a_closure_of_a_module_is_seen_to_change(table: FunctionTable) -> None:
    """Its module can be imported elsewhere, but it is not to be found there."""
    value = 1

    def call() -> int:
        return value

    first = table.encode(call, True)
    assert table.encode(call, True)[1] is first[1]
    value = 2
    assert loads(table.encode(call, True)[1])() == 2


def test_a_class_that_travels_by_value_is_seen_to_change(table: FunctionTable) -> None:
    class Local:
        value = 1

    assert loads(table.encode(Local)[1]).value == 1
    Local.value = 2
    assert loads(table.encode(Local)[1]).value == 2


class _Executor:
    """Pickles as the same while it is the same, as `DistributedExecutor` does."""

    _is_pickled_by_identity = True


def test_an_executor_in_a_closure_or_global_is_fixed() -> None:
    """A task that submits tasks names its executor;
    it must not be pickled anew at each call for that.
    """
    table, executor = FunctionTable(), _Executor()

    def call() -> object:
        return executor

    first = table.encode(call, True)
    assert table.encode(call, True)[1] is first[1]
    executor = _Executor()
    assert table.encode(call, True)[1] is not first[1]
