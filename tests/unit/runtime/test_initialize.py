from __future__ import annotations

import os
from typing import Any

import pytest

from achilles.runtime.initialize import with_environ

NAME = "TEST_OF_INITIALIZE"
seen: list[Any] = []


def note(*args: Any) -> None:
    seen.append((os.environ.get(NAME), args))


def fail() -> None:
    raise ValueError("as wanted")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "before")
    seen.clear()


def test_variables_are_set_before_the_given_initializer_is_called() -> None:
    initializer, initargs = with_environ({NAME: "1"}, note, (2, "three"))
    assert os.environ[NAME] == "before"
    initializer(*initargs)
    assert seen == [("1", (2, "three"))]


def test_without_an_initializer() -> None:
    initializer, initargs = with_environ({NAME: "1"}, None, ())
    initializer(*initargs)
    assert os.environ[NAME] == "1"


def test_what_the_initializer_raises_is_raised() -> None:
    initializer, initargs = with_environ({}, fail, ())
    with pytest.raises(ValueError, match="as wanted"):
        initializer(*initargs)
