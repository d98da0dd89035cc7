"""A program whose globals change between its calls, at random; run as ``__main__`` with a seed,
and perhaps an address.

What a task returns is compared with what the function returns here at the moment of the call. It
prints each difference, and last how many calls there were.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from achilles import DistributedExecutor

CALLS = 250
BOUND = 30.0
LARGE = 200_000

number, items, table = 0, [0], {"key": 0}
large = bytes(LARGE)


class Plain:
    count = 0
    seen = [0]  # noqa: RUF012 - it is to change in place

    def get(self) -> Any:
        return self.count, list(self.seen), number

    @staticmethod
    def apart() -> Any:
        return direct()


class Held:
    kind = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value, self.kind


held = Held(1)


def direct() -> Any:
    return number, list(items)


def through() -> Any:
    return direct(), table["key"]


def defaults(one: list[int] = [0], *, other: dict[str, int] = {"key": 0}) -> Any:  # noqa: B006 - the same
    return list(one), dict(other), through()


def of_classes() -> Any:
    return Plain().get(), Plain.apart()


def of_large() -> Any:
    return len(large), large[0], defaults()


def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return "decorated", fn(*args)

    return wrapper


decorated = decorate(through)
functions = {"chosen": direct}


def chosen() -> Any:
    return functions["chosen"]()


def of_object() -> Any:
    return held.get(), Held.kind


def with_argument(one: Any) -> Any:
    return one.get() if isinstance(one, Held) else one, direct(), decorated()


def change(choose: random.Random) -> None:
    """Change one thing."""
    global number, items, large
    value = choose.randrange(4)
    match choose.randrange(12):
        case 0:
            number = value
        case 1:
            items[0] = value
        case 2:
            items = [value]
        case 3:
            table["key"] = value
        case 4:
            Plain.count = value
        case 5:
            Plain.seen[0] = value
        case 6:
            defaults.__defaults__[0][0] = value  # type: ignore[index]
        case 7:
            defaults.__kwdefaults__["other"]["key"] = value  # type: ignore[index]
        case 8:
            large = bytes([value]) * LARGE
        case 9:
            functions["chosen"] = choose.choice([direct, through])
        case 10:
            Held.kind = value
        case _:
            held.value = value


def calls(choose: random.Random, executor: DistributedExecutor) -> Iterator[tuple[str, Any, Any]]:
    """A name, what gives the result, and what it must be; one after the other,
    each after a change.
    """
    plain = [direct, through, defaults, of_classes, of_large, decorated, chosen, of_object]
    plain += [Plain.apart, lambda: (number, direct())]
    for _ in range(CALLS):
        change(choose)
        match choose.randrange(5):
            case 0:
                one = Held(choose.randrange(5))
                yield "object", executor.submit(with_argument, one).result, with_argument(one)
            case 1:
                results = executor.map(with_argument, range(5))
                yield (
                    "map",
                    lambda _, results=results: list(results),
                    list(map(with_argument, range(5))),
                )
            case 2:
                yield "method", executor.submit(Plain().get).result, Plain().get()
            case _:
                fn = choose.choice(plain)
                yield fn.__name__, executor.submit(fn).result, fn()


def main(seed: int, address: str | None) -> None:
    choose = random.Random(seed)
    waiting: list[tuple[str, Any, Any]] = []
    count = 0
    with DistributedExecutor(2, address=address) as executor:
        for call in calls(choose, executor):
            waiting.append(call)
            count += 1
            while waiting and (choose.random() < 0.3 or count == CALLS):
                name, result, wanted = waiting.pop(0)
                if (found := result(BOUND)) != wanted:
                    print(f"call {count}, {name}: {found} instead of {wanted}")
    print(f"{count} calls")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
