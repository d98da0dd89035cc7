"""Print the register: each bad input, what becomes of it, and the tests that hold that."""

from __future__ import annotations

from tests.inputs.rows import ROWS, covered


def main() -> None:
    tests = covered()
    for number, row in ROWS.items():
        print(f"{number:>2}  {row.what}\n    {row.becomes}")
        for name in tests.get(number, []):
            print(f"      {name}")
        if row.untested:
            print(f"      not run: {row.untested}")
    untested = [number for number, row in ROWS.items() if row.untested]
    print(
        f"{len(ROWS) - len(untested)} of {len(ROWS)} rows are tested, {len(untested)} are not run"
    )


if __name__ == "__main__":
    main()
