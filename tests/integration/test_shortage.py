"""Clients that may have no more descriptors or memory, on real processes:
what they send is sent all the same.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from achilles import DistributedExecutor
from tests import commands

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="descriptors are counted in /proc, and a memfd is wanted"
)

WITH_SO_MANY_LEFT = """
import os, resource, sys
from achilles import DistributedExecutor

executor = DistributedExecutor(address="auto")
assert executor.submit(pow, 2, 3).result(20) == 8
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
there = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(resource.RLIMIT_NOFILE, (there + int(sys.argv[1]), hard))
sizes = 3_000_000, 30_000_000
futures = [executor.submit(len, bytes(size)) for size in sizes]
futures += [executor.submit(bytes, size) for size in sizes]
seen = [future.result(30) for future in futures]
assert seen[:2] == list(sizes)
assert [len(result) for result in seen[2:]] == list(sizes)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert executor.submit(len, bytes(sizes[1])).result(30) == sizes[1]
executor.shutdown()
print("done")
"""


WITH_SO_MUCH_MEMORY = """
import concurrent.futures, resource, sys
from achilles import DistributedExecutor
from achilles.runtime import shared

shared.IS_AVAILABLE = False  # or a memfd would travel as a reference
executor = DistributedExecutor(address="auto")
assert executor.submit(pow, 2, 3).result(20) == 8
payloads = [bytes(3_000_000), bytes(30_000_000)]
with open("/proc/self/statm") as file:
    there = int(file.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (there + int(sys.argv[1]) * 1_000_000, hard))
first = executor.submit(len, payloads[0])
try:
    first.result(1.5)
except concurrent.futures.TimeoutError:
    pass  # it could not be sent yet
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert first.result(30) == 3_000_000
assert executor.submit(len, payloads[1]).result(30) == 30_000_000
executor.shutdown()
print("done")
"""


BEGINS_WITH_SO_MANY_LEFT = """
import os, resource, sys
import achilles.net.client
from achilles import DistributedExecutor
from achilles.errors import BrokerUnreachableError

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
there = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(resource.RLIMIT_NOFILE, (there + int(sys.argv[1]), hard))
try:
    DistributedExecutor(address="auto").shutdown()
except (BrokerUnreachableError, OSError) as error:
    assert "Too many open files" in str(error)
else:
    raise AssertionError("it has begun")
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert len(os.listdir("/proc/self/fd")) - 1 == there
executor = DistributedExecutor(address="auto")
assert executor.submit(pow, 2, 3).result(20) == 8
executor.shutdown()
print("done")
"""

DIALS_WITH_SO_MANY_LEFT = """
import errno, os, resource, sys, time
import zmq
from achilles.net.endpoint import Endpoint, dial_dealer

context = zmq.Context()
endpoint = Endpoint("ipc", "", 0, "/nowhere")
first = context.socket(zmq.DEALER)  # has the context begin
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
outcomes = []
for free in range(int(sys.argv[1])):
    there = len(os.listdir("/proc/self/fd")) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + free, hard))
    try:
        dialed = dial_dealer(context, endpoint, None)
    except zmq.ZMQError as error:
        assert error.errno == errno.EMFILE
        outcomes.append(False)
    else:
        dialed.watch.close()
        dialed.socket.close(0)
        outcomes.append(True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) - 1 > there:  # libzmq closes them in a thread of its own
        assert time.monotonic() < deadline, free
        time.sleep(0.001)
assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}
context.destroy(0)
print("done")
"""


@pytest.fixture
def on_cluster() -> Iterator[None]:
    with commands.broker() as broker:
        with commands.worker() as worker:
            yield
            assert worker.stop() == 0
        assert broker.stop() == 0


def run(script: str, argument: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, str(argument)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), (argument, done.stderr)


@pytest.mark.usefixtures("on_cluster")
def test_large_calls_without_descriptors_are_done_and_the_executor_stays() -> None:
    for free in (0, 1, 2, 7):
        run(WITH_SO_MANY_LEFT, free)


@pytest.mark.usefixtures("on_cluster")
def test_large_calls_with_little_memory_are_done_and_the_executor_stays() -> None:
    """Megabytes: too little for a thread's stack, and for those of three."""
    for left in (5, 20):
        run(WITH_SO_MUCH_MEMORY, left)


@pytest.mark.usefixtures("on_cluster")
def test_without_descriptors_to_begin_with_an_executor_is_an_error_and_the_next_one_works() -> None:
    """libzmq ends the process that has some for a context, but not all."""
    for free in (2, 3, 5, 8):
        run(BEGINS_WITH_SO_MANY_LEFT, free)


def test_a_socket_that_cannot_be_had_leaves_nothing_open() -> None:
    run(DIALS_WITH_SO_MANY_LEFT, 8)


def test_pipes_leave_descriptors_to_connections() -> None:
    """libzmq ends a broker that has none for the next connection;
    with pipes for all there would be none after 42.
    """
    limited = ("sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *commands.ACHILLES, "broker")
    started = commands.Command(
        (*limited, "--bind", "tcp://127.0.0.1:0"), ready="look, and stop", environ={}
    )
    with started as broker, commands.worker(), contextlib.ExitStack() as ends:
        serving = broker.serving()
        for _ in range(60):
            executor = DistributedExecutor(address="auto")
            ends.callback(executor.shutdown)
            assert executor.submit(pow, 2, 3).result(20) == 8
        assert broker.serving() == serving
        assert serving.num_fds() < 150
        ends.close()
    assert "another one takes its place" not in broker.said
