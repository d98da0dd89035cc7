"""Modules that another process cannot import by their names are told from all others,
and no pickle is looked at in vain.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from achilles.runtime import context, program
from achilles.runtime.program import is_own, names_own

NAME = "module_of_a_test_of_program"
TEXT = "class One: pass\ndef f(): return One()\n"


def load(monkeypatch: pytest.MonkeyPatch, path: Path, name: str = NAME) -> Any:
    """A module from its path, under a name."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def by_hand(monkeypatch: pytest.MonkeyPatch, name: str = NAME) -> Any:
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(TEXT, "<by hand>", "exec", dont_inherit=True), vars(module))
    return module


@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])
def test_the_main_module_is_by_each_of_its_names(name: str) -> None:
    assert is_own(name)
    assert not is_own(None)
    assert not is_own(["__main__"])
    assert not is_own("no_such_module")


def test_a_module_that_was_loaded_from_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load(monkeypatch, tmp_path / f"{NAME}.py")
    assert is_own(NAME)
    for one in (module.f, module.One(), [module.One]):
        assert names_own(pickle.dumps(one, 5))
    assert program.NAMES not in pickle.dumps([NAME, 1.5], 5)


def test_one_whose_name_leads_to_its_file_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = load(monkeypatch, tmp_path / f"{NAME}.py")
    assert not is_own(NAME)
    assert not names_own(pickle.dumps(module.f, 5))


def test_one_whose_name_leads_to_another_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"{NAME}.py").write_text(TEXT)
    monkeypatch.syspath_prepend(tmp_path)
    load(monkeypatch, tmp_path / "elsewhere" / f"{NAME}.py")
    assert is_own(NAME)


def test_a_path_by_another_way_leads_there_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    monkeypatch.syspath_prepend(tmp_path / "here")
    load(monkeypatch, tmp_path / "there" / f"{NAME}.py")
    assert not is_own(NAME)


def test_the_current_directory_is_a_place_of_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    load(monkeypatch, tmp_path / f"{NAME}.py")
    assert not program._is_out_of_place(NAME, sys.modules[NAME])
    assert not is_own(NAME)


def test_modules_that_were_made_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = by_hand(monkeypatch)
    assert is_own(NAME)
    assert names_own(pickle.dumps(module.f, 5))
    below = by_hand(monkeypatch, f"{NAME}.below")
    assert is_own(f"{NAME}.below")
    assert names_own(pickle.dumps(below.f, 5))
    by_hand(monkeypatch, "no_such_package.below")
    assert is_own("no_such_package.below")
    by_hand(monkeypatch, "json.made_with_it")
    assert not is_own("json.made_with_it")
    monkeypatch.setitem(sys.modules, "of_an_extension", ModuleType("of_an_extension"))
    assert not is_own("of_an_extension")


def test_what_is_below_a_package_that_was_loaded_from_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "below.py").write_text(TEXT)
    load(monkeypatch, place / "__init__.py")
    monkeypatch.delitem(sys.modules, f"{NAME}.below", raising=False)
    below = importlib.import_module(f"{NAME}.below")
    assert is_own(NAME)
    assert is_own(f"{NAME}.below")
    assert names_own(pickle.dumps(below.f, 5))
    monkeypatch.delitem(sys.modules, f"{NAME}.below")


def test_a_plugin_below_a_package_that_can_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load(monkeypatch, tmp_path / "plugin.py", "json.plugin")
    assert is_own("json.plugin")
    load(monkeypatch, tmp_path / "plugin.py", "json_of_nobody.plugin")
    assert is_own("json_of_nobody.plugin")


def test_it_is_decided_once_for_each_module_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        asked.append(name)
        return None

    finder: Any = type("Finder", (), {"find_spec": staticmethod(find_spec)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    first = load(monkeypatch, tmp_path / f"{NAME}.py")
    assert all(names_own(pickle.dumps(first.f, 5)) and is_own(NAME) for _ in range(3))
    assert asked == [NAME]
    monkeypatch.syspath_prepend(tmp_path)
    load(monkeypatch, tmp_path / f"{NAME}.py")
    assert not is_own(NAME)
    assert asked == [NAME]  # it lies where its name says
    del first


def test_a_module_in_the_place_of_another_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though as many modules are loaded as before, once a function names it."""
    monkeypatch.syspath_prepend(tmp_path)
    first = load(monkeypatch, tmp_path / f"{NAME}.py")
    assert not names_own(pickle.dumps(first.f, 5))
    second = by_hand(monkeypatch)
    assert is_own(NAME)
    assert names_own(pickle.dumps(second.f, 5))


def test_a_finder_or_module_that_raises_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        raise ZeroDivisionError(name)

    finder: Any = type("Finder", (), {"find_spec": staticmethod(find_spec)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    load(monkeypatch, tmp_path / f"{NAME}.py")
    assert not is_own(NAME)

    class Lazy:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("it was touched")

    monkeypatch.setitem(sys.modules, "lazy_of_a_test", Lazy())
    assert not is_own("lazy_of_a_test")
    assert not names_own(pickle.dumps(Path, 5))


def test_a_runner_has_none_but_the_main_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load(monkeypatch, tmp_path / f"{NAME}.py")
    monkeypatch.setattr(context, "client", 1)
    assert not is_own(NAME)
    assert not names_own(pickle.dumps(module.f, 5))
    assert is_own("__main__")
    assert names_own(b"\x8c\x0b__mp_main__\x94\x8c\x01f\x94\x93")


def test_no_module_of_python_or_of_what_is_installed_is_one() -> None:
    text = (
        "import sys, asyncio, ctypes, email, http.server, json, multiprocessing.pool, os.path, unittest, xml.dom.minidom\n"
        "import achilles.net.worker, cloudpickle, click, msgspec, numpy.testing, psutil, pytest, zmq\n"
        "from achilles.runtime import program\n"
        "program._look()\n"
        "print([name for name in sorted(sys.modules) if program.is_own(name)], sorted(program._suspects))\n"
    )
    pytest.importorskip("numpy")
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "['__main__', '__mp_main__'] []\n"
