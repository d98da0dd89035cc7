"""Forms of payloads, which pickler is taken, and the errors that name what cannot be pickled."""

from __future__ import annotations

import importlib
import importlib.machinery
import pickle
import sys
import threading
from concurrent.futures.process import _RemoteTraceback
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from achilles.errors import ArgumentPickleError, ResultPickleError, ResultUnpickleError
from achilles.runtime import shared
from achilles.runtime.arguments import Attached
from achilles.runtime.serialize import (
    ERROR,
    LARGE,
    VALUE,
    describe,
    dump_result,
    dumps,
    dumps_call,
    encode,
    is_stateless,
    join_inline,
    load_outcome,
    loads,
    split_inline,
)
from achilles.runtime.tracebacks import dump_error
from tests.unit.runtime import tasks

np = pytest.importorskip("numpy")


class Reducing:
    """Raises what it is told to when it is pickled or unpickled."""

    def __init__(self, error: BaseException, when: str) -> None:
        self.error, self.when = error, when

    def __reduce__(self) -> Any:
        if self.when == "pickled":
            raise self.error
        return tasks.raise_it, (self.error,)


# --- Forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, 7, "text", b"\x01\x02", [1, {"a": (2.5, None)}], list(range(100_000)), bytes(LARGE + 1)],
    ids=lambda value: type(value).__name__,
)
def test_plain_values(value: object) -> None:
    payload = encode(value)
    assert payload == pickle.dumps(value, 5)
    assert loads(payload) == value
    assert loads(memoryview(payload)) == value
    assert loads((payload,)) == value
    assert loads([payload[:3], payload[3:]]) == value
    assert dump_result(value, None) == (VALUE, payload)
    assert load_outcome(VALUE, payload) == (value, None)


def test_calls() -> None:
    assert loads(dumps_call((1, "a"), {"x": 2})) == ((1, "a"), {"x": 2})
    assert loads(dumps_call((), {})) == ((), {})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["shared", "bytes", "parts"])
def test_large_buffers_stay_out_and_come_back_writable(
    monkeypatch: pytest.MonkeyPatch, count: int, how: str
) -> None:
    if how != "shared":
        monkeypatch.setattr(shared, "IS_AVAILABLE", False)
    arrays = [np.arange(LARGE + n, dtype=np.uint8) for n in range(count)]
    small = np.ones(4)
    payload: Any = dumps_call((*arrays, small), {})
    assert payload[0] == 0x01
    assert type(payload) is (memoryview if how == "shared" else bytes)
    assert len(payload) < sum(array.nbytes for array in arrays) + 1000
    expected = [array.copy() for array in arrays]
    for array in arrays:
        array[:] = 0  # the value is that of the call
    if how == "parts":
        payload = (payload[:100], payload[100:5000], payload[5000:])
    back, _ = loads(payload)
    for array, wanted in zip(back[:-1], expected):
        assert array.flags.aligned
        assert (array == wanted).all()
        array += 1
    assert (back[-1] == small).all()
    again, _ = loads(payload if how != "shared" else bytes(payload))
    if how != "shared":
        assert (again[0] == expected[0]).all()


def test_read_only_buffers_stay_read_only() -> None:
    array = np.zeros(LARGE)
    array.flags.writeable = False
    ((back,), _) = loads(dumps_call((array,), {}))
    assert not back.flags.writeable


def test_results_are_not_copied_before_they_are_written() -> None:
    array = np.zeros(LARGE)
    status, payload = dump_result(array, None)
    assert status == VALUE
    assert isinstance(payload, list)
    assert any(
        np.shares_memory(np.frombuffer(part, np.uint8), array) for part in payload if len(part)
    )
    value, error = load_outcome(status, tuple(payload))
    assert error is None
    assert (value == array).all()


def test_results_that_only_cloudpickle_takes_keep_their_buffers_out() -> None:
    array = np.zeros(LARGE)
    _, payload = dump_result((lambda: 5, array), None)
    assert isinstance(payload, list)
    function, back = loads(payload)
    assert function() == 5
    assert back.shape == array.shape


@pytest.mark.parametrize("call", [dumps_call((1, 2), {"y": 3}), None], ids=["small", "large"])
def test_functions_that_travel_with_their_call(call: Any) -> None:
    if call is None:
        call = dumps_call((np.ones(LARGE),), {})
    function, rest = split_inline(join_inline(dumps(tasks.add), call))
    assert function is tasks.add
    assert repr(loads(rest)) == repr(loads(call))
    function, rest = split_inline((join_inline(dumps(tasks.add), call),))
    assert function is tasks.add


