"""Exceptions travel as themselves if they can, else as a `RemoteError` with the same story."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import pytest

from achilles.errors import RemoteError
from achilles.runtime import context
from achilles.runtime.serialize import loads
from achilles.runtime.tracebacks import dump_error


class KeywordOnly(Exception):
    def __init__(self, *, name: str) -> None:
        super().__init__(name)


class TwoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class Holding(Exception):
    def __init__(self, thing: object) -> None:
        super().__init__("holds a thing")
        self.thing = thing


class BadText(Exception):
    def __str__(self) -> str:
        raise SystemExit("in __str__")


class Exiting(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, (4,)


class Changing(Exception):
    """Comes back as something else."""

    def __reduce__(self) -> Any:
        return ValueError, ("changed",)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travel(error: BaseException, **options: Any) -> tuple[BaseException, str]:
    back: tuple[BaseException, str] = loads(dump_error(raised(error), **options))
    return back


def test_ordinary_exceptions_travel_as_themselves() -> None:
    for error in (ValueError(1, "a"), OSError(2, "no such file", "name"), SystemExit(3)):
        back, text = travel(error)
        assert type(back) is type(error)
        assert back.args == error.args
        assert text.startswith("Traceback (most recent call last):\n")
        assert "in raised\n" in text


@pytest.mark.bad_input(11, 12)
@pytest.mark.parametrize(
    ("error", "summary", "reason"),
    [
        (KeywordOnly(name="kw"), "KeywordOnly: kw", "cannot be made again from its args"),
        (TwoArguments(1, 2), "TwoArguments: 1 and 2", "missing 1 required positional argument"),
        (
            Holding(threading.Lock()),
            "Holding: holds a thing",
            "cannot pickle '_thread.lock' object",
        ),
        (Exiting("x"), "Exiting: x", "SystemExit: 4"),
        (Changing("x"), "Changing: x", "its pickle is one of ValueError"),
        (Exiting(), "Exiting", "cannot be made again"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exceptions_that_do_not_survive(error: BaseException, summary: str, reason: str) -> None:
    back, text = travel(error)
    assert type(back) is RemoteError
    assert str(back).startswith(f"{__name__}.{summary} (`except {type(error).__name__}` does not ")
    assert reason in str(back)
    assert str(back).endswith("A __reduce__ of its own would let it travel)")
    assert len(str(back)) < 600
    assert summary in text
    assert "in raised\n" in text


def test_an_exception_without_a_text() -> None:
    back, text = travel(BadText(threading.Lock()))
    assert type(back) is RemoteError
    assert str(back).startswith(f"{__name__}.BadText: <its str() raised SystemExit> (`except ")
    assert text


@pytest.mark.bad_input(13)
def test_exceptions_of_main_travel_by_value() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec("class MineError(Exception): pass", scope)
    back, _ = travel(scope["MineError"]("x"))
    assert type(back) is scope["MineError"]  # which cloudpickle recognises
    assert str(back) == "x"


def test_causes_and_contexts_are_in_the_text() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as first:
            raise ValueError("second") from first
    except ValueError as second:
        _, text = loads(dump_error(second))
    assert text.index("KeyError: 'first'") < text.index("direct cause") < text.index("second")


@pytest.mark.bad_input(14)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with 3.11")
def test_notes_travel() -> None:
    error: Any = ValueError("x")
    error.add_note("a note")
    back: Any
    back, text = travel(error)
    assert back.__notes__ == ["a note"]
    assert "a note" in text


@pytest.mark.bad_input(12)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with 3.11")
def test_groups_keep_their_structure() -> None:
    group: Any = __builtins__["ExceptionGroup"]  # type: ignore[index]
    inner = group("inner", [KeyError(1), Holding(threading.Lock())])
    back: Any
    back, _ = travel(group("outer", [ValueError(2), inner]))
    assert type(back) is group
    assert back.message == "outer"
    assert type(back.exceptions[0]) is ValueError
    assert type(back.exceptions[1].exceptions[0]) is KeyError
    assert type(back.exceptions[1].exceptions[1]) is RemoteError


@pytest.mark.bad_input(6, 69)
def test_a_missing_module_names_the_worker() -> None:
    back, text = travel(
        ModuleNotFoundError("No module named 'pandas'", name="pandas"), is_loaded=False
    )
    assert type(back) is ModuleNotFoundError
    assert str(back).startswith("module 'pandas' is not installed on worker ")
    assert f"Python {sys.version.split()[0]}, {sys.executable}" in str(back)
    assert str(back) in text


def test_an_embedded_executor_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "is_embedded", True)
    back, _ = travel(ModuleNotFoundError("No module named 'a'", name="a"), is_loaded=False)
    assert str(back).startswith(
        "module 'a' cannot be imported in a runner of this executor (Python"
    )
    _, text = travel(AttributeError("no f in m"), is_loaded=False)
    if sys.version_info >= (3, 11):
        assert "were unpickled in a runner of this executor (Python" in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with 3.11")
def test_other_errors_while_unpickling_name_the_worker() -> None:
    _, text = travel(AttributeError("no f in m"), is_loaded=False)
    assert "while the function and its arguments were unpickled on worker " in text


def test_our_own_frames_are_left_out() -> None:
    scope: dict[str, Any] = {"__package__": "achilles.runtime", "__name__": "achilles.runtime.x"}

    def task() -> NoReturn:
        raise ValueError("x")

    exec("def ours(task): task()", scope)
    with pytest.raises(ValueError, match="x") as caught:
        scope["ours"](task)
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
    _, text = loads(dump_error(error))
    assert "in task\n" in text
    assert "ours" not in text


def test_a_long_traceback_is_cheap_enough() -> None:
    def dig(n: int) -> None:
        if n:
            dig(n - 1)
        raise ValueError("deep")

    started = time.perf_counter()
    with pytest.raises(ValueError, match="deep") as caught:
        dig(300)
    _, text = loads(dump_error(caught.value))
    assert len(text) < 20_000, "repeated lines are folded"
    assert time.perf_counter() - started < 5.0


def test_a_traceback_that_cannot_be_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> NoReturn:
        raise RuntimeError("no")

    monkeypatch.setattr(traceback, "format_exception", fail)
    _, text = travel(ValueError("x"))
    assert text == "ValueError (its traceback cannot be formatted: RuntimeError)\n"


def test_a_class_that_lets_nobody_look_at_it_ends_nothing() -> None:
    """Whatever is looked up raises, by turns what `except Exception` does not catch."""

    class Opaque(Exception):
        def __getattribute__(self, name: str) -> NoReturn:
            raise KeyboardInterrupt(name)

    for is_loaded in (True, False):
        error, text = loads(dump_error(Opaque(), is_loaded=is_loaded))
        assert type(error) is RemoteError
        assert "Opaque" in str(error)
        assert "Opaque" in text


def test_a_text_that_ends_the_program_does_not() -> None:
    class Ending(Exception):
        def __str__(self) -> NoReturn:
            raise SystemExit(3)

    _, text = loads(dump_error(Ending()))
    assert "Ending" in text
