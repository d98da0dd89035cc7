"""``python -m tests.security``: run the attack table, and print what became of each row."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from tests.security.attacks import ATTACKS, CANNOT_RUN, Attack, files_by_attack

FAILED = "FAILED"


class Part(NamedTuple):
    """What became of one test of a row; ``skipped``: why it cannot run here."""

    has_failed: bool
    skipped: str
    seconds: float


class Recorder:
    """A plugin that runs the rows' tests alone, and notes what becomes of them."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}
        self._parts: dict[str, Part] = {}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        for item in items:
            for mark in item.iter_markers("attack"):
                self._rows.setdefault(item.nodeid, []).extend(mark.args)
        others = [item for item in items if item.nodeid not in self._rows]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.nodeid in self._rows]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self._parts.get(report.nodeid, Part(False, "", 0.0))
        skipped = before.skipped
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            skipped = str(report.longrepr[2]).removeprefix("Skipped: ")
        self._parts[report.nodeid] = Part(
            before.has_failed or report.failed, skipped, before.seconds + report.duration
        )

    def parts(self) -> dict[str, list[Part]]:
        """What became of each row's tests. One that never ran has failed."""
        found: dict[str, list[Part]] = {}
        for nodeid, rows in self._rows.items():
            for row in rows:
                part = self._parts.get(nodeid, Part(True, "", 0.0))
                found.setdefault(row, []).append(part)
        return found


def outcome(row: Attack, parts: list[Part]) -> str:
    """How the attack ended, in words."""
    if row.id in CANNOT_RUN:
        return f"cannot run here: {CANNOT_RUN[row.id]}"
    if not parts or any(part.has_failed for part in parts):
        return FAILED
    skipped = sorted({part.skipped for part in parts if part.skipped})
    if all(part.skipped for part in parts):
        return f"cannot run here: {'; '.join(skipped)}"
    if skipped:
        return f"{row.end}; a part cannot run here: {'; '.join(skipped)}"
    return row.end


def table(parts: Mapping[str, list[Part]]) -> tuple[list[str], bool]:
    """The lines of the table, and whether no attack succeeded."""
    lines = [f"{'row':<4} {'attack':<88} {'s':>5}  outcome"]
    counts = {"refused or held": 0, "in part": 0, "cannot run here": 0, FAILED: 0}
    for row in ATTACKS:
        mine = parts.get(row.id, [])
        text = outcome(row, mine)
        seconds = sum(part.seconds for part in mine)
        lines.append(f"{row.id:<4} {row.what:<88} {seconds:>5.1f}  {text}")
        if text == FAILED:
            counts[FAILED] += 1
        elif text.startswith("cannot"):
            counts["cannot run here"] += 1
        elif ";" in text:
            counts["in part"] += 1
        else:
            counts["refused or held"] += 1
    lines.append(
        f"{len(ATTACKS)} attacks: " + ", ".join(f"{n} {what}" for what, n in counts.items())
    )
    return lines, not counts[FAILED]


def main() -> int:
    """Run and print; 0 if no attack succeeded."""
    recorder = Recorder()
    files = sorted({str(path) for paths in files_by_attack().values() for path in paths})
    code = pytest.main(["-q", "--no-header", *files], plugins=[recorder])
    lines, is_well = table(recorder.parts())
    print("\n".join(lines))
    return 0 if is_well and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
