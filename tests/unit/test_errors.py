"""The exception tree is as its drawing says, and light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from achilles import errors

DRAWN = [
    line.split("──")[1].split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line
]


def test_the_drawing_names_every_error() -> None:
    """Whoever reads the drawing knows them all."""
    drawn = {name for name in DRAWN if name.endswith("Error")}
    assert drawn | {"AchillesError"} == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_ours(name: str) -> None:
    """One ``except`` catches them all."""
    assert issubclass(getattr(errors, name), errors.AchillesError)


def test_configuration_errors_are_one_family() -> None:
    """What exits with 78, or with 2, is a ConfigError."""
    assert issubclass(errors.InsecureBindError, errors.ConfigError)
    assert issubclass(errors.KeyFileError, errors.ConfigError)
    assert issubclass(errors.AuthenticationError, errors.BrokerUnreachableError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy half does not invent names."""
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = errors.Nonsense


def test_importing_it_brings_neither_pickle_nor_multiprocessing() -> None:
    """The broker imports it, and must not be able to unpickle."""
    program = (
        "import sys; before = set(sys.modules); import achilles.errors; "
        "new = set(sys.modules) - before; "
        "sys.exit(str(new & {'pickle', '_pickle', 'multiprocessing', 'concurrent.futures'}) "
        "if new & {'pickle', '_pickle', 'multiprocessing', 'concurrent.futures'} else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
