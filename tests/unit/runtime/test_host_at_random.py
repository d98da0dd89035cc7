"""Runners are fed, recalled and killed at random; whatever happens, each task has one fate."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest

from achilles.core.protocol import Kill, Recall
from achilles.runtime.serialize import LARGE
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import Driver, driving


class Book:
    """What was given to one runner, by seq, and what became of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.open: dict[int, list[str]] = {}  # names of tasks whose fate is not known, in order
        self.serial = 0

    def give(self, driver: Driver, fn: int, log: str, seq: int, count: int, size: int) -> None:
        self.serial += 1
        names = [f"{self.number}.{self.serial}.{index}" for index in range(count)]
        self.open[seq] = names
        driver.execute(
            seq, fn, *((log, f"{name}\n", bytes(size)) for name in names), runner=self.number
        )

    def settle(self, driver: Driver, done: list[str], returned: list[str]) -> None:
        """Take the driver's news in: results are of the first tasks of a chunk,
        recalls of the last.
        """
        for (runner, seq, index), (status, _) in tuple(driver.results.items()):
            if runner == self.number:
                del driver.results[runner, seq, index]
                assert status == 0
                done.append(self.open[seq][index])
        unstarted = [one.unstarted for one in driver.recalled if one.runner == self.number]
        if self.number in driver.died:
            unstarted.append(driver.died[self.number].unstarted)
        for seq, count in itertools.chain(*unstarted):
            assert 0 < count <= len(self.open[seq])
            returned += self.open[seq][-count:]
            self.open[seq] = self.open[seq][:-count]
        driver.recalled = [one for one in driver.recalled if one.runner != self.number]

    def forget_settled(self, done: set[str]) -> None:
        self.open = {seq: names for seq, names in self.open.items() if set(names) - done}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_each_task_has_one_fate(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    log = str(tmp_path / "log")
    done: list[str] = []
    returned: list[str] = []
    lost: list[str] = []
    with driving() as driver:
        books: dict[int, Book] = {}
        numbers = itertools.count(1)
        fns: dict[int, int] = {}
        for _ in range(150):
            while len(books) < 2:
                number = next(numbers)
                driver.spawn(number)
                assert driver.run(tasks.add, 1, 1, runner=number) == 2  # however slow its start is
                del driver.results[number, 200, 0]
                books[number] = Book(number)
                fns[number] = driver.load(tasks.note_sized, number)
            book = random.choice(list(books.values()))
            match random.choices(("give", "recall", "kill", "step"), (60, 25, 1, 30))[0]:
                case "give" if len(book.open) < 5:
                    seq = random.choice([n for n in range(1, 8) if n not in book.open])
                    size = random.choice((0, 100, 5000, LARGE))
                    book.give(driver, fns[book.number], log, seq, random.randint(1, 20), size)
                case "recall":
                    driver.apply(Recall(book.number))
                case "kill":
                    driver.apply(Kill(book.number))
                    driver.until(lambda number=book.number: number in driver.died)  # type: ignore[misc]
                case _:
                    driver.step(random.choice((0.0, 0.002)))
            for one in tuple(books.values()):
                one.settle(driver, done, returned)
                one.forget_settled(set(done))
                if one.number in driver.died:
                    del driver.died[one.number]
                    del books[one.number]
                    lost += [name for names in one.open.values() for name in names]
        for one in books.values():
            while one.open:
                driver.step()
                one.settle(driver, done, returned)
                one.forget_settled(set(done))
    ran = Path(log).read_text().split()
    lost = [name for name in lost if name not in done]
    assert len(ran) == len(set(ran)), f"seed {seed}: a task ran twice"
    assert len(done) == len(set(done)), f"seed {seed}: a task has two results"
    assert not set(returned) & {*ran, *done}, f"seed {seed}: a task ran although it was returned"
    assert set(done) <= set(ran) <= {*done, *lost}
    assert len({name.split(".")[0] for name in lost}) == len(lost), "one task a death, at most"
