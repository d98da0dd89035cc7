"""Draw the Mandelbrot set, each row as soon as it is computed;
`--ppm FILE` saves a picture in colour.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from achilles import DistributedExecutor, as_completed

SHADES = " .:-=+*#%@"
STEPS = 120


def row(y: int, width: int, height: int) -> list[int]:
    """For each point of a row, after how many steps it escapes (at most STEPS)."""
    steps_taken = []
    for x in range(width):
        point = complex(-2.2 + 3.2 * x / width, 1.25 - 2.5 * (y + 0.5) / height)
        value, steps = 0j, 0
        while abs(value) <= 2 and steps < STEPS:
            value, steps = value * value + point, steps + 1
        steps_taken.append(steps)
    return steps_taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help='a broker: "auto" or tcp://host:port; default: no broker')
    parser.add_argument("--size", type=int, nargs=2, default=(78, 32), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--ppm", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    width, height = arguments.size
    is_live = sys.stdout.isatty()
    print("\n" * height if is_live else f"{height} rows:", end="", flush=True)
    rows: dict[int, list[int]] = {}
    with DistributedExecutor(address=arguments.address) as executor:
        futures = {executor.submit(row, y, width, height): y for y in range(height)}
        for future in as_completed(futures):
            y = futures[future]
            rows[y] = future.result()
            up = f"\033[{height - y}F{text(rows[y])}\033[{height - y}E"
            print(up if is_live else f" {y}", end="", flush=True)
    if not is_live:
        print("", *(text(rows[y]) for y in range(height)), sep="\n")
    if arguments.ppm:
        pixels = bytes(c for y in range(height) for s in rows[y] for c in (s * 2, s, 255 - s * 2))
        arguments.ppm.write_bytes(b"P6 %d %d 255\n" % (width, height) + pixels)


def text(steps_taken: list[int]) -> str:
    return "".join(SHADES[(steps * (len(SHADES) - 1)) // STEPS] for steps in steps_taken)


if __name__ == "__main__":
    main()
