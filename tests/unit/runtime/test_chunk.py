"""Many calls as one task: each has an outcome, and there is an end to it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from achilles.runtime import chunk as module
from achilles.runtime.chunk import Chunk
from achilles.runtime.serialize import ERROR, describe, load_outcome
from tests import tasks


class Clock:
    """Each look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_values() -> None:
    assert Chunk(tasks.add)([1, 2, 3]) == ([2, 3, 4], {})
    assert Chunk(tasks.add, is_star=True)([(1, 2), [3, 4], (5,)]) == ([3, 7, 6], {})
    assert Chunk(tasks.add)(()) == ([], {})


def test_each_call_has_its_outcome() -> None:
    values, errors = Chunk(tasks.fail)(["first", "second"])
    assert values == [None, None]
    outcomes = [load_outcome(ERROR, errors[at])[1] for at in (0, 1)]
    assert [str(error) for error in outcomes] == ["first", "second"]
    assert [type(error) for error in outcomes] == [ValueError, ValueError]
    cause = outcomes[0].__cause__ if outcomes[0] else None
    assert "in fail" in str(cause)
    assert "chunk.py" not in str(cause)


def test_what_is_no_error_of_one_call_ends_it() -> None:
    with pytest.raises(SystemExit):
        Chunk(tasks.exit_with)([3, 4])


def test_no_call_starts_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "perf_counter", Clock())
    assert Chunk(tasks.add, seconds=3.0)(range(10)) == ([1, 2, 3], {})
    assert Chunk(tasks.add, seconds=0.0)(range(10)) == ([1], {})
    values, errors = Chunk(tasks.fail, seconds=2.0)(["a", "b", "c"])
    assert (len(values), sorted(errors)) == (2, [0, 1])
    assert len(Chunk(tasks.add)(range(100))[0]) == 100


@pytest.mark.parametrize("func", [tasks.add, tasks.Adder(5), str])
def test_it_travels(func: Any) -> None:
    back = pickle.loads(pickle.dumps(Chunk(func, is_star=True, seconds=2.0)))
    assert type(back) is Chunk
    assert type(back.func) is type(func)
    assert (back.is_star, back.seconds) == (True, 2.0)


def test_errors_name_the_users_function() -> None:
    assert describe(Chunk(tasks.add)) == "add()"
    assert repr(Chunk(tasks.add)).startswith("<Chunk of <function add")
