"""Each way in which a program can end, embedded and on a cluster: nothing of it is left,
and the cluster is as before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.net.control import request
from achilles.net.keys import find_join
from achilles.net.peer import dialer_to
from benchmarks.cluster import Cluster
from tests import tasks
from tests.integration.test_faults import QUICK
from tests.modes import wait_until

ROOT = Path(__file__).parents[2]
END_SECONDS = 30.0
SHARED = Path("/dev/shm")

PROGRAM = """
import os, sys, time
from achilles import DistributedExecutor

NOTES = os.environ["NOTES"]

def work(seconds, data):
    with open(NOTES, "a") as file:
        file.write("begun\\n")
    time.sleep(seconds)
    return data

data = bytes(1 << 21)
with DistributedExecutor(1) as executor:
    assert executor.submit(len, data).result() == len(data)
    try:
"""


class End(NamedTuple):
    """How a program ends: what it does, which signals it gets, its exit code,
    and the last line that it says.
    """

    text: str
    signals: tuple[signal.Signals, ...]
    code: int
    says: str = ""
    begun: int | None = None  # tasks; None: not all of the forty


SUBMIT = "executor.submit(work, 0.01, data)"
WAIT = "[executor.submit(work, {}, data) for _ in range(40)][-1].result()"
ENDS = {
    "normal": End("list(executor.map(work, [0.01] * 4, [data] * 4))", (), 0, begun=4),
    "exception": End(f"{SUBMIT}; {SUBMIT}; 1 / 0", (), 1, "ZeroDivisionError", begun=2),
    "sys.exit": End(f"{SUBMIT}; sys.exit(3)", (), 3, begun=1),
    "Ctrl-C": End(WAIT.format(0.3), (signal.SIGINT,), -signal.SIGINT, "KeyboardInterrupt"),
    "Ctrl-C without with": End(
        "executor = DistributedExecutor(1); " + WAIT.format(0.3),
        (signal.SIGINT,),
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
    "Ctrl-C twice": End(
        WAIT.format(60), (signal.SIGINT,) * 2, -signal.SIGINT, "KeyboardInterrupt", begun=1
    ),
    "SIGTERM": End(WAIT.format(60), (signal.SIGTERM,), -signal.SIGTERM, begun=1),
    "SIGKILL": End(WAIT.format(60), (signal.SIGKILL,), -signal.SIGKILL, begun=1),
}


class Program:
    """A program of its own session, with a folder for what it writes;
    it is killed if it does not end.
    """

    def __init__(self, folder: Path, text: str, environ: dict[str, str]) -> None:
        self.notes = folder / "notes"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        (folder / "program.py").write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "program.py"],
            cwd=folder,
            env={
                **environ,
                "NOTES": str(self.notes),
                "TMPDIR": str(self.temporary),
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end_by(self, signals: tuple[signal.Signals, ...]) -> tuple[int, str]:
        """Send it these signals, the next one when it has noticed the last;
        its exit code and what it said.
        """
        try:
            if signals:
                wait_until(lambda: tasks.notes(self.notes), "a task runs")
            for number, one in enumerate(signals):
                if number:
                    assert self.process.stdout is not None
                    assert self.process.stdout.readline() == "interrupted\n"
                self.process.send_signal(one)
            _, said = self.process.communicate(timeout=END_SECONDS)
            return self.process.returncode, said
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()

    def processes(self) -> list[int]:
        """What is left of it and of what it started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("NOTES") == str(self.notes):
                    found.append(process.pid)
        return found


@pytest.fixture(scope="module")
def quick_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one slot, which has had such a client, and soon notices that one is gone."""
    with Cluster(1, 1, environ=QUICK) as cluster:
        program = Program(tmp_path_factory.mktemp("first"), text_of(ENDS["normal"]), of(cluster))
        assert program.end_by(()) == (0, "")
        yield cluster


def of(cluster: Cluster) -> dict[str, str]:
    """The environment of its client."""
    return {**os.environ, "ACHILLES_HOME": cluster.home, "ACHILLES_ADDRESS": cluster.address}


def look(cluster: Cluster) -> p.Status:
    answer = request(
        dialer_to(find_join(Path(cluster.home), "admin", None)), p.StatusRequest(), timeout=20
    )
    assert isinstance(answer, p.Status)
    return answer


def is_idle(cluster: Cluster) -> bool:
    status = look(cluster)
    return not (status.clients or status.queued or status.running)


def files(folder: str | Path) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*")}


def shared() -> set[str]:
    """What is in shared memory, without the semaphores of others."""
    names = os.listdir(SHARED) if SHARED.is_dir() else []
    return {name for name in names if not name.startswith("sem.")}


def text_of(end: End) -> str:
    return (
        f"{PROGRAM}        {end.text}\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
        "        raise\n"
    )


def check_end(end: End, code: int, said: str, notes: Path) -> None:
    assert code == end.code, said
    begun = len(tasks.notes(notes))
    assert begun == end.begun if end.begun is not None else begun < 40
    if len(end.signals) > 1:  # the second may have come anywhere in what the first began
        assert end.says in said
    elif end.says:
        assert said.splitlines()[-1].startswith(end.says), said
        assert said.count("Traceback") == 1, said
    else:
        assert said == ""


@pytest.mark.bad_input(62, 63, 64)
@pytest.mark.parametrize("name", ENDS)
def test_of_an_embedded_program_nothing_is_left(
    name: str, tmp_path: Path, achilles_home: Path
) -> None:
    end, before = ENDS[name], shared()
    program = Program(tmp_path, text_of(end), dict(os.environ))
    code, said = program.end_by(end.signals)
    wait_until(lambda: not program.processes(), "no runner is left")
    check_end(end, code, said, program.notes)
    assert files(program.temporary) == files(achilles_home) == set()
    wait_until(lambda: shared() <= before, "no shared memory is left")


@pytest.mark.bad_input(62, 63, 64)
@pytest.mark.parametrize("name", ENDS)
def test_of_a_clusters_client_nothing_is_left(
    name: str, tmp_path: Path, quick_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, cluster = ENDS[name], quick_cluster
    assert cluster.broker is not None
    broker, *workers = (psutil.Process(one.pid) for one in (cluster.broker, *cluster.workers))
    servers = [broker, *broker.children(), *workers]
    monkeypatch.setenv("ACHILLES_HOME", cluster.home)
    with DistributedExecutor(address=cluster.address) as executor:  # so that there is a runner
        assert executor.submit(len, bytes(1 << 21)).result(END_SECONDS) == 1 << 21
    wait_until(lambda: is_idle(cluster), "the client before it is forgotten")
    descriptors = [server.num_fds() for server in servers]
    before = (files(cluster.home), shared())

    program = Program(tmp_path, text_of(end), of(cluster))
    code, said = program.end_by(end.signals)
    check_end(end, code, said, program.notes)
    assert not program.processes()
    wait_until(lambda: is_idle(cluster), "the client is forgotten, and its tasks")
    assert files(program.temporary) == set()
    wait_until(lambda: files(cluster.home) == before[0], "no file is left")
    wait_until(lambda: shared() <= before[1], "no shared memory is left")
    for server, count in zip(servers, descriptors, strict=True):
        wait_until(
            lambda server=server, count=count: server.num_fds() <= count,  # type: ignore[misc]
            "no descriptor is left",
        )
