"""An environment is made anew when what it is made from changes, and only then."""

from __future__ import annotations

import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environments
from benchmarks.environments import ROOT, prepare, recipe
from benchmarks.systems import CONTESTANTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project(**groups: list[Any]) -> dict[str, Any]:
    return {"project": {"dependencies": ["pyzmq"]}, "dependency-groups": groups}


def test_a_recipe_has_what_its_group_includes_and_no_more() -> None:
    groups: dict[str, list[Any]] = {
        "bench": ["numpy"],
        "peer": [{"include-group": "bench"}, "ray>=2"],
        "dev": ["ruff"],
    }
    made = recipe(project(**groups), "peer")
    assert "numpy" in made
    assert "ray>=2" in made
    assert "ruff" not in made
    assert made == recipe(project(**{**groups, "dev": ["ruff", "mypy"]}), "peer")
    assert made != recipe(project(**{**groups, "bench": ["numpy>=2"]}), "peer")


def test_ours_depends_on_our_dependencies() -> None:
    assert "pyzmq" in recipe(project(bench=["numpy"]), "bench")


def test_each_contestant_has_its_group() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for contestant in CONTESTANTS.values():
        assert recipe(found, contestant.group)


def test_what_does_not_install_is_a_reason_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    def install(python: Path, arguments: list[str]) -> str:
        tried.append(arguments)
        return "" if "pip>=25.1" in arguments else "ERROR: no wheel for this Python"

    def create(folder: Path, **options: bool) -> None:
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "_install", install)
    monkeypatch.setattr(venv, "create", create)
    assert prepare("bench-ray").reason == "ERROR: no wheel for this Python"
    assert prepare("bench-ray").reason == "ERROR: no wheel for this Python"
    assert len(tried) == 4
    monkeypatch.setattr(environments, "_install", lambda *_: "")
    assert prepare("bench-ray").reason == ""
    monkeypatch.setattr(environments, "_install", install)
    assert prepare("bench-ray").reason == ""  # it is there
    assert len(tried) == 4


def test_ours_is_compiled_as_an_installed_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each start would compile what the peers have had compiled."""
    (tmp_path / "achilles").mkdir()
    (tmp_path / "achilles" / "one.py").write_text("x = 1\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(environments, "_install", lambda *_: "not now")
    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    prepare("bench")
    assert list((tmp_path / "achilles" / "__pycache__").glob("one.*.pyc"))
