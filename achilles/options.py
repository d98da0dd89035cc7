"""What `DistributedExecutor` and its `with_options` take, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

from achilles.core.protocol import PLAIN, TAG_MAX, TAGS_MAX, Options

PRIORITY_MAX = 1 << 31
RETRIES_MAX = 1 << 31


def count(name: str, value: object, wanted: str) -> int | None:
    """A number of something, at least 1; any type of integer will do, NumPy's too.

    Raises:
        TypeError, ValueError: it is not, and not None.
    """
    if value is None:
        return None
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be {wanted}, not {number}")
    return number


def merge_options(
    base: Options | None, given: Mapping[str, Any], *, has_tags: bool
) -> Options | None:
    """``base`` with what was given instead; None where nothing is asked for.

    Without ``has_tags`` tags are checked and then dropped: there is one worker only.

    Raises:
        TypeError, ValueError: an option that cannot be.
    """
    read = {
        "timeout": _timeout,
        "retries": _retries,
        "at_most_once": _flag,
        "priority": _priority,
        "tags": _tags,
    }
    values = {name: read[name](value) for name, value in given.items()}
    if not has_tags:
        values["tags"] = ()
    options = (base or PLAIN).but(**values)
    if options.at_most_once and options.retries:
        raise ValueError("at_most_once and retries exclude each other")
    return None if options == PLAIN else options


def _timeout(value: Any) -> float:
    """Seconds; any type of real number will do, NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"timeout must be a number of seconds, not {type(value).__name__}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not 0 <= seconds < math.inf:
        raise ValueError(f"timeout must be 0 (no limit) or a positive number, not {value!r:.40}")
    return seconds


def _retries(value: Any) -> int:
    number = _integer("retries", value)
    if not 0 <= number < RETRIES_MAX:
        raise ValueError(f"retries must be 0 or more, not {number}")
    return number


def _priority(value: Any) -> int:
    number = _integer("priority", value)
    if not -PRIORITY_MAX < number < PRIORITY_MAX:
        raise ValueError(f"priority must be between -2**31 and 2**31, not {number}")
    return number


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"at_most_once must be True or False, not {type(value).__name__}")
    return value


def _tags(value: Any) -> tuple[str, ...]:
    tags = (value,) if isinstance(value, str) else tuple(value)
    for tag in tags:
        if not isinstance(tag, str):
            raise TypeError(f"tags must be strings, not {type(tag).__name__}")
        if not tag.isprintable() or not 0 < len(tag) <= TAG_MAX:
            raise ValueError(f"a tag must have 1 to {TAG_MAX} printable characters: {tag!r}")
    if len(tags) > TAGS_MAX:
        raise ValueError(f"at most {TAGS_MAX} tags, not {len(tags)}")
    return tuple(sorted(set(tags)))


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
