"""The smallest whole program: squares of numbers, on this machine's cores or on a cluster."""

from __future__ import annotations

import argparse

from achilles import DistributedExecutor


def square(number: int) -> int:
    return number * number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help='a broker: "auto" or tcp://host:port; default: no broker')
    arguments = parser.parse_args()
    with DistributedExecutor(address=arguments.address) as executor:
        print(*executor.map(square, range(20)))


if __name__ == "__main__":
    main()
