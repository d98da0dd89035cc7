"""What cannot be pickled is named: by its place in the call, in the object, or in the function."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from functools import partial
from typing import Any

import pytest

from achilles.errors import ArgumentPickleError
from achilles.runtime.arguments import ArgumentTable
from achilles.runtime.blame import PARTS_MAX
from achilles.runtime.functions import FunctionTable
from achilles.runtime.initialize import dumps_initializer
from achilles.runtime.serialize import dumps_call
from tests.unit.runtime import tasks

anything: Any = tasks.identity
LOCK = "cannot pickle '_thread.lock' object"


class Session:
    def __init__(self) -> None:
        self.name = "one"
        self.locks = {"main": threading.Lock()}


class Client:
    def __init__(self) -> None:
        self.session = Session()

    def fetch(self, url: str) -> str:
        return url

    def __call__(self) -> None:
        """It can be called, too."""


class Slotted:
    __slots__ = ("lock", "other")

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def work(self) -> None:
        """What is bound."""


class Own:
    """Says itself what its pickle is made of, and that fails."""

    def __init__(self) -> None:
        self.harmless = threading.Lock()

    def __getstate__(self) -> Any:
        raise TypeError("not today")

    def work(self) -> None:
        """What is bound."""


def of_a_variable() -> Any:
    held = [1, threading.Lock()]
    return lambda: held


def of_a_default() -> Any:
    def work(n: int, lock: Any = threading.Lock(), *, other: int = 2) -> None:  # noqa: B008
        """Has a default."""

    return work


def of_a_keyword() -> Any:
    def work(n: int = 1, *, lock: Any = threading.Lock()) -> None:  # noqa: B008
        """Has a default."""

    return work


def of_an_attribute() -> Any:
    def work() -> None:
        """Has an attribute."""

    work.lock = threading.Lock()  # type: ignore[attr-defined]
    return work


def of_a_global() -> Any:
    scope: dict[str, Any] = {"__name__": "__main__", "lock": threading.Lock()}
    exec("def work(): return lock", scope)
    return scope["work"]


OF_OBJECTS = "What is called is sent with all that it holds: "
OF_VALUES = "A function is sent with what it holds: "


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (
            Client().fetch,
            (
                f"Client.fetch() cannot be pickled: {LOCK}, which is .session.locks['main'] of the Client object that the method is "
                f"bound to; nothing was sent. {OF_OBJECTS}"
            ),
        ),
        (
            Slotted().work,
            f"Slotted.work() cannot be pickled: {LOCK}, which is .lock of the Slotted object that the method is bound to; ",
        ),
        (
            Own().work,
            "Own.work() cannot be pickled: not today, which is the Own object that the method is bound to, or part of it; ",
        ),
        (
            Client(),
            (
                f"Client object cannot be pickled: {LOCK}, which is .session.locks['main'] of that object; nothing was sent. "
                f"{OF_OBJECTS}"
            ),
        ),
        (
            of_a_variable(),
            (
                f"of_a_variable.<locals>.<lambda>() cannot be pickled: {LOCK}, which is [1] of the variable 'held' of an enclosing "
                f"function; nothing was sent. {OF_VALUES}"
            ),
        ),
        (of_a_default(), f"{LOCK}, which is the default of the parameter 'lock', or part of it; "),
        (of_a_keyword(), f"{LOCK}, which is the default of the parameter 'lock', or part of it; "),
        (
            of_an_attribute(),
            f"{LOCK}, which is the attribute 'lock' of the function, or part of it; ",
        ),
        (
            of_a_global(),
            (
                f"work() cannot be pickled: {LOCK}, which is the global 'lock' or part of it; nothing was sent. A function of the "
                "program itself is sent with the globals that it uses: "
            ),
        ),
        (
            partial(anything, 1, Client()),
            (
                f"identity() cannot be pickled: {LOCK}, which is .session.locks['main'] of argument 2 of the partial; nothing was sent. "
                "Instead of that, pass "
            ),
        ),
        (
            partial(anything, lock=threading.Lock()),
            f"{LOCK}, which is the argument 'lock' of the partial, or part of it; ",
        ),
        (
            partial(Client().fetch, "u"),
            "which is .session.locks['main'] of the Client object that the method is bound to; ",
        ),
    ],
)
def test_what_of_a_callable(fn: Any, text: str) -> None:
    with pytest.raises(ArgumentPickleError) as caught:
        FunctionTable().encode(fn)
    assert text in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Client(), "type Client, which has that as .session.locks['main'])"),
        ({"log": threading.Lock()}, "type dict, which has that as ['log'])"),
        ({(1, 2): [threading.Lock()]}, "type dict, which has that as […][0])"),
        ([[[[[[threading.Lock()]]]]]], "type list, which has that as [0][0][0][0])"),
        ([*range(PARTS_MAX), threading.Lock()], "type list); nothing was sent; "),
        (threading.Lock(), "type lock); nothing was sent; "),
        (Own(), "type Own); nothing was sent; "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_in_an_argument(value: object, text: str) -> None:
    with pytest.raises(ArgumentPickleError) as caught:
        dumps_call((1, value), {}, tasks.add)
    assert str(caught.value).startswith("argument 2 ")
    assert text in str(caught.value)


def test_an_initializer_and_its_arguments() -> None:
    with pytest.raises(ArgumentPickleError) as caught:
        dumps_initializer(tasks.add, (1, {"log": threading.Lock()}))
    text = f"argument 2 ('y') of the initializer add() cannot be pickled: {LOCK} (it is of type dict, which has that as ['log']); "
    assert text in str(caught.value)
    with pytest.raises(
        ArgumentPickleError, match=r"^the initializer Client\.fetch\(\) .*\.session\.locks"
    ):
        dumps_initializer(Client().fetch, (1,))
    with pytest.raises(RuntimeError, match="runners inherit nothing"):
        dumps_initializer(tasks.add, (multiprocessing.Lock(),))


def test_what_is_of_one_machine_only() -> None:
    """It can be pickled for this one."""
    far = ArgumentTable(is_far=True)
    with socket.socket() as one:
        with pytest.raises(ArgumentPickleError, match=r"argument 1 .*a socket is of the machine"):
            dumps_call(([one],), {}, tasks.add, far)
        with pytest.raises(
            ArgumentPickleError, match=r"argument 2 .*of the initializer .* a socket"
        ):
            dumps_initializer(tasks.add, (1, one), is_far=True)
        with pytest.raises(ArgumentPickleError, match="is argument 1 of the partial"):
            FunctionTable(far).encode(partial(anything, one))
