from __future__ import annotations

import subprocess
import sys

import joblib.parallel
import pytest

import achilles
from achilles.joblib_backend import AchillesBackend


def test_joblib_knows_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib.parallel, "BACKENDS", {})
    achilles.register_joblib()
    assert {"achilles": AchillesBackend} == joblib.parallel.BACKENDS


def test_without_joblib_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ImportError, match=r"pip install 'achilles\[joblib\]'"):
        achilles.register_joblib()


def test_the_name_is_there_without_joblib() -> None:
    program = "import sys; sys.modules['joblib'] = None\nfrom achilles import *\nregister_joblib"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
