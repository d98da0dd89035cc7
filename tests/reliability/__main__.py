"""`python -m tests.reliability` runs what shows each promise, and prints the table of
RELIABILITY.md; ``--write`` puts it there.

A command that shows several promises runs once. Exit code 1 if one of them does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.reliability.rows import (
    BESIDES,
    CHAOS,
    JSON_FLAG,
    NEAR,
    ROWS,
    Figure,
    Output,
    Row,
    parse_chaos,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "RELIABILITY.md"
BEGIN, END = "<!-- table: python -m tests.reliability --write -->", "<!-- end of table -->"
COMMAND_SECONDS = 1200.0


def main() -> int:
    """Run, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--rows", type=_number, nargs="*", help="only these, such as R4 R7")
    parser.add_argument("--write", action="store_true", help="put the table into RELIABILITY.md")
    options = parser.parse_args()
    rows = [row for row in (*ROWS, *BESIDES) if options.rows is None or row.number in options.rows]
    rows.sort(key=lambda row: row.number)
    began = time.monotonic()
    outputs: dict[str, Output] = {}
    lines = []
    failed = []
    for row in rows:
        figure = _figure(row, outputs)
        if row.command and not figure.holds:
            failed.append(f"R{row.number}")
        lines.append(line_of(row, figure))
    table = "\n".join([*head(), *lines])
    where = f"{machine()}, {time.monotonic() - began:,.0f} s in all"
    print(f"{where}\n\n{table}\n")
    if options.write:
        write(table, where, only=None if options.rows is None else {f"R{n}" for n in options.rows})
    left_out = sum(not row.command for row in rows)
    print(
        f"{len(rows)} rows, {len(failed)} do not hold ({', '.join(failed) or 'none'}), {left_out} not to be had yet, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def _number(text: str) -> int:
    return int(text.removeprefix("R"))


def _figure(row: Row, outputs: dict[str, Output]) -> Figure:
    if row.read is None:
        return Figure(row.why_not, False)
    if row.command not in outputs:
        outputs[row.command] = run(row.command)
    return row.read(outputs[row.command])


def run(command: str) -> Output:
    """Run it; it ends by itself, or by force after 20 minutes."""
    print(f"... {command}", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *command.split()[1:]]
        report = Path(folder, "chaos.json")
        if command in (CHAOS, NEAR):
            words += [JSON_FLAG, str(report)]
        try:
            done = subprocess.run(
                words,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
                env={**os.environ, "COLUMNS": "200"},
            )
            code, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, text = -1, f"it did not end within {error.timeout:g} s"
        seconds = time.monotonic() - began
        chaos = parse_chaos(report.read_text() if report.exists() else "")
    if code:
        told = [line for line in text.splitlines() if "FAILED" in line or "PROVED NOTHING" in line]
        print("\n".join(told or text.splitlines()[-15:]), file=sys.stderr)
    print(f"    {seconds:.0f} s, exit code {code}", file=sys.stderr, flush=True)
    return Output(code, text, seconds, chaos)


# --- The page -------------------------------------------------------------------------------------


def head() -> list[str]:
    """The first two lines of the table."""
    return ["| # | promise | last figure | holds | command |", "|---|---|---|---|---|"]


def line_of(row: Row, figure: Figure) -> str:
    """A line of the table."""
    holds = ("yes" if figure.holds else "**no**") if row.command else "-"
    command = f"`{row.command}`" if row.command else "-"
    text = figure.text.replace("|", "/")
    return f"| R{row.number} | {row.promise} | {text} | {holds} | {command} |"


def machine() -> str:
    """Where and when, in a line."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return (
        f"{today}, commit {commit or 'unknown'}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, load average {os.getloadavg()[2]:.1f}"
    )


def write(table: str, where: str, only: set[str] | None) -> None:
    """Replace the table of the page, and where and when it was measured;
    of ``only`` some rows, those lines.
    """
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    if only is not None:
        table = merged(old.strip().splitlines(), table.splitlines(), only)
    PAGE.write_text(f"{before}{BEGIN}\n\nLast run: {where}.\n\n{table}\n\n{END}{after}")


def merged(old: list[str], new: list[str], only: set[str]) -> str:
    """The old table with the new lines of some rows."""
    fresh = {number: [line for line in new if line.startswith(f"| {number} |")] for number in only}
    lines: list[str] = []
    for line in old:
        if not line.startswith("|"):
            continue
        number = line.split("|")[1].strip()
        lines += fresh.pop(number, []) if number in only else [line]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
