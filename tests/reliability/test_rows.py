from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.reliability.__main__ import BEGIN, END, PAGE, head, line_of, merged
from tests.reliability.rows import (
    BESIDES,
    CHAOS,
    NEAR,
    ROWS,
    Figure,
    Output,
    Row,
    figure_line,
    part,
)
from tests.reliability.rows import tests as read_tests

ROOT = Path(__file__).parents[2]


def said(text: str, code: int = 0) -> Output:
    return Output(code, text, 1.0, [])


def report(nemesis: str, verdict: str = "ok", lost: int = 0) -> dict[str, object]:
    names = ("submitted", "unexpected", "duplicated", "compared", "acknowledged", "charged")
    effects = ("faults", "requeued", "late", "kill broker", "stopped", "drain worker", "clock")
    more = ("no descriptors", "full disk")
    return {
        "nemesis": nemesis,
        "verdict": verdict,
        "buckets": {**dict.fromkeys(names, 1), "lost": lost},
        "effects": dict.fromkeys((*effects, *more), 2),
        "drain_seconds": 1.5,
        "recovery_seconds": 0.5,
        "first_after_kill": [0.25],
    }


def test_every_promise_has_a_row_and_a_command_or_a_reason() -> None:
    assert [row.number for row in ROWS] == list(range(1, 28))
    for row in ROWS:
        assert bool(row.command) == bool(row.read) != bool(row.why_not), row.number


def test_what_the_commands_name_is_there() -> None:
    for row in (*ROWS, *BESIDES):
        for module in re.findall(r"-m (\S+)", row.command):
            assert importlib.util.find_spec(module) is not None, module
        for path in re.findall(r"tests/\S+\.py", row.command):
            assert (ROOT / path).exists(), path


def test_the_page_has_every_promise_as_the_rows_say_it() -> None:
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    for row in ROWS:
        lines = [line for line in table.splitlines() if line.startswith(f"| R{row.number} |")]
        assert lines, f"R{row.number} is missing: python -m tests.reliability --write"
        assert any(row.promise in line and row.command in line for line in lines), row.number


def test_a_measurement_holds_if_it_says_a_figure_and_ends_well() -> None:
    assert figure_line(said("noise\nfigure: 3 of 4; rest")) == Figure("3 of 4; rest", True)
    assert figure_line(said("figure: 3 of 4", code=1)) == Figure("3 of 4", False)
    assert figure_line(said("ValueError: no")) == Figure("ValueError: no", False)
    assert part(1)(said("figure: a; b; c")) == Figure("b", True)


def test_no_test_may_be_left_out_unseen() -> None:
    read = read_tests("things")
    assert read(said("== 5 passed in 2 s ==")) == Figure("5 things, 0 failed", True)
    assert read(said("1 failed, 4 passed", code=1)) == Figure("4 things, 1 failed", False)
    assert read(said("no tests ran", code=5)).holds is False
    assert "1 skipped" in read(said("4 passed, 1 skipped")).text


@pytest.mark.parametrize("row", [row for row in ROWS if row.command in (CHAOS, NEAR)], ids=str)
def test_chaos_figures(row: Row) -> None:
    """They hold if the runs that they are of do, and those are there."""
    assert row.read is not None
    names = [f"N{n}" for n in range(1, 19)]
    well = said("")._replace(chaos=[report(name) for name in names])
    assert row.read(well).holds
    bad = well._replace(chaos=[report(name, "FAILED", lost=1) for name in names])
    assert not row.read(bad).holds
    assert not row.read(said("Traceback: died")).holds
    vacuous = well._replace(chaos=[report(name, "proved nothing") for name in names])
    assert not row.read(vacuous).holds


def test_lines_of_some_rows_replace_the_old_ones() -> None:
    rows = [Row(1, "one", "command", figure_line), Row(2, "two", why_not="not yet")]
    old = [*head(), *(line_of(row, Figure("old", True)) for row in rows)]
    new = [*head(), line_of(rows[0], Figure("new", False))]
    lines = merged(old, new, {"R1"}).splitlines()
    assert lines == [*head(), line_of(rows[0], Figure("new", False)), old[-1]]
    assert "**no**" in lines[2]
    assert lines[3].endswith("| - | - |")
