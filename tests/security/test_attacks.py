"""No row of the attack table is left out, and none reads as passed that was not run."""

from __future__ import annotations

import pytest

from achilles.cli import main
from tests.security.__main__ import FAILED, Part, outcome, table
from tests.security.attacks import ATTACKS, CANNOT_RUN, attack, files_by_attack

FINE, BROKEN = Part(False, "", 1.0), Part(True, "", 1.0)
SKIPPED = Part(False, "it needs root", 0.0)


def test_every_row_has_a_test_or_a_reason() -> None:
    assert [row.id for row in ATTACKS] == [f"T{number}" for number in range(1, 40)]
    covered = files_by_attack()
    assert not covered.keys() & CANNOT_RUN.keys(), "a row that can be run after all"
    assert {row.id for row in ATTACKS} == covered.keys() | CANNOT_RUN.keys()


def test_the_reasons_hold() -> None:
    assert "up" not in main.commands, "T33 has something to attack now"


def test_a_row_that_there_is_not() -> None:
    with pytest.raises(AssertionError, match="no such row"):
        attack("T40")


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ([FINE, FINE], "refused"),
        ([FINE, BROKEN], FAILED),
        ([], FAILED),
        ([SKIPPED], "cannot run here: it needs root"),
        ([FINE, SKIPPED], "refused; a part cannot run here: it needs root"),
        ([BROKEN, SKIPPED], FAILED),
    ],
)
def test_what_was_not_run_does_not_read_as_passed(parts: list[Part], wanted: str) -> None:
    assert outcome(ATTACKS[0], parts) == wanted


def test_the_table_counts() -> None:
    good = {row.id: [FINE] for row in ATTACKS}
    lines, is_well = table(good)
    assert is_well
    assert len(lines) == 1 + 39 + 1
    cannot = len(CANNOT_RUN)
    wanted = f"{39 - cannot} refused or held, 0 in part, {cannot} cannot run here, 0 FAILED"
    assert lines[-1].endswith(wanted)
    lines, is_well = table(good | {"T1": [FINE, SKIPPED], "T2": [BROKEN], "T3": [SKIPPED]})
    assert not is_well
    wanted = f"{36 - cannot} refused or held, 1 in part, {cannot + 1} cannot run here, 1 FAILED"
    assert lines[-1].endswith(wanted)
