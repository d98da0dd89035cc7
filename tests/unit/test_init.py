from __future__ import annotations

import subprocess
import sys

import pytest

import achilles


@pytest.mark.parametrize("name", achilles.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(achilles, name) is not None
    assert name in dir(achilles)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'achilles' has no attribute 'nothing'"):
        achilles.nothing  # noqa: B018


def test_import_star() -> None:
    names: dict[str, object] = {}
    exec("from achilles import *", names)
    assert set(achilles.__all__) <= names.keys()


def test_import_loads_nothing_heavy() -> None:
    """Runners import the package, too."""
    program = "import achilles, sys; print(*(m for m in ('zmq', 'msgspec', 'concurrent', 'click') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "\n"