def test_what_is_no_payload() -> None:
    with pytest.raises(pickle.UnpicklingError):
        loads(b"\x03junk")
    with pytest.raises(ValueError, match="without its function"):
        split_inline(b"\x80junk")


# --- Which pickler --------------------------------------------------------------------------------


def test_functions_and_classes_of_main_travel_by_value() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec("class Point:\n  x = 1\ndef f(): return Point()", scope)
    assert loads(dumps(scope["Point"])).x == 1
    assert loads(dumps_call((scope["f"],), {}))[0][0]().x == 1


def test_text_that_looks_like_main_does_no_harm() -> None:
    assert loads(dumps("__main__")) == "__main__"
    assert loads(dumps_call(("__main__",), {})) == (("__main__",), {})


def test_modules_registered_by_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "registered_for_once.py").write_text("def f(): return 5")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("registered_for_once")
    assert dumps(module.f) == pickle.dumps(module.f, 5)
    cloudpickle.register_pickle_by_value(module)
    try:
        data = dumps_call((module.f,), {})
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    monkeypatch.delitem(sys.modules, module.__name__)
    ((function,), _) = loads(data)
    assert function() == 5


def test_without_cloudpickles_own_set_its_copy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from achilles.runtime import serialize

    monkeypatch.setattr(serialize, "_registered", None)
    monkeypatch.delattr(cloudpickle.cloudpickle, "_PICKLE_BY_VALUE_MODULES")
    monkeypatch.setattr(
        cloudpickle.cloudpickle, "list_registry_pickle_by_value", lambda: {"a_module"}
    )
    assert serialize.by_value_modules() == {"a_module"}
    assert serialize._registered is None
    monkeypatch.delitem(sys.modules, "cloudpickle.cloudpickle")
    assert serialize.by_value_modules() == set()


def test_a_cloudpickle_that_another_thread_imports_has_nothing_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has not even the function that would tell."""
    from achilles.runtime import serialize

    half = ModuleType("cloudpickle.cloudpickle")
    half.__spec__ = importlib.machinery.ModuleSpec(half.__name__, None)
    half.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setattr(serialize, "_registered", None)
    monkeypatch.setitem(sys.modules, half.__name__, half)
    assert serialize.by_value_modules() == set()
    assert serialize._registered is None


# --- Errors ---------------------------------------------------------------------------------------


def two(x: object, lock: object, *, extra: object = None) -> None:
    """A function whose parameters have names."""


@pytest.mark.bad_input(1, 2, 5)
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (1, threading.Lock()),
            {},
            "argument 2 ('lock') of two() cannot be pickled: cannot pickle '_thread.lock' object",
        ),
        ((1, 2), {"extra": (n for n in "ab")}, "argument 'extra' of two() cannot be pickled"),
        ((1, 2, 3, sys._getframe()), {}, "argument 4 of two() cannot be pickled"),
        ((Reducing(ValueError("by design"), "pickled"),), {}, "argument 1 ('x') of two()"),
        ((Reducing(SystemExit(3), "pickled"),), {}, "argument 1 ('x') of two()"),
    ],
    ids=["lock", "generator", "frame", "raises", "exits"],
)
def test_arguments_that_cannot_be_pickled(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentPickleError) as caught:
        dumps_call(args, kwargs, two)
    assert str(caught.value).startswith(message)
    assert "(it is of type " in str(caught.value)
    assert str(caught.value).endswith(
        "; nothing was sent; pass what it can be made from, and make it in the task"
    )
    assert isinstance(caught.value, pickle.PicklingError)
    assert caught.value.__cause__ is not None


def test_without_a_function_there_are_no_names() -> None:
    with pytest.raises(ArgumentPickleError, match=r"^argument 1 cannot be pickled: cannot pickle"):
        dumps_call((threading.Lock(),), {})
    with pytest.raises(ArgumentPickleError, match=r"^argument 1 of max\(\) cannot be pickled"):
        dumps_call((threading.Lock(),), {}, max)


@pytest.mark.bad_input(3)
def test_open_files_are_warned_of() -> None:
    with open(__file__) as file:
        with pytest.warns(UserWarning, match=r"an argument of two\(\), was copied by content"):
            ((_, copy), _) = loads(dumps_call((1, file), {}, two))
        assert copy.readline().startswith('"""Forms')


