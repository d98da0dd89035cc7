"""yapf, which makes a `ProcessPoolExecutor` by itself."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest
import yapf

from tests.modes import OURS, Maker, of_modes

UGLY = "def f( a,b ) :\n  return [ a,\n b ]\n"


@of_modes(*OURS)
def test_yapf(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = yapf.yapf_api.FormatCode(UGLY)
    for number in range(8):
        (tmp_path / f"file{number}.py").write_text(UGLY)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", make)
    assert yapf.main(["yapf", "--in-place", "--parallel", "--recursive", str(tmp_path)]) == 0
    assert {path.read_text() for path in tmp_path.glob("*.py")} == {expected}
