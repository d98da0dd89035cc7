"""Which modules a client serves: those of the user's program, as they are on disk now."""

from __future__ import annotations

import marshal
import sys
import zipfile
from pathlib import Path

import pytest

from achilles.sources import SOURCE_MAX, Source, answer, find_source


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


def test_a_module(place: Path) -> None:
    (place / "mine.py").write_text("X = 1\n")
    assert find_source("mine") == Source("X = 1\n", str(place / "mine.py"), False)
    (place / "mine.py").write_text("X = 2\n")
    assert find_source("mine") == Source("X = 2\n", str(place / "mine.py"), False)
    assert "mine" not in sys.modules


def test_packages(place: Path) -> None:
    package = place / "pack" / "sub"
    package.mkdir(parents=True)
    (place / "pack" / "__init__.py").write_text("raise RuntimeError('nobody imports this')\n")
    (package / "leaf.py").write_text("Y = 1\n")
    found = find_source("pack")
    assert found is not None
    assert found.is_package
    assert find_source("pack.sub") == Source("", str(package), True)  # a namespace package
    assert find_source("pack.sub.leaf") == Source("Y = 1\n", str(package / "leaf.py"), False)
    assert find_source("pack.sub.none") is None
    assert find_source("pack.none.leaf") is None


def test_encodings_and_archives(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "latin.py").write_bytes("# coding: latin-1\nNAME = 'é'\n".encode("latin-1"))
    found = find_source("latin")
    assert found is not None
    assert "é" in found.text
    with zipfile.ZipFile(place / "code.zip", "w") as archive:
        archive.writestr("zipped.py", "Z = 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(place / "code.zip")])
    zipped = find_source("zipped")
    assert zipped is not None
    assert zipped.text == "Z = 1\n"


@pytest.mark.parametrize(
    "name", ["os", "json.decoder", "pytest", "_pytest.fixtures", "achilles", "achilles.executor"]
)
def test_what_is_installed_is_not_served(name: str) -> None:
    assert find_source(name) is None


@pytest.mark.parametrize(
    "name", ["__main__", "none_such", "", ".", "a..b", "../../etc/passwd", "a b"]
)
def test_what_is_no_module_is_not_served(place: Path, name: str) -> None:
    assert find_source(name) is None


def test_what_cannot_be_read_is_not_served(place: Path) -> None:
    (place / "binary.py").write_bytes(b"\xff\xfe\x00")
    (place / "huge.py").write_text("#" * (SOURCE_MAX + 1))
    assert find_source("binary") is None
    assert find_source("huge") is None


def test_answers_carry_the_number_of_their_request(place: Path) -> None:
    (place / "mine.py").write_text("X = 1\n")
    reply = answer(b"\7\0\0\0mine")
    assert reply[:4] == b"\7\0\0\0"
    assert marshal.loads(reply[4:]) == ("X = 1\n", str(place / "mine.py"), False)
    assert answer(b"\7\0\0\0none_such") == b"\7\0\0\0"
    assert answer(b"\7\0\0\0\xff") == b"\7\0\0\0"
