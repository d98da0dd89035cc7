"""Those who only knock: many, for long, and without a word."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from achilles import DistributedExecutor
from achilles.net.endpoint import parse_endpoint
from achilles.net.keys import find_join
from tests import commands, tasks
from tests.modes import wait_until
from tests.security.attacks import attack
from tests.security.zmtp import connect, greeting

CROWD = 600


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough for a crowd of connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 2 * CROWD:
        pytest.skip(f"it takes {2 * CROWD} descriptors, and there are {before[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2 * CROWD), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@attack("T22")
def test_a_crowd_that_says_nothing_is_sent_away_and_others_are_served(descriptors: None) -> None:
    """Connections that send nothing, half a greeting, one byte now and then;
    and those that come and go.
    """
    with (
        commands.broker() as broker,
        contextlib.ExitStack() as stack,
    ):
        join = find_join(Path(os.environ["ACHILLES_HOME"]), "client", None)
        doors = [parse_endpoint(address) for address in (join.address, join.worker_address)]
        crowd = [stack.enter_context(connect(doors[n % 2])) for n in range(CROWD)]
        with commands.worker("--join", _over_tcp("worker")) as worker:
            for number, one in enumerate(crowd):
                with contextlib.suppress(OSError):
                    one.send(greeting(b"CURVE")[: number % 64])
            with DistributedExecutor(address="auto") as executor:
                for number in range(100):
                    connect(doors[number % 2]).close()
                    assert executor.submit(tasks.add, number).result(20) == number + 1
                wait_until(lambda: all(map(_is_closed, crowd)), "all of them are sent away")
                assert executor.status()["workers"] == 1
            assert worker.stop() == 0
        assert broker.stop() == 0


def _over_tcp(role: str) -> str:
    """A join file of this host that names no ipc socket."""
    home = Path(os.environ["ACHILLES_HOME"])
    exported = commands.run("keys", "export", role, "--name", "far")
    file = home / f"far-{role}.join"
    file.touch(mode=0o600)
    file.write_text(exported.stdout)
    return str(file)


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
