"""The examples, the README's Python blocks and the demonstration run as they are printed,
warnings being errors.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from achilles import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "demo.py")
PAGES = ("README.md", "docs/migration.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)
    )
]
START_SECONDS = 20

# What an example must print, so that it cannot pass by doing nothing.
EXPECTED = {
    "as_completed.py": "below 200,000: 17,984 primes",
    "mandelbrot.py": "@@@@@@@@",
    "squares.py": "0 1 4 9 16 25",
    "swap_process_pool.py": "the longest chain has 278 steps",
    "word_count.py": "files, ",
}
ARGUMENTS = {"word_count.py": [str(ROOT / "examples")]}


def run(
    *arguments: str, cwd: Path, environ: dict[str, str] | None = None, timeout: float = 50
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_ran(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which a broker and a worker of two slots run."""
    folder = Path(tempfile.mkdtemp(prefix="ach-"))
    environ = {"ACHILLES_HOME": str(folder)}
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        with (folder / f"{arguments[0]}.log").open("wb") as log:
            command = [sys.executable, "-m", "achilles", *arguments]
            processes.append(
                subprocess.Popen(command, env={**os.environ, **environ}, stdout=log, stderr=log)
            )

    def wait_for_status(pattern: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            status = run("-m", "achilles", "status", "-o", "json", cwd=folder, environ=environ)
            if status.returncode == 0 and re.search(pattern, status.stdout):
                return
            logs = "\n".join(log.read_text() for log in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{status.stdout}\n{status.stderr}\n{logs}"

    try:
        start("broker", "--bind", "tcp://127.0.0.1:0")
        wait_for_status("")
        start("worker", "--slots", "2")
        wait_for_status(r'"workers":\s*1\b')
        yield environ
    finally:
        run("-m", "achilles", "shutdown", "--yes", cwd=folder, environ=environ)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_every_example_has_an_expectation() -> None:
    assert {example.name for example in EXAMPLES} == EXPECTED.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_under_60_lines(example: Path) -> None:
    assert len(example.read_text("utf-8").splitlines()) < 60


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_alone(example: Path, tmp_path: Path) -> None:
    arguments = ARGUMENTS.get(example.name, [])
    done = run("-W", "error", str(example), *arguments, cwd=tmp_path)
    assert_ran(done)
    assert EXPECTED[example.name] in done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_on_a_cluster(example: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    arguments = [*ARGUMENTS.get(example.name, []), "--address", "auto"]
    done = run("-W", "error", str(example), *arguments, cwd=tmp_path, environ=cluster)
    assert_ran(done)
    assert EXPECTED[example.name] in done.stdout


def test_mandelbrot_saves_a_picture(tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "mandelbrot.py")
    assert_ran(run(example, "--size", "40", "20", "--ppm", "picture.ppm", cwd=tmp_path))
    picture = (tmp_path / "picture.ppm").read_bytes()
    assert picture.startswith(b"P6 40 20 255\n")
    assert len(picture) == len(b"P6 40 20 255\n") + 3 * 40 * 20


def test_pages_have_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, cluster: dict[str, str]) -> None:
    (tmp_path / "block.py").write_text(block, "utf-8")
    done = run("-W", "error", "block.py", cwd=tmp_path, environ=cluster)
    assert_ran(done)
    assert done.stdout


def test_migration_names_what_was_and_what_is() -> None:
    table = re.findall(
        r"^\| (.+?) \| (.+?) \|$", (ROOT / "docs/migration.md").read_text("utf-8"), re.M
    )
    was = " ".join(row[0] for row in table)
    for name in (
        *("runAchillesServer", "runAchillesNode", "genConfig", "killCluster", "cluster_status"),
        *("map(", "imap(", "imap_unordered(", ".env", "YAML", "callback_error"),
    ):
        assert name in was
    commands = set(re.findall(r"`achilles ([a-z]+)", " ".join(row[1] for row in table)))
    assert {"broker", "worker", "status", "shutdown", "init"} <= commands
    assert commands <= cli.main.commands.keys()


def test_readme_begins_with_demo_and_test() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, re.M | re.S)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert commands[:2] == ["make demo", "make test"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, which must be empty in the end."""
    folder = Path(tempfile.mkdtemp(prefix="ach-"))
    yield folder
    left = [str(path) for path in folder.rglob("*")]
    shutil.rmtree(folder)
    assert not left


@pytest.mark.timeout(180)
def test_demo_survives_the_loss_of_a_worker(tmp_path: Path, temporary: Path) -> None:
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"one word and another {number} " * 3_000)
    (tmp_path / "binary").write_bytes(b"no\0text")
    arguments = [str(ROOT / "examples" / "demo.py"), "--root", str(tmp_path)]
    done = run(*arguments, cwd=tmp_path, environ={"TMPDIR": str(temporary)}, timeout=150)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    table = dict(re.findall(r"^(\S.*?)  +(\S.*)$", done.stdout, re.M))
    assert table["files"] == "400"
    assert table["words"] == f"{400 * 4 * 3_000:,}"
    assert table["counts as a plain loop's"] == "yes, all 400 files"
    assert int(table["tasks reassigned"].split()[0]) > 0


def test_demo_refuses_a_root_that_is_not_there(tmp_path: Path) -> None:
    done = run(str(ROOT / "examples" / "demo.py"), "--root", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere is not a folder" in done.stderr
