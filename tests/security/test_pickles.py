"""Neither the broker nor a worker's own process ever unpickles, whoever sends what."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.core.link import Link
from achilles.net.endpoint import parse_endpoint
from achilles.net.keys import find_join
from tests import commands, tasks
from tests.brokers import RawPeer
from tests.modes import wait_until
from tests.security.attacks import attack
from tests.security.canary import Canary, unpickled, watched, watched_command
from tests.unit.core.messages import WIRE

pytestmark = pytest.mark.timeout(120)


class Site(NamedTuple):
    """A broker and a worker that note what they unpickle, and a canary for what anybody does."""

    broker: commands.Command
    worker: commands.Command
    reports: tuple[Path, Path]
    canary: Canary

    def end(self) -> None:
        """Stop both, and check that they unpickled nothing."""
        assert self.worker.stop() == 0, self.worker.said
        assert self.broker.stop() == 0, self.broker.said
        of_broker, of_worker = map(unpickled, self.reports)
        assert of_broker == [[], []], "the process that serves, and its parent"
        assert of_worker == [[]]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    reports = (tmp_path / "broker", tmp_path / "worker")
    bind = ("broker", "--bind", "tcp://127.0.0.1:0")
    with watched_command(reports[0], "look, and stop", *bind) as broker:
        arguments = ("worker", "--slots", "2", "--name", "honest")
        with watched_command(reports[1], "stop it:", *arguments) as worker:
            yield Site(broker, worker, reports, Canary(tmp_path / "canary"))


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    done = subprocess.run(watched("check"), capture_output=True, timeout=30, check=True)
    events = json.loads(done.stdout)
    assert "loads" in events
    assert any(event.startswith("find_class ('json'") for event in events)
    canary = Canary(tmp_path / "canary")
    assert canary.readers() == set()
    import pickle

    pickle.loads(canary.bomb)
    assert canary.readers() == {os.getpid()}


def door(role: str, *, tcp: bool = False) -> RawPeer:
    """A connection with this user's key of a role."""
    join = find_join(Path(os.environ["ACHILLES_HOME"]), role, None)
    address = join.worker_address if role == "worker" else join.address
    return RawPeer(parse_endpoint(address) if tcp else join.endpoint(), join.keys)


def leave(peer: RawPeer) -> None:
    """End the session, if it is not over yet:
    a worker that stays would be given the honest client's tasks.
    """
    peer.send_frames(*p.encode(p.Header(peer.link.token, peer.link.sent + 1, 0), p.Goodbye("")))
    peer.send(p.Heartbeat(), Link(peer.link.token))
    peer.expect(p.Gone)


def bombed(message: p.Wire, bomb: bytes) -> Iterator[list[Any]]:
    """The message's body with a bomb in the place of each field, and of each item of a list."""
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    for index in range(len(fields)):
        values: list[Any] = [bomb, bomb.decode("latin-1"), [bomb]]
        if isinstance(fields[index], list):
            values.append([bomb] * len(fields[index]))
        for value in values:
            yield [*fields[:index], value, *fields[index + 1 :]]


def bodies_of_bombs(bomb: bytes) -> Iterator[Sequence[bytes]]:
    """Bombs in every place behind a header: as the body, in a field, in a part."""
    yield [bomb]
    yield [msgspec.msgpack.encode(["blob", 0, 1, 1]), bomb]
    yield [msgspec.msgpack.encode(["beat"]), bomb]
    for message in WIRE:
        for fields in bombed(message, bomb):
            yield [msgspec.msgpack.encode(fields)]


def header_for(token: bytes) -> bytes:
    """Of the first message in a session."""
    return struct.pack("<2sBx16sQQ", b"ac", p.VERSION, token, 1, 0)


@attack("T10", "T35")
def test_bombs_at_every_door_in_every_message_and_field(site: Site) -> None:
    """Before a session and in one."""
    with DistributedExecutor(address="auto") as executor:
        for role in ("client", "worker", "admin"):
            for tcp in (False, True):
                with door(role, tcp=tcp) as peer:
                    for body, *parts in bodies_of_bombs(site.canary.bomb):
                        peer.send_frames(header_for(p.NO_TOKEN) + body, *parts)
                        token = peer.hello(role, incarnation=role.encode().ljust(16)).token
                        peer.send_frames(header_for(token) + body, *parts)
                    peer.send_frames(site.canary.bomb)
                    peer.send_frames(b"", site.canary.bomb)
                    peer.hello(role)
                    leave(peer)
            assert executor.submit(tasks.add, 1).result(20) == 2
        assert executor.submit(tasks.add, 2).result(20) == 3
    site.end()
    assert site.canary.readers() == set(), "nor does a runner: none of it has a seal"


@attack("T10", "T35")
def test_bombs_as_calls_functions_and_results(site: Site) -> None:
    """Of a client and a worker that have keys, and not the code key."""
    bomb = site.canary.bomb
    with door("client") as client, door("worker") as worker:
        client.hello("client")
        worker.hello("worker", slots=64)
        client.send(p.Blob(0, 1, bomb))
        client.send(p.Blob(0, 2, bytes(p.INLINE_MAX) + bomb))
        groups = [p.Group(0, 0), p.Group(1, 0), p.Group(1, 1), p.Group(1, 0, blobs=(2,))]
        for number, group in enumerate(groups):
            ids = [number * 100 + n for n in range(100)]
            payloads: list[p.Payload] = [bomb] * 100
            client.send(p.Submit(group.fn, group.init, ids, payloads, 1, None, group.blobs))
        run = worker.expect(
            p.Run
        )  # some of them come to the hostile worker, who answers with bombs
        count = len(run.ids)
        bombs: list[p.Payload] = [bomb] * count
        worker.send(p.Done(run.lease, list(range(count)), bytes(count), bombs, 0.1))
        client.expect(p.Results)
        worker.send(p.Letter(0, 1, run.client, p.IMPORT, bomb))
        worker.send(p.Goodbye("done"))
        client.send(p.Goodbye("done"))
    with DistributedExecutor(address="auto") as executor:
        assert executor.submit(tasks.add, 1).result(20) == 2
    site.end()
    assert site.canary.readers() == set(), "nor does a runner: none of it has a seal"


@attack("T35")
def test_neither_unpickles_in_real_work(site: Site, tmp_path: Path) -> None:
    large = bytes(3 << 20)
    with DistributedExecutor(address="auto") as executor:
        assert list(executor.map(lambda x: x + 1, range(1000))) == list(range(1, 1001))
        assert executor.submit(len, large).result(20) == len(large)
        assert executor.submit(bytes, len(large)).result(20) == large
        with pytest.raises(ZeroDivisionError):
            executor.submit(lambda: 1 / 0).result(20)
        assert executor.submit(lambda: executor.submit(tasks.add, 1).result(20)).result(20) == 2
        dying = executor.submit(tasks.die_once, str(tmp_path / "once"), 7)
        assert dying.result(20) == 7
        assert executor.with_options(retries=1).submit(tasks.add, 1).result(20) == 2
        executor.submit(print, "hello").result(20)
        wait_until(lambda: executor.status()["running"] == 0, "all is done")
    site.end()
