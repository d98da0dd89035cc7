"""compileall of the standard library, which makes a `ProcessPoolExecutor` by itself."""

from __future__ import annotations

import compileall
import concurrent.futures
from pathlib import Path

import pytest

from tests.modes import OURS, Maker, of_modes

ROOT = Path(__file__).parents[2]


@of_modes(*OURS)
def test_compileall(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (ROOT / "examples").glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    made = []

    def executor(*args: int, **options: int) -> object:
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", executor)
    assert compileall.compile_dir(tmp_path, quiet=1, workers=2)
    assert len(made) == 1
    compiled = {path.name.split(".")[0] for path in (tmp_path / "__pycache__").iterdir()}
    assert compiled == {path.stem for path in tmp_path.glob("*.py")}
