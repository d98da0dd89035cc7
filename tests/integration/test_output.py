"""What tasks print on a cluster is printed by their client, before their results are there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from achilles import DistributedExecutor
from benchmarks.cluster import Cluster
from tests import tasks
from tests.modes import CLUSTER, Maker, of_modes
from tests.printed import kept_and_told

BOUND = 60.0


@of_modes(CLUSTER)
def test_print_comes_before_the_result(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    executor = make(2)
    for n in range(20):
        assert executor.submit(print, "line", n).result(20) is None
        assert capsys.readouterr().out == f"line {n}\n"
    executor.submit(print, "no end", end="").result(20)
    executor.submit(tasks.print_to_stderr, "oops").result(20)
    assert capsys.readouterr() == ("no end", "oops\n")


@of_modes(CLUSTER)
def test_everything_of_a_map(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines, whoever prints at the same time."""
    executor = make(4)
    list(executor.map(print, range(500)))
    assert sorted(map(int, capsys.readouterr().out.split())) == list(range(500))


@of_modes(CLUSTER)
def test_below_python(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """Descriptors and child processes count, too."""
    executor = make(1)
    executor.submit(os.write, 1, b"by descriptor\n").result(20)
    executor.submit(os.system, "echo by a child; echo to stderr >&2").result(20)
    assert capsys.readouterr() == ("by descriptor\nby a child\n", "to stderr\n")


@of_modes(CLUSTER)
def test_the_last_words_of_a_task_that_crashes(
    make: Maker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    executor = make(1).with_options(at_most_once=True)
    assert executor.submit(tasks.print_and_die, "last words").exception(20) is not None
    assert "last words\n" in capsys.readouterr().out


@pytest.mark.bad_input(26)
@of_modes(CLUSTER)
def test_a_flood_is_cut(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """And before the result is there, each byte that did not come is counted."""
    executor = make(1)
    size = 10_000_000
    assert executor.submit(tasks.flood, size).result(BOUND) == size
    kept, told = kept_and_told(capsys.readouterr().out)
    assert kept + sum(told) == size
    assert kept < 4 << 20
    executor.submit(print, "after it").result(20)
    assert capsys.readouterr().out == "after it\n"


def test_a_flood_is_its_clients_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same runner, right after it."""
    with Cluster(workers=1, slots=1) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        with (
            DistributedExecutor(address=cluster.address) as one,
            DistributedExecutor(address=cluster.address) as other,
        ):
            flood = one.submit(tasks.flood, 10_000_000)
            lines = other.submit(tasks.print_lines, 300, "a line")
            size = flood.result(BOUND)
            lines.result(BOUND)
    out = capsys.readouterr().out
    assert out.count("a line\n") == 300
    kept, told = kept_and_told(out.replace("a line\n", ""))
    assert kept + sum(told) == size


def test_a_task_may_close_its_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster of its own, whose runners print nothing any more."""
    with Cluster(workers=1, slots=1) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        with DistributedExecutor(address=cluster.address) as executor:
            executor.submit(os.closerange, 1, 3).result(20)
            assert executor.submit(tasks.add, 1).result(20) == 2


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the client, and by the worker."""
    program = textwrap.dedent("""
        import sys
        from achilles import DistributedExecutor
        with DistributedExecutor(address=sys.argv[1]) as executor:
            executor.submit(print, "printed").result()
        """)
    (tmp_path / "main.py").write_text(program)

    def run(cluster: Cluster, **environ: str) -> str:
        done = subprocess.run(
            [sys.executable, "main.py", cluster.address],
            cwd=tmp_path,
            env={**os.environ, "ACHILLES_HOME": cluster.home, **environ},
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=True,
        )
        return done.stdout

    with Cluster(workers=1, slots=1) as cluster:
        assert run(cluster) == "printed\n"
        assert run(cluster, ACHILLES_CLIENT_OUTPUT="drop") == ""
    with Cluster(workers=1, slots=1, environ={"ACHILLES_WORKER_OUTPUT": "worker"}) as cluster:
        assert run(cluster) == ""


def test_nested_tasks_print_at_the_client_of_all(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACHILLES_HOME", cluster.home)
    with DistributedExecutor(address=cluster.address) as executor:
        executor.submit(tasks.print_nested, executor, "from below").result(20)
    assert capsys.readouterr().out == "from below\n"


def test_lines_stay_whole_where_python_does_not_buffer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With PYTHONUNBUFFERED, print writes a line and its end one by one."""
    with Cluster(workers=1, slots=2, environ={"PYTHONUNBUFFERED": "1"}) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        with DistributedExecutor(address=cluster.address) as executor:
            list(executor.map(print, range(300)))
    assert sorted(capsys.readouterr().out.splitlines(), key=int) == [str(n) for n in range(300)]
