from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from achilles.errors import ResultUnpickleError, SealError, TaskCrashedError
from achilles.runtime.allowed import Allowed
from achilles.runtime.serialize import ERROR, VALUE, encode, load_outcome
from achilles.runtime.tracebacks import dump_error
from tests.security.attacks import attack
from tests.unit.runtime import tasks


class Named:
    """Its pickle calls something."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = call
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    class Inner:
        pass


def make_point(x: int) -> Point:
    return Point(x)


def load(value: object, *names: str) -> Any:
    encoded = encode(value)
    payload = encoded if isinstance(encoded, bytes) else b"".join(encoded)
    outcome, error = load_outcome(VALUE, Allowed(names).guard(payload))
    if error is not None:
        raise error
    return outcome


PLAIN = [
    None,
    [1, 2.5, "text", b"bytes", True],
    {"a": (1, 2), "b": {3, 4}, "c": frozenset({5})},
    complex(1, 2),
    bytearray(b"x"),
    range(3),
    slice(1, 2),
    ...,
    NotImplemented,
    collections.OrderedDict(a=1),
    collections.Counter("aab"),
    collections.deque([1]),
    collections.defaultdict(list, a=[1]),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    datetime.timedelta(1),
    decimal.Decimal("1.5"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=5),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_is_always_allowed(value: object) -> None:
    assert load(value, "only.this") == value


@pytest.mark.parametrize(
    "error", [ValueError("x"), SealError("x"), TaskCrashedError("x"), KeyboardInterrupt()]
)
def test_so_are_pythons_exceptions_and_ours(error: BaseException) -> None:
    payload = Allowed(["only.this"]).guard(dump_error(error))
    _, found = load_outcome(ERROR, payload)
    assert type(found) is type(error)
    assert found.args == error.args


def test_other_exceptions_are_refused_and_named() -> None:
    payload = dump_error(subprocess.CalledProcessError(1, "x"))
    _, found = load_outcome(ERROR, Allowed(["numpy"]).guard(payload))
    assert isinstance(found, ResultUnpickleError)
    assert "it names subprocess.CalledProcessError, which the setting client.results" in str(found)


@attack("T25")
@pytest.mark.parametrize(
    "call",
    [os.system, eval, exec, getattr, pickle.loads, subprocess.Popen, type, Path, np.load],
    ids=lambda call: call.__qualname__,
)
@pytest.mark.parametrize("names", [["only.this"], ["numpy"], ["tests"], ["builtins.getattr.x"]])
def test_what_could_run_code_is_refused(call: Any, names: list[str]) -> None:
    with pytest.raises(ResultUnpickleError, match="does not allow"):
        load(Named(call, "true"), *names)


@attack("T25")
def test_a_refused_module_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "never_imported.py").write_text("class Thing: pass")
    data = b"\x80\x05cnever_imported\nThing\n."
    _, error = load_outcome(VALUE, Allowed(["only.this"]).guard(data))
    assert "it names never_imported.Thing" in str(error)
    assert "never_imported" not in sys.modules


@pytest.mark.parametrize("size", [3, 1 << 18])
def test_numpys_arrays_and_scalars(size: int) -> None:
    array: Any = np.arange(size, dtype="float32")
    assert (load(array, "numpy") == array).all()
    assert load([array.dtype, np.float64(2.5), np.int8(3)], "numpy") == [array.dtype, 2.5, 3]
    with pytest.raises(ResultUnpickleError, match=r"names numpy\."):
        load(array, "mypackage")


@pytest.mark.parametrize("call", [np.memmap, np.vectorize, np.lib.npyio.NpzFile, np.save])
def test_numpys_other_classes_and_functions_are_not(call: Any) -> None:
    with pytest.raises(ResultUnpickleError, match="does not allow"):
        load(Named(call, "x"), "numpy")


@pytest.mark.parametrize("names", [["tests"], ["tests.unit"], [__name__], [f"{__name__}.Point"]])
def test_classes_of_a_listed_module(names: list[str]) -> None:
    assert load(Point(3), *names).x == 3


def test_functions_are_listed_one_by_one() -> None:
    with pytest.raises(ResultUnpickleError, match=r"test_allowed\.make_point"):
        load(Named(make_point, 3), __name__)
    assert load(Named(make_point, 3), f"{__name__}.make_point").x == 3


def test_a_listed_module_does_not_lead_to_another() -> None:
    """By what it has imported: the class that is found must be its own."""
    for path in ("subprocess.Popen", "pickle.Unpickler", "collections.UserDict"):
        data = b"\x80\x05\x8c%c%b\x8c%c%b\x93." % (
            *(len(__name__), __name__.encode()),
            *(len(path), path.encode()),
        )
        _, error = load_outcome(VALUE, Allowed(["tests"]).guard(data))
        assert "does not allow" in str(error)
    assert load(Point.Inner, "tests") is Point.Inner


def test_names_that_begin_alike_are_others() -> None:
    with pytest.raises(ResultUnpickleError):
        load(Point(3), "test", __name__[:-1], f"{__name__}.Poin")
    with pytest.raises(ResultUnpickleError):
        load(Named(tasks.fill, 1), "tests.unit.runtime.task")


def test_it_says_what_it_allows() -> None:
    assert repr(Allowed(["b", "a"])) == "<Allowed a, b>"


@pytest.mark.parametrize(
    "name",
    [
        "achilles.runtime.arrivals.make_class",
        "builtins.type",
        "builtins.eval",
        "cloudpickle.cloudpickle._make_function",
        "types.FunctionType",
    ],
)
def test_what_makes_code_is_not_allowed_although_it_is_listed(name: str) -> None:
    """Else the list would be undone by following the errors' advice."""
    module, _, attribute = name.rpartition(".")
    allowed = Allowed([name, module, module.partition(".")[0]])
    data = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match="does not allow, listed or not") as caught:
        allowed.unpickle(data)
    assert "add it there" not in str(caught.value)


def test_an_empty_list_allows_plain_data_alone() -> None:
    allowed = Allowed([])
    assert allowed.unpickle(pickle.dumps({"a": [1, decimal.Decimal(2)]})) == {
        "a": [1, decimal.Decimal(2)]
    }
    with pytest.raises(pickle.UnpicklingError, match="does not allow"):
        allowed.unpickle(pickle.dumps(Point(1)))
