"""`python -m tests.reliability.isolation`: what others do to a client's throughput (R15).

The client's tasks sleep, so that what is measured is its share of the cluster and not of this
machine's two cores: alone, and beside strangers who connect and say nonsense, beside a client that
is stopped when its large values come, and beside one with a hundred thousand tasks in the queue,
which is entitled to half of the slots.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from achilles import DistributedExecutor
from achilles.net.endpoint import parse_endpoint
from tests.chaos import work
from tests.chaos.rig import ROOT, Rig
from tests.reliability import measure

SHARE_MIN = 0.8
TASK_SECONDS = 0.02
SLOTS = 4
OURS = 0  # the number of all tasks that are counted

PROGRAM = """
import sys
from achilles import DistributedExecutor
from tests.chaos import work
executor = DistributedExecutor(address="auto")
log, kind = sys.argv[1:]
if kind == "unread":
    futures = [executor.submit(work.sleep, n, log, 1.0) for n in range(100, 104)]
    futures += [executor.submit(work.fat, n, log, b"", 1 << 26) for n in range(104, 108)]
    print("ready", flush=True)
else:
    futures = [executor.submit(work.sleep, n, log, 0.02) for n in range(1000, 101000)]
    futures[0].result()
    print("ready", flush=True)
futures[-1].result()
"""


def main() -> int:
    """Measure; 1 if a client got less than it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.isolation")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each of six figures")
    options = parser.parse_args()
    with measure.rig(2, SLOTS // 2, measure.SHIPPED) as rig, measure.executor(rig) as executor:

        def rate(meanwhile: Callable[[], object] = lambda: None) -> float:
            return throughput(executor, str(rig.log), options.seconds, meanwhile)

        rate()
        alone = rate()
        noisy = rate(lambda: nonsense(rig)) / alone
        with_unread = beside(rig, "unread", rate) / rate()
        with_queue = beside(rig, "queue", rate) / rate()
    shares = {
        "nonsense on its ports": (noisy, SHARE_MIN),
        "a client that does not read": (with_unread, SHARE_MIN),
        "100,000 queued tasks of another (fair: 0.5)": (with_queue, 0.5 * SHARE_MIN),
    }
    texts = [f"x{share:.2f} beside {name}" for name, (share, _) in shares.items()]
    return measure.finish(
        f"{alone:.0f} tasks a second alone; {'; '.join(texts)}",
        [name for name, (share, least) in shares.items() if share < least],
    )


def throughput(
    executor: DistributedExecutor, log: str, seconds: float, meanwhile: Callable[[], object]
) -> float:
    """Tasks a second, with as many open as keep its slots busy."""
    began = time.monotonic()
    done = 0
    futures = [executor.submit(work.sleep, OURS, log, TASK_SECONDS) for _ in range(2 * SLOTS)]
    while (now := time.monotonic()) - began < seconds:
        concurrent.futures.wait(futures[:1], 0.1)
        while futures and futures[0].done():
            futures.pop(0)
            done += 1
            futures.append(executor.submit(work.sleep, OURS, log, TASK_SECONDS))
        meanwhile()
    for future in futures:
        future.cancel()
    return done / (now - began)


def nonsense(rig: Rig) -> None:
    """A few strangers."""
    join = rig.join("worker")
    assert join is not None
    for address in (join.address, join.worker_address):
        endpoint = parse_endpoint(address)
        for _ in range(2):
            with socket.create_connection((endpoint.host, endpoint.port), 5) as stranger:
                stranger.sendall(random.randbytes(500))


def beside(rig: Rig, kind: str, rate: Callable[[], float]) -> float:
    """The rate while another client does that; it is killed in the end."""
    other = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(rig.log), kind],
        cwd=ROOT,
        env={**rig.environ, "ACHILLES_CLIENT_OUTPUT": "drop"},
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        if kind == "unread":
            measure.await_runs(rig, lambda runs: 103 in runs, "its tasks run")
            other.send_signal(signal.SIGSTOP)
            rig.await_status(lambda status: _has_results(status), "its values have come")
        return rate()
    finally:
        other.kill()
        other.wait()
        if other.stdout is not None:
            other.stdout.close()
        rig.await_status(lambda status: not status["queued"], "its tasks are dropped")


def _has_results(status: dict[str, Any]) -> bool:
    """Whether all large values are at the broker, with nobody to take them."""
    return any(client["done"] == 8 and not client["running"] for client in status["clients"])


if __name__ == "__main__":
    sys.exit(main())
