"""black: its own loop over many files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import black
import pytest
from black.concurrency import schedule_formatting
from black.report import Report

from tests.modes import OURS, Maker, of_modes

ROOT = Path(__file__).parents[2]
BROKEN = "def broken(:\n"


def squeezed(text: str) -> str:
    """The same program in another layout."""
    return text.replace(" = ", "  =  ").replace("return ", "return   ")


def programs(folder: Path) -> dict[Path, str]:
    """Real files, and what black alone makes of them."""
    expected = {}
    for source in sorted((ROOT / "examples").glob("*.py")):
        path = folder / source.name
        path.write_text(squeezed(source.read_text("utf-8")), "utf-8")
        expected[path] = black.format_str(path.read_text("utf-8"), mode=black.Mode())
        assert expected[path] != path.read_text("utf-8")
    return expected


@of_modes(*OURS)
def test_schedule_formatting(make: Maker, tmp_path: Path) -> None:
    expected = programs(tmp_path)
    bad = tmp_path / "broken.py"
    bad.write_text(BROKEN)
    report = Report(quiet=True)
    executor = make()

    async def main() -> None:
        await schedule_formatting(
            sources={*expected, bad},
            fast=False,
            write_back=black.WriteBack.YES,
            mode=black.Mode(),
            report=report,
            loop=asyncio.get_running_loop(),
            executor=executor,
            no_cache=True,
        )

    asyncio.run(main())
    assert {path: path.read_text("utf-8") for path in expected} == expected
    assert bad.read_text() == BROKEN
    assert (report.change_count, report.same_count, report.failure_count) == (len(expected), 0, 1)


@of_modes(*OURS)
def test_the_whole_program(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, which makes its executor by itself."""
    expected = programs(tmp_path)
    monkeypatch.setattr("black.concurrency.ProcessPoolExecutor", make)
    monkeypatch.setenv("BLACK_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as exit:
        black.main([str(tmp_path), "--quiet", "--workers", "2"])
    assert exit.value.code == 0
    assert {path: path.read_text("utf-8") for path in expected} == expected