@pytest.mark.bad_input(4)
def test_values_that_are_nested_too_deeply() -> None:
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(ArgumentPickleError, match="nested too deeply to pickle"):
        dumps_call((1, deep), {}, two)
    status, payload = dump_result(deep, two)
    assert status == ERROR
    _, error = load_outcome(status, payload)
    assert "nested too deeply" in str(error)
    assert len(str(error)) < 1000
    while deep:  # one by one: freeing it at once recurses as well
        deep = deep.pop()


@pytest.mark.bad_input(5)
def test_an_interrupt_while_pickling_reaches_the_user() -> None:
    with pytest.raises(KeyboardInterrupt):
        dumps_call((Reducing(KeyboardInterrupt(), "pickled"),), {})


@pytest.mark.bad_input(8)
@pytest.mark.parametrize("error", [TypeError("no"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_results_that_cannot_be_pickled(error: BaseException) -> None:
    status, payload = dump_result(Reducing(error, "pickled"), tasks.add)
    assert status == ERROR
    _, back = load_outcome(status, payload)
    assert type(back) is ResultPickleError
    assert str(back).startswith("the value returned by add() cannot be pickled: ")
    assert "of type Reducing: <" in str(back)


@pytest.mark.bad_input(8)
def test_the_repr_of_a_result_is_cut_and_may_fail() -> None:
    class Bad(list[Any]):
        def __repr__(self) -> str:
            raise SystemExit

    lock = threading.Lock()
    for value, text in (([lock] * 1000, "…"), (Bad([lock]), "its repr() raised SystemExit")):
        _, back = load_outcome(*dump_result(value, tasks.add))
        assert text in str(back)
        assert len(str(back)) < 400


@pytest.mark.bad_input(10)
@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_results_that_cannot_be_unpickled(error: BaseException) -> None:
    value, back = load_outcome(VALUE, dumps(Reducing(error, "unpickled")))
    assert value is None
    assert type(back) is ResultUnpickleError
    assert type(back.__cause__) is type(error)


@pytest.mark.parametrize("payload", [b"", b"\x80", b"\x01\xff\xff\xff\xff", ()], ids=repr)
def test_results_that_are_no_payloads(payload: Any) -> None:
    for status in (VALUE, ERROR):
        assert type(load_outcome(status, payload)[1]) is ResultUnpickleError


@pytest.mark.parametrize("outcome", [5, ("no exception", "text"), (ValueError(),)], ids=repr)
def test_errors_that_are_none(outcome: object) -> None:
    assert type(load_outcome(ERROR, dumps(outcome))[1]) is ResultUnpickleError


def test_an_error_has_the_remote_traceback_as_its_cause() -> None:
    try:
        tasks.raise_it(ValueError("far away"))
    except ValueError as error:
        payload = dump_error(error)
    value, back = load_outcome(ERROR, payload)
    assert value is None
    assert repr(back) == "ValueError('far away')"
    assert back is not None
    assert type(back.__cause__) is _RemoteTraceback
    assert str(back.__cause__).startswith('\n"""\nTraceback (most recent call last):\n')
    assert str(back.__cause__).endswith('ValueError: far away\n"""')


# --- Names ----------------------------------------------------------------------------------------


def test_how_callables_are_called() -> None:
    assert describe(tasks.add) == "add()"
    assert describe(tasks.Counter.__call__) == "Counter.__call__()"
    assert describe(partial(tasks.add, 1)) == "add()"
    assert describe(tasks.Counter()) == "Counter object"
    assert describe(len) == "len()"


def test_what_has_no_state() -> None:
    assert all(map(is_stateless, (tasks.add, len, int, lambda: 1, tasks.Counter)))
    stateful: tuple[object, ...] = (
        partial(len),
        [].append,
        tasks.Counter(),
        tasks.Counter().__call__,
    )
    assert not any(map(is_stateless, stateful))


def test_buffers_before_what_only_cloudpickle_takes_stay_in_their_places() -> None:
    """The first attempt had taken some of them."""
    one, two = np.full(LARGE, 1, np.uint8), np.full(LARGE, 2, np.uint8)
    payload = dumps_call((one, lambda: 3, two), {})
    assert not isinstance(payload, Attached)
    (first, function, second), _ = loads(payload)
    assert (first[0], function(), second[0]) == (1, 3, 2)
    assert len(payload) < 3 * LARGE
