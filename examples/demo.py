"""The whole of achilles in one program: a broker, two workers, and the loss of one of them.

Counts the words of every text file of the running Python's standard library (or below ``--root``),
one task a file, and kills one worker with SIGKILL in the middle, while it holds work. Prints what
came out, and whether it is what a plain loop in this process counts. Exits with 0 only if it is, if
tasks were reassigned, and if nothing is left running. All that it starts and writes lives in a
temporary folder, which it removes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias

import psutil

from achilles import DistributedExecutor, as_completed
from achilles.errors import AchillesError

WORKERS = 2
SLOTS = 2
START_SECONDS = 30.0  # for a process to start and be there for the others, on a busy machine
END_SECONDS = 15.0
SKIPPED = {"__pycache__", "site-packages", "dist-packages", ".git", ".venv"}


Counted: TypeAlias = "tuple[int, Counter[str]]"  # what there is in one file: its bytes, its words


class Result(NamedTuple):
    """What a cluster made of the files."""

    total: Counter[str]
    size: int
    digests: dict[Path, bytes]
    seconds: float
    reassigned: int
    killed_after: int


class DemoError(Exception):
    """The demonstration cannot go on; the text is for the user."""


def count_words(path: Path) -> Counted:
    """The task: all words of a file, in lower case."""
    content = path.read_bytes()
    text = content.decode("utf-8", errors="replace").lower()
    return len(content), Counter(re.findall(r"[^\W\d_]+", text))


def text_files(root: Path) -> list[Path]:
    """All regular files below the folder that can be read and have no zero byte near their
    start.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        for path in (Path(folder, name) for name in sorted(names)):
            with contextlib.suppress(OSError):
                if path.is_file() and b"\0" not in _head(path):
                    found.append(path.resolve())
    return list(dict.fromkeys(found))  # a file that has two names counts once


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8192)


def digest(counted: Counted) -> bytes:
    """Equal for equal counts; thousands of whole counters would fill the memory."""
    size, words = counted
    return blake2b(repr((size, sorted(words.items()))).encode()).digest()


class Cluster:
    """A broker and workers as processes of their own, with a home that nobody else knows."""

    def __init__(self, folder: Path) -> None:
        self._logs = folder / "logs"
        self._logs.mkdir()
        home = folder / "home"
        home.mkdir(mode=0o700)
        for name in [name for name in os.environ if name.startswith("ACHILLES_")]:
            del os.environ[name]
        os.environ["ACHILLES_HOME"] = str(home)  # for this process too: "auto" looks there
        self._home = str(home)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``achilles ARGUMENTS``; what it says goes to a log."""
        with (self._logs / name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "achilles", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this program, which then ends them in order
            )
        return self.processes[name]

    def wait_for(self, what: str, is_there: Callable[[], bool]) -> None:
        """Return when the condition holds.

        Raises:
            DemoError: it does not in time, or a process has ended.
        """
        deadline = time.monotonic() + START_SECONDS
        while not is_there():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended:
                raise DemoError(f"{ended[0]} ended while waiting for {what}:\n{self.log(ended[0])}")
            if time.monotonic() > deadline:
                logs = "\n".join(f"{name}: {self.log(name)}" for name in self.processes)
                raise DemoError(f"{what} did not come within {START_SECONDS:.0f} s\n{logs}")
            time.sleep(0.05)

    def status(self) -> dict[str, object] | None:
        """What ``achilles status`` says, or None while no broker answers."""
        command = [sys.executable, "-m", "achilles", "status", "-o", "json"]
        answer = subprocess.run(command, capture_output=True, timeout=START_SECONDS, check=False)
        if answer.returncode:
            return None
        status: dict[str, object] = json.loads(answer.stdout)
        return status

    def log(self, name: str) -> str:
        """The end of what a process said."""
        return (self._logs / name).read_text(errors="replace")[-2000:].strip()

    def stop(self) -> list[str]:
        """End all processes, gently first; returns those that were left over, which are killed."""
        if any(process.poll() is None for process in self.processes.values()):
            command = [sys.executable, "-m", "achilles", "shutdown", "--yes"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=END_SECONDS, check=False)
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        while (left := list(self._left())) and time.monotonic() < deadline:
            time.sleep(0.02)
        names = []
        for straggler in left:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(straggler.cmdline())[:100])
                straggler.kill()
        for process in self.processes.values():
            process.wait()
        return names

    def _left(self) -> Iterator[psutil.Process]:
        """All processes that belong to this home, runners whose worker is dead included."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.pid != os.getpid()
                    and process.environ().get("ACHILLES_HOME") == self._home
                ):
                    yield process


