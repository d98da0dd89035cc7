"""The simulator is worth trusting: each of these small mistakes, planted in a copy of the cores, is caught.

A mutant is a replacement in a core's text. When a core changes so that the text is no longer there, find the new
place of the same mistake.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SEEDS = 600


class Mutant(NamedTuple):
    """A mistake: in which core, what stands there, and what to put instead."""

    name: str
    module: str
    old: str
    new: str
    first: int = 1  # a seed to begin with; later where early ones are known not to meet it


MUTANTS = [
    Mutant(
        "a client gets more slots than it wants",
        "tables",
        "<= self.places",
        "<= self.running",
    ),
    Mutant(
        "a lost worker's tasks are not queued again",
        "scheduler",
        "self._requeue(lease.queue, open_tasks[len(started) :], is_reassigned=True)",
        "pass",
    ),
    Mutant(
        "returned tasks are not queued again",
        "scheduler",
        "self._requeue(lease.queue, held)",
        "pass",
    ),
    Mutant(
        "a task is retried for ever",
        "scheduler",
        "if blame.crashes >= CRASHES_MAX or",
        "if",
    ),
    Mutant(
        "a client that left still waits",
        "scheduler",
        "queue.tasks.clear()\n            queue.live = 0",
        "pass",
        first=401,
    ),
    Mutant(
        "a client that left is not revoked",
        "scheduler",
        "if lease.client is client:\n                    everything",
        "if not lease:\n                    everything",
    ),
    Mutant(
        "a forgotten blob counts as sent",
        "scheduler",
        "worker.blobs.difference_update",
        "list",
    ),
    Mutant(
        "work goes on when the session has ended",
        "agent",
        "        self._runners.clear()\n        self._chunks.clear()\n        self._queue.clear()",
        "        return []",
    ),
    Mutant(
        "what was given back is not reported",
        "agent",
        'return [Send("broker", p.Returned(chunk.run.lease, back))]',
        "return []",
    ),
    Mutant(
        "one task fewer is given back",
        "agent",
        "last = range(size - counts.get(chunk.seq, 0), size)",
        "last = range(size - counts.get(chunk.seq, 0) + 1, size)",
    ),
    Mutant(
        "a crash is charged to nobody",
        "agent",
        "p.Crashed(chunk.run.lease, started[0], reason)",
        "p.Returned(chunk.run.lease, started[:1])",
    ),
    Mutant(
        "a crash is charged to the chunk behind, too",
        "agent",
        "sends = self._take_back(runner, unstarted)\n        reason",
        "sends: list[Send] = []\n        reason",
    ),
    Mutant(
        "work that crossed with its runner's death is charged",
        "agent",
        "message.unstarted + _crossed(runner.chunks, message.last_seq)",
        "message.unstarted",
    ),
    Mutant(
        "revokes are not heeded",
        "agent",
        "chunk = self._chunks.get(revoke.lease)\n        if chunk is None:",
        "chunk = self._chunks.get(revoke.lease)\n        if chunk:",
    ),
    Mutant(
        "nothing is called back from behind a long task",
        "agent",
        "runner.recalled_at = now\n",
        "runner.recalled_at = now + 9\n            continue\n",
    ),
    Mutant(
        "runners keep forgotten blobs in their account",
        "agent",
        "runner.loaded.difference_update(gone)",
        "pass",
    ),
    Mutant(
        "messages that came twice are handled twice",
        "link",
        "        return False, self._ask(now) if header.seq > self.received else []",
        "        return header.seq <= self.received, []",
        first=201,
    ),
    Mutant(
        "gaps are passed over",
        "link",
        "if header.seq == self.received + 1:\n            self.received += 1",
        "if header.seq > self.received:\n            self.received = header.seq",
    ),
    Mutant("nothing is sent again", "link", "for packet in self._kept", "for packet in ()"),
    Mutant(
        "a lost tail is not noticed",
        "link",
        "return True, self._ask(now) if header.seq > self.received else []",
        "return True, []",
    ),
    Mutant(
        "acknowledged messages are kept",
        "link",
        "while kept and kept[0].header.seq <= header.ack:",
        "while kept and kept[0].header.seq < header.ack:",
    ),
    Mutant(
        "a new session begins unnoticed",
        "dialer",
        "heartbeat_interval\n        return Step([], [message])",
        "heartbeat_interval\n        return Step([], [])",
    ),
    Mutant("routes stay", "sessions", "session.route = route\n        self._by", "self._by"),
    Mutant(
        "no amnesty after a stall",
        "sessions",
        "watch.amnesty(now)",
        "pass",
    ),
    Mutant(
        "a new broker gets only what the old one lacked",
        "submission",
        "self._backlog = deque(sorted(self._tasks))",
        "self._backlog = deque(sorted(self._backlog))",
    ),
    Mutant(
        "a blob is not sent to a new broker",
        "submission",
        "self._sent_blobs.clear()",
        "pass",
    ),
    Mutant(
        "cancelled tasks get results",
        "submission",
        "if count == len(fresh):",
        "if fresh:",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place from which Python takes the cores and the simulator before all others."""
    place = tmp_path_factory.mktemp("mutants")
    package = place / "achilles"
    shutil.copytree(
        ROOT / "achilles" / "core", package / "core", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "achilles" / name, package / name)
    shutil.copytree(
        ROOT / "tests" / "sim", place / "tests" / "sim", ignore=shutil.ignore_patterns("test_*")
    )
    return place


def _run(place: Path, first: int, count: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-B",
        "-m",
        "tests.sim",
        "--first",
        str(first),
        "--count",
        str(count),
    ]
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONHASHSEED": "0"}
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=50
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_is_caught(mutant: Mutant, copy: Path) -> None:
    path = copy / "achilles" / "core" / f"{mutant.module}.py"
    original = path.read_text()
    assert original.count(mutant.old) == 1, (
        f"the text of this mutant stands {original.count(mutant.old)} times in core/{mutant.module}.py"
    )
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        run = _run(copy, mutant.first, SEEDS)
    finally:
        path.write_text(original)
    assert run.returncode == 1, f"{mutant.name}: survived {SEEDS} seeds\n{run.stdout}{run.stderr}"
    assert "To see it again: python -m tests.sim --seed" in run.stderr, run.stderr


def test_copy_without_mutant_passes(copy: Path) -> None:
    run = _run(copy, 1, 20)
    assert run.returncode == 0, run.stderr
    assert "20 seeds, 0 failed" in run.stderr
