"""The register of bad inputs is whole, and true."""

from __future__ import annotations

from tests.inputs.rows import ROWS, TESTS, covered


def test_the_register_is_whole() -> None:
    assert list(ROWS) == list(range(1, 78))


def test_each_row_has_a_test_or_says_why_not() -> None:
    tests = covered()
    assert tests.keys() <= ROWS.keys(), "a test names a row that does not exist"
    for number, row in ROWS.items():
        assert row.what
        assert row.becomes
        assert bool(row.untested) != bool(tests.get(number)), f"row {number}: {row.what}"


def test_what_is_not_run_is_counted() -> None:
    """Whoever adds to these takes something from what is promised."""
    untested = [number for number, row in ROWS.items() if row.untested]
    assert untested == []
    page = " ".join((TESTS.parent / "RELIABILITY.md").read_text("utf-8").split())
    assert f"a register of {len(ROWS)} rows" in page
    assert f"(at present {len(untested)})" in page