class Progress:
    """One line that is rewritten on a terminal; elsewhere, a line for each fifth."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._is_live = sys.stderr.isatty()
        self._shown = 0

    def show(self, done: int) -> None:
        step = (100 if self._is_live else 5) * done // self._count
        if step != self._shown:
            self._shown = step
            end = "\n" if done == self._count or not self._is_live else ""
            self._print(f"{done:,} of {self._count:,} files", end)

    def say(self, text: str) -> None:
        """A line of its own among those of the progress."""
        self._print(text, "\n")

    def _print(self, text: str, end: str) -> None:
        start = "\r\033[K" if self._is_live else ""
        print(f"{start}  {text}", end=end, file=sys.stderr, flush=True)


def start_cluster(cluster: Cluster) -> None:
    """A broker, and the workers when it answers."""
    cluster.start("broker", "broker", "--bind", "tcp://127.0.0.1:0")
    cluster.wait_for("the broker", lambda: cluster.status() is not None)
    for number in range(1, WORKERS + 1):
        name = f"worker-{number}"
        cluster.start(name, "worker", "--slots", str(SLOTS), "--name", name)


def kill_worker(cluster: Cluster, executor: DistributedExecutor, name: str) -> bool:
    """Kill the worker with SIGKILL if it holds work; whether it did.

    It is stopped first, so that it holds what the broker says that it holds when the signal comes.
    """
    worker = cluster.processes[name]
    worker.send_signal(signal.SIGSTOP)
    time.sleep(0.05)  # results that it sent before arrive meanwhile
    rows = executor.status()["workers_by_name"].values()
    if any(row["running"] for row in rows if row["pid"] == worker.pid):
        worker.kill()
        worker.wait()
        return True
    worker.send_signal(signal.SIGCONT)
    return False


def count_on_cluster(cluster: Cluster, paths: list[Path], progress: Progress) -> Result:
    """Count the words of all files, and kill a worker when a third of them is done."""
    total: Counter[str] = Counter()
    size = killed_after = 0
    digests: dict[Path, bytes] = {}
    with DistributedExecutor(address="auto") as executor:
        cluster.wait_for("both workers", lambda: executor.status()["workers"] == WORKERS)
        started = time.monotonic()
        futures = {executor.submit(count_words, path): path for path in paths}
        try:
            for future in as_completed(futures):
                counted = future.result()
                size += counted[0]
                total.update(counted[1])
                digests[futures[future]] = digest(counted)
                progress.show(len(digests))
                is_time = not killed_after and len(digests) >= len(paths) // 3
                if is_time and kill_worker(cluster, executor, f"worker-{WORKERS}"):
                    killed_after = len(digests)
                    progress.say(f"worker-{WORKERS} is killed, with SIGKILL, while it holds work")
            seconds = time.monotonic() - started
            reassigned = executor.status()["reassigned"]
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return Result(total, size, digests, seconds, reassigned, killed_after)


def count_here(paths: list[Path]) -> tuple[dict[Path, bytes], Counter[str], float]:
    """The same with a plain loop."""
    started = time.monotonic()
    total: Counter[str] = Counter()
    digests = {}
    for path in paths:
        counted = count_words(path)
        total.update(counted[1])
        digests[path] = digest(counted)
    return digests, total, time.monotonic() - started


def print_table(result: Result, is_equal: bool, different: list[Path], seconds_here: float) -> None:
    equal = (
        f"yes, all {len(result.digests):,} files"
        if is_equal
        else f"NO: {len(different):,} files differ"
    )
    rows = [
        ("files", f"{len(result.digests):,}"),
        ("bytes", f"{result.size:,}"),
        ("words", f"{result.total.total():,}"),
        *(
            ("commonest words" if rank == 0 else "", f"{word:<12} {count:>10,}")
            for rank, (word, count) in enumerate(result.total.most_common(10))
        ),
        ("seconds", f"{result.seconds:.2f} (a plain loop: {seconds_here:.2f})"),
        (
            "tasks reassigned",
            f"{result.reassigned:,} (worker killed after {result.killed_after:,} files)",
        ),
        ("counts as a plain loop's", equal),
    ]
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    print(line, *(f"{name:<{width}}  {value}" for name, value in rows), line, sep="\n", flush=True)


def demonstrate(cluster: Cluster, paths: list[Path]) -> list[str]:
    """Run it all; returns what went wrong."""
    print(f"Starting a broker and {WORKERS} workers of {SLOTS} slots.", file=sys.stderr, flush=True)
    start_cluster(cluster)
    result = count_on_cluster(cluster, paths, Progress(len(paths)))
    print("Counting the same with a plain loop.", file=sys.stderr, flush=True)
    digests, total, seconds_here = count_here(paths)
    different = [path for path in paths if result.digests.get(path) != digests[path]]
    is_equal = not different and result.total == total
    print_table(result, is_equal, different, seconds_here)
    problems = []
    if not is_equal:
        names = "".join(f"\n  {path}" for path in different[:10])
        problems.append(f"the counts of {len(different):,} files differ from a plain loop's{names}")
    if not result.reassigned:
        problems.append("no task was reassigned: too few files to lose a worker in their middle?")
    return problems


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--root", type=Path, default=Path(sysconfig.get_path("stdlib")), metavar="DIR"
    )
    root: Path = parser.parse_args().root
    if not root.is_dir():
        parser.error(f"--root: {root} is not a folder")
    paths = text_files(root)
    if not paths:
        parser.error(f"--root: there are no text files below {root}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    with tempfile.TemporaryDirectory(prefix="achilles-") as folder:
        cluster = Cluster(Path(folder))
        problems: list[str] = []
        try:
            problems = demonstrate(cluster, paths)
        except (DemoError, AchillesError, OSError, subprocess.SubprocessError) as error:
            problems.append(str(error))
        finally:
            left = cluster.stop()
    problems += [f"still ran at the end, and was killed: {command}" for command in left]
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
