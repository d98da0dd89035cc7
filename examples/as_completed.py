"""Results in the order in which they come, and a task that raises:
count the primes below some numbers.
"""

from __future__ import annotations

import argparse

from achilles import DistributedExecutor

LIMITS = (200_000, 50_000, 100_000, -1, 1_000, 20_000, 5_000)


def count_primes(limit: int) -> int:
    """How many primes there are below the limit, by Eratosthenes' sieve."""
    if limit < 0:
        raise ValueError(f"a limit cannot be negative: {limit}")
    sieve = bytearray([1]) * limit
    sieve[:2] = bytes(min(limit, 2))
    for number in range(2, int(limit**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, limit, number)))
    return sum(sieve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help='a broker: "auto" or tcp://host:port; default: no broker')
    arguments = parser.parse_args()
    with DistributedExecutor(address=arguments.address) as executor:
        limits = {executor.submit(count_primes, limit): limit for limit in LIMITS}
        for future in executor.as_completed(limits):
            try:
                print(f"below {limits[future]:>7,}: {future.result():>6,} primes", flush=True)
            except ValueError as error:
                print(f"below {limits[future]:>7,}: {error}", flush=True)


if __name__ == "__main__":
    main()
