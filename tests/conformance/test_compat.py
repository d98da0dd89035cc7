"""The first achilles' calls, with both kinds of executor."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import achilles
from achilles import compat
from tests import tasks
from tests.modes import CLUSTER, OURS, Maker, of_modes


@pytest.fixture(autouse=True)
def _shared(make: Maker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if make.cluster is not None:
        monkeypatch.setenv("ACHILLES_ADDRESS", make.cluster.address)
    else:
        monkeypatch.setenv("ACHILLES_CLIENT_MAX_WORKERS", "2")
    yield
    compat.shutdown()


def numbers() -> Iterator[int]:
    yield from range(20)


@of_modes(*OURS)
def test_results_are_flat(make: Maker) -> None:
    expected = [n + 1 for n in range(20)]
    for args in (range(20), list(range(20)), numbers, [list(range(15)), list(range(15, 20))]):
        assert achilles.map(tasks.add, args, chunksize=3) == expected
        assert list(achilles.imap(tasks.add, args, chunksize=3)) == expected
        assert sorted(achilles.imap_unordered(tasks.add, args, chunksize=3)) == expected
    executor = compat.shared_executor()
    assert (executor.status()["workers_by_name"].keys() == {"local"}) == (make.mode != CLUSTER)


@of_modes(*OURS)
def test_endless_arguments(make: Maker) -> None:
    for call in (achilles.imap, achilles.imap_unordered):
        results = call(math.sqrt, itertools.count, lambda root: root + 1, buffersize=10)
        found = {next(results) for _ in range(50)}
        assert len(found) == 50
        assert found <= {math.sqrt(n) + 1 for n in range(60)}
        results.close()


@of_modes(*OURS)
def test_an_error_of_a_task(make: Maker) -> None:
    errors: list[BaseException] = []
    with pytest.raises(ValueError, match="math domain error"):
        achilles.map(math.sqrt, [4, -1, 9], error_callback=errors.append)
    assert [type(error) for error in errors] == [ValueError]
    results = achilles.imap(math.sqrt, [4, -1, 9])
    assert next(results) == 2.0
    with pytest.raises(ValueError, match="math domain error"):
        next(results)
    assert list(results) == [3.0]


@of_modes(*OURS)
def test_several_jobs_at_once(make: Maker) -> None:
    """The first achilles could run one."""
    found: dict[int, list[int]] = {}

    def run(start: int) -> None:
        found[start] = achilles.map(tasks.add, range(start, start + 100))

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    streams = [achilles.imap(tasks.add, range(50)), achilles.imap_unordered(tasks.add, range(50))]
    together = [value for pair in zip(*streams) for value in pair]
    for thread in threads:
        thread.join()
    assert sum(together) == 2 * sum(range(1, 51))
    assert found == {start: list(range(start + 1, start + 101)) for start in range(4)}


@of_modes(*OURS)
def test_a_program_that_takes_a_part_ends_quietly(make: Maker, tmp_path: Path) -> None:
    """Nothing need be closed, and a task may use the calls, too."""
    program = tmp_path / "program.py"
    program.write_text(
        "import achilles\n"
        "def f(n):\n"
        "    return n + 1\n"
        "def g(n):\n"
        "    import achilles\n"
        "    return sum(achilles.map(f, range(n)))\n"
        "endless = achilles.imap(f, iter(int, 1))\n"
        "print(next(endless), achilles.map(g, [3]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", str(program)],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 [6]\n", "")
