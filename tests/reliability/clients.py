"""`python -m tests.reliability.clients`: what a killed client leaves (R11).

Shipped timings. Clients with long and with waiting tasks and large arguments are killed; from then
on: when nothing of theirs is queued or running at the broker, when no runner runs a task of theirs,
and what the broker's memory is afterwards.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import psutil

from tests.chaos.rig import ROOT, Rig
from tests.reliability import measure

FREE_SECONDS, MEMORY_SECONDS = 35.0, 60.0
# Of what the broker has when it has given back what it can. Each client has twice that at it, and
# small objects that stay are scattered over the memory in between: over 30 clients that makes 1.15.
MEMORY_SHARE = 1.25
SETTLED = 3  # clients before
CALM_SECONDS = 5.0  # the broker gives memory back when nothing large has come for 2 s
LONG_SECONDS = 40.0
WAITING = 2000

PROGRAM = """
import os, sys
from achilles import DistributedExecutor
from tests.chaos import work
executor = DistributedExecutor(address="auto")
log, base = sys.argv[1], int(sys.argv[2])
futures = [executor.submit(work.sleep, base + n, log, float(sys.argv[3])) for n in range(2)]
futures += [executor.submit(work.fat, base + n, log, work.blob(base + n, 1 << 15), 64) for n in range(2, int(sys.argv[4]))]
futures[-1].result()
"""


def main() -> int:
    """Kill so many; 1 if what they leave stays."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.clients")
    parser.add_argument("--clients", type=int, default=6)
    options = parser.parse_args()
    with measure.rig(2, 2, measure.SHIPPED) as rig:
        for _ in range(SETTLED):
            _settle(rig)
        pid = rig.serving_pid()
        assert pid is not None
        broker = psutil.Process(pid)
        before = _calm_memory(broker)
        killed_at = 0.0
        freed, idle = [], []
        for number in range(options.clients):
            killed_at = _run_and_kill(rig, (number + 1) * 1_000_000)
            rig.await_status(lambda s: not s["queued"] and not s["running"], "its tasks are gone")
            freed.append(time.monotonic() - killed_at)
            idle.append(_await_idle(rig) - killed_at)
        back = _await_memory(broker, MEMORY_SHARE * before, killed_at)
        share = broker.memory_info().rss / before
    texts = [
        f"broker free of a killed client after at most {max(freed):.1f} s of {len(freed)}",
        f"its last running task over after {max(idle):.1f} s (they take {LONG_SECONDS:g} s)",
        f"broker's memory x{share:.2f} of what it was {back:.1f} s after the last was killed",
    ]
    held = [max(freed) <= FREE_SECONDS, max(idle) <= FREE_SECONDS, share <= MEMORY_SHARE]
    return measure.finish("; ".join(texts), [t for t, holds in zip(texts, held) if not holds])


def _settle(rig: Rig) -> None:
    """The broker has seen such clients before its memory is looked at for the first time."""
    _run_and_kill(rig, 0, seconds=0.5)
    rig.await_status(lambda s: not s["queued"] and not s["running"], "its tasks are gone")


def _calm_memory(broker: psutil.Process) -> int:
    """Its memory, when it is no less than it was a while before."""
    least, since = broker.memory_info().rss, time.monotonic()
    while time.monotonic() - since < CALM_SECONDS:
        if (now := broker.memory_info().rss) < least:
            least, since = now, time.monotonic()
        time.sleep(0.1)
    return least


def _await_memory(broker: psutil.Process, most: float, killed_at: float) -> float:
    """Wait until it has no more than that, or the time for it is over;
    how long that was after the kill.
    """
    while (passed := time.monotonic() - killed_at) < MEMORY_SECONDS:
        if broker.memory_info().rss <= most:
            break
        time.sleep(0.1)
    return passed


def _run_and_kill(rig: Rig, base: int, seconds: float = LONG_SECONDS) -> float:
    """When it was killed, in the middle of its tasks."""
    words = (str(rig.log), str(base), str(seconds), str(WAITING))
    client = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**rig.environ, "ACHILLES_CLIENT_OUTPUT": "drop"},
    )
    try:
        measure.await_runs(rig, lambda runs: base in runs and base + 1 in runs, "its tasks run")
    finally:
        client.kill()
        client.wait()
    return time.monotonic()


def _await_idle(rig: Rig) -> float:
    """When no runner has a task of before: each slot takes a new one at once."""
    ended = measure.await_runs(rig, lambda runs: _are_over(rig, runs), "its tasks end")
    assert ended
    return time.monotonic()


def _are_over(rig: Rig, runs: object) -> bool:
    assert isinstance(runs, dict)
    alive = {runner.pid for runner in rig.runners()}
    return not any(
        lines[-1].is_begin and lines[-1].pid in alive and number % 1_000_000 < 2
        for number, lines in runs.items()
    )


if __name__ == "__main__":
    sys.exit(main())
