"""The same program with ProcessPoolExecutor and with DistributedExecutor: one name differs,
no result does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from functools import partial

from achilles import DistributedExecutor


def chain_length(start: int) -> int:
    """How many steps 3n + 1 takes from there to 1."""
    steps = 0
    while start != 1:
        start = 3 * start + 1 if start % 2 else start // 2
        steps += 1
    return steps


def invert(number: int) -> float:
    return 1 / number


def program(make_executor: Callable[[], Executor]) -> list[object]:
    """What somebody's program does with an executor: map, submit,
    the standard library's as_completed, an error.
    """
    with make_executor() as executor:
        lengths = list(executor.map(chain_length, range(1, 20_000), chunksize=500))
        futures = {executor.submit(pow, 3, power): power for power in range(50)}
        powers = {futures[future]: future.result() for future in as_completed(futures)}
        error = executor.submit(invert, 0).exception()
    return [max(lengths), sum(lengths), sorted(powers.items()), type(error), str(error)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help='a broker: "auto" or tcp://host:port; default: no broker')
    arguments = parser.parse_args()
    expected = program(partial(ProcessPoolExecutor, max_workers=2))
    results = program(partial(DistributedExecutor, max_workers=2, address=arguments.address))
    if results != expected:
        raise SystemExit(f"the results differ:\n  {results}\n  {expected}")
    print(f"equal results from both; the longest chain has {results[0]} steps")


if __name__ == "__main__":
    main()
