"""Options are checked where they are given, and add up."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from achilles.core.protocol import Options
from achilles.options import merge_options


def test_nothing_is_no_options() -> None:
    assert merge_options(None, {}, has_tags=True) is None
    assert merge_options(Options(timeout=3.0), {"timeout": 0}, has_tags=True) is None


def test_options_add_up() -> None:
    base = merge_options(None, {"timeout": 2, "priority": -1}, has_tags=True)
    both = merge_options(base, {"retries": 3, "tags": ["gpu", "big", "gpu"]}, has_tags=True)
    assert both == Options(timeout=2.0, retries=3, priority=-1, tags=("big", "gpu"))


@pytest.mark.parametrize("kind", [int, float, Fraction, np.int64, np.float32, np.float64])
def test_any_type_of_number_will_do(kind: type) -> None:
    options = merge_options(None, {"timeout": kind(5)}, has_tags=True)
    assert options == Options(timeout=5.0)
    assert type(options.timeout) is float
    assert merge_options(None, {"retries": np.int64(2)}, has_tags=True) == Options(retries=2)


def test_one_tag_may_be_a_string() -> None:
    assert merge_options(None, {"tags": "gpu"}, has_tags=True) == Options(tags=("gpu",))


def test_without_workers_of_its_own_every_tag_is_there() -> None:
    assert merge_options(None, {"tags": "gpu"}, has_tags=False) is None
    with pytest.raises(TypeError, match="tags must be strings"):
        merge_options(None, {"tags": [1]}, has_tags=False)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"timeout": "3"}, TypeError, "timeout must be a number of seconds, not str"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds"),
        ({"timeout": np.bool_(True)}, TypeError, "timeout must be a number of seconds"),
        ({"timeout": 1j}, TypeError, "timeout must be a number of seconds, not complex"),
        ({"timeout": 10**400}, ValueError, "timeout must be 0 .no limit. or a positive number"),
        ({"timeout": np.float32("nan")}, ValueError, "timeout must be 0"),
        ({"timeout": -1}, ValueError, "timeout must be 0 .no limit. or a positive number"),
        ({"timeout": math.nan}, ValueError, "timeout"),
        ({"timeout": math.inf}, ValueError, "timeout"),
        ({"retries": 1.5}, TypeError, "retries must be an integer, not float"),
        ({"retries": -1}, ValueError, "retries must be 0 or more"),
        ({"retries": 1 << 40}, ValueError, "retries"),
        ({"priority": None}, TypeError, "priority must be an integer"),
        ({"priority": 1 << 40}, ValueError, "priority must be between"),
        ({"at_most_once": 1}, TypeError, "at_most_once must be True or False"),
        ({"at_most_once": True, "retries": 1}, ValueError, "exclude each other"),
        ({"tags": [""]}, ValueError, "1 to 64 printable characters"),
        ({"tags": ["a\n"]}, ValueError, "printable"),
        ({"tags": map(str, range(65))}, ValueError, "at most 64 tags"),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        merge_options(None, given, has_tags=True)
