"""Attacks by holders of valid keys, message by message; the honest ones notice nothing of them."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from zmq.utils import z85

from achilles.core import protocol as p
from achilles.core.link import Link
from achilles.errors import ProtocolError
from achilles.net.keys import code_key, join_path, key_pair
from tests import commands
from tests.brokers import RawPeer, RunningBroker, frames_of, hello, raw_peer
from tests.security.attacks import ROOT, attack

MIB = 1 << 20


@pytest.fixture
def broker(achilles_home: Path) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker:
        yield broker


# --- Results that are nobody's to give ------------------------------------------------------------


@attack("T12")
def test_results_for_what_one_was_not_given_resolve_nothing(broker: RunningBroker) -> None:
    """Of another worker's lease, of one that is over, of one that never was;
    and only the holder's counts.
    """
    with (
        raw_peer(broker, "client") as client,
        raw_peer(broker, "worker") as holder,
        raw_peer(broker, "worker") as forger,
    ):
        client.hello("client")
        holder.hello("worker", name="holder")
        client.send(p.Submit(0, 0, [1], [b"call"]))
        run = holder.expect(p.Run)
        forger.hello("worker", name="forger")
        for lease in (run.lease, run.lease + 1, 2**62):
            forger.send(p.Done(lease, [0], b"\0", [b"forged"], 0.1))
        assert "leases that it does not hold" in forger.expect(p.Refused).reason
        forger.expect(p.Gone)
        holder.send(p.Done(run.lease, [0], b"\0", [b"right"], 0.1))
        results = client.expect(p.Results)
        assert (results.ids, list(results.payloads)) == ([1], [b"right"])
        for _ in range(3):  # the same again, for a lease that is over
            holder.send(p.Done(run.lease, [0], b"\0", [b"forged"], 0.1))
        holder.expect(p.Refused)
        client.send(p.StatusRequest())
        status = client.expect(p.Status)
        assert status.late == 6
        assert client.receive(0.05) is None, "nothing more was resolved"


@attack("T12")
def test_results_for_another_clients_task(broker: RunningBroker) -> None:
    """A lease names its tasks; a worker has no way to name a client's others."""
    with (
        raw_peer(broker, "client") as one,
        raw_peer(broker, "client") as other,
        raw_peer(broker, "worker") as worker,
    ):
        one.hello("client", name="one")
        other.hello("client", name="other")
        worker.hello("worker")
        one.send(p.Submit(0, 0, [7], [b"call"]))
        run = worker.expect(p.Run)
        other.send(p.Submit(0, 0, [7], [b"call"]))
        worker.send(p.Done(run.lease, [1], b"\0", [b"forged"], 0.1))
        assert "does not hold those tasks" in worker.expect(p.Refused).reason
        for client in (one, other):
            assert not isinstance(client.receive(0.05), p.Results)


# --- Bombs for a parser ---------------------------------------------------------------------------

COUNT = 15 * MIB


def array(item: bytes) -> bytes:
    return b"\xdd" + struct.pack(">I", COUNT // len(item)) + item * (COUNT // len(item))


BOMBS = {
    "numbers without end": b"\x93\xa6cancel" + array(b"\1") + b"\xc2",
    "ids without end": b"\x96\xa6submit\0\0" + array(b"\1") + b"\x90\0",
    "payloads without end": b"\x96\xa6submit\0\0\x90" + array(b"\1") + b"\0",
    "lists for payloads": b"\x96\xa6submit\0\0\x90" + array(b"\x90") + b"\0",
    "a list in a payload's place": b"\x96\xa6submit\0\0\x90\x91" + array(b"\x90") + b"\0",
    "a map in a payload's place": b"\x96\xa6submit\0\0\x90\x91\xdf"
    + struct.pack(">I", COUNT // 2)
    + b"\1\1" * (COUNT // 2)
    + b"\0",
    "blobs without end": b"\x98\xa6submit\0\0\x90\x90\0\xc0" + array(b"\1"),
    "blobs to forget": b"\x93\xa6forget\0" + array(b"\1"),
    "tags without end": b"\x98\xachello-worker\xc4\x10"
    + b"i" * 16
    + b"\xa10\xa13\xa1n\1\1"
    + array(b"\xa0"),
    "nesting without end": b"\x93\xa6cancel" + b"\x91" * COUNT + b"\xc0\xc2",
    "a float for a number": b"\x93\xa6cancel\x91\xcb\x7f\xf8" + bytes(6) + b"\xc2",
    "a number of 64 bits too many": b"\x93\xa6cancel\x91\xd8" + bytes(17) + b"\xc2",
    "a lone surrogate": b"\x92\xa3bye\xa3\xed\xa0\x80",
    "a type that is said in full length": b"\x91\xdb" + struct.pack(">I", COUNT) + b"x" * COUNT,
}


@attack("T24")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_for_the_parser_is_not_built(bomb: str) -> None:
    """What a message may hold is checked before it is read: counted here in bytes,
    as time is the machine's.
    """
    frame = bytes(frames_of(p.Heartbeat())[0])[:36] + BOMBS[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            p.decode([frame])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allowed = 3 * COUNT if "full length" in bomb else MIB
    assert peak < allowed, f"{peak >> 20} MiB were built"


@attack("T24")
def test_bombs_cost_their_sender_the_session(broker: RunningBroker) -> None:
    with raw_peer(broker, "client") as peer:
        for body in BOMBS.values():
            peer.hello("client", incarnation=b"b" * 16)
            head = bytes(frames_of(p.Heartbeat(), peer.link.token, 1)[0])[:36]
            peer.send_frames(head + body)
            peer.expect(p.Refused)
            peer.expect(p.Gone)


# --- What is said to whom -------------------------------------------------------------------------


@attack("T26")
@pytest.mark.parametrize(
    "name",
    ["a\nb", "\x1b[2J", "\u202egpj.exe", "x" * 201, "x" * MIB, "\0", "\x9b31m", "a\u2028b"],
)
def test_a_name_that_could_forge_a_line_begins_no_session(broker: RunningBroker, name: str) -> None:
    for role in ("client", "worker"):
        with raw_peer(broker, role) as peer:
            peer.send(hello(role, name=name), Link(p.NO_TOKEN))
            peer.send(hello(role, name="honest"), Link(p.NO_TOKEN))
            assert peer.expect(p.Welcome).name == "honest"


@attack("T26")
def test_a_status_with_strange_names_is_still_a_table_and_json(broker: RunningBroker) -> None:
    name = "<script>alert(1)</script>\"'&;%s{}\\"
    with raw_peer(broker, "worker") as worker, raw_peer(broker, "client") as client:
        worker.hello("worker", name=name)
        client.hello("client", name=name)
        status = json.loads(commands.run("status", "-o", "json").stdout)
        assert [*status["workers_by_name"]] == [name]
        table = commands.run("status").stdout
        assert sum(name in line for line in table.splitlines()) == 1
        assert all(line.isprintable() for line in table.splitlines())


def secrets_of(home: Path) -> list[bytes]:
    """Every secret key and every token-like text of a home, raw and as text."""
    found = [key_pair(home, role).secret for role in ("broker", "client", "worker", "admin")]
    code = code_key(home)
    return [*map(bytes, found), code, code.hex().encode(), bytes(z85.encode(code))]


@attack("T27")
def test_no_answer_has_a_token_or_a_key_of_others_in_it(
    broker: RunningBroker, achilles_home: Path
) -> None:
    """Whatever is asked, rightly or not: the answers as they come, before they are decoded."""
    with (
        raw_peer(broker, "client", tcp=True) as victim,
        raw_peer(broker, "worker", tcp=True) as worker,
        raw_peer(broker, "admin", tcp=True) as admin,
    ):
        tokens = [victim.hello("client").token, worker.hello("worker").token]
        tokens.append(admin.hello("admin").token)
        forbidden = secrets_of(achilles_home)
        for token in tokens:
            forbidden += [token, token.hex().encode(), repr(token).encode()]
        for role in ("client", "worker", "admin"):
            with raw_peer(broker, role, tcp=True) as thief:
                for frames in questions(role, tokens):
                    thief.send_frames(*frames)
                thief.send(hello(role, incarnation=b"thief" + bytes(11)), Link(p.NO_TOKEN))
                said = b"".join(answers(thief))
                own = thief.link.token
                assert not [one for one in forbidden if one in said and one != own]
        join = join_path(achilles_home, "client").read_text()
        assert victim.link.token.hex() not in join


def questions(role: str, tokens: list[bytes]) -> Iterator[Sequence[p.Buffer]]:
    """Everything that might be answered with more than is due."""
    for token in (p.NO_TOKEN, b"\xff" * 16):
        for message in (
            p.StatusRequest(),
            p.Resync(),
            p.Heartbeat(),
            p.ReloadKeys(),
            p.Submit(9, 9, [1], [b""]),
            p.Cancel([1]),
            p.Done(1, [0], b"\0", [b""], 0.0),
            p.Welcome(token, token, "x", 1, 1.0, 1.0),
            hello(role, python="0.0"),
            hello("worker" if role != "worker" else "client"),
        ):
            yield frames_of(message, token, 1)
    yield [b"nonsense"]
    yield [b"ac\1" + bytes(33) + b"\xc1"]


def answers(peer: RawPeer) -> Iterator[bytes]:
    """What is said up to the welcome, as it comes over the wire."""
    while True:
        assert peer.socket.poll(10_000), "no welcome"
        frames = peer.socket.recv_multipart()
        message = p.decode(frames)[1]
        if isinstance(message, p.Welcome):
            peer.link = Link(message.token)
            return
        yield from frames


# --- Greed ----------------------------------------------------------------------------------------


@attack("T29")
def test_who_submits_without_end_loses_the_session(achilles_home: Path) -> None:
    """Beyond its credit; and everybody else is served meanwhile."""
    with (
        RunningBroker(achilles_home, credit=1000) as broker,
        raw_peer(broker, "client") as greedy,
        raw_peer(broker, "client") as honest,
        raw_peer(broker, "worker") as worker,
    ):
        greedy.hello("client", name="greedy")
        honest.hello("client", name="honest")
        greedy.send(p.Submit(0, 0, list(range(1000)), [b"x"] * 1000))
        greedy.send(p.Submit(0, 0, [1000], [b"x"]))
        assert "more than 1000 unresolved tasks" in greedy.expect(p.Refused).reason
        worker.hello("worker")
        honest.send(p.Submit(0, 0, [1], [b"honest"]))
        run = worker.expect(p.Run)
        assert list(run.payloads) == [b"honest"], "the greedy one's tasks went with its session"
        worker.send(p.Done(run.lease, [0], b"\0", [b"value"], 0.1))
        honest.expect(p.Results)


@attack("T29")
def test_who_waits_first_does_not_wait_for_the_greedy(broker: RunningBroker) -> None:
    """Slots go to the client that holds fewest."""
    with (
        raw_peer(broker, "client") as greedy,
        raw_peer(broker, "client") as honest,
        raw_peer(broker, "worker") as worker,
    ):
        greedy.hello("client", name="greedy")
        honest.hello("client", name="honest")
        greedy.send(p.Submit(0, 0, list(range(1000)), [b"greedy"] * 1000))
        honest.send(p.Submit(0, 0, [1], [b"honest"]))
        honest.send(p.StatusRequest())
        honest.expect(p.Status)
        worker.hello("worker", slots=2)
        first, second = worker.expect(p.Run), worker.expect(p.Run)
        assert {bytes(run.payloads[0]) for run in (first, second)} == {b"greedy", b"honest"}  # type: ignore[arg-type]


@attack("T36")
def test_nobody_ends_the_cluster_without_an_administrators_session(broker: RunningBroker) -> None:
    """No token, an invented one, one's own of another role, and a goodbye in another's name."""
    for role in ("client", "worker"):
        for tcp in (True, False):
            with raw_peer(broker, role, tcp=tcp) as peer:
                for token in (p.NO_TOKEN, b"\xff" * 16):
                    peer.send_frames(*frames_of(p.Shutdown(), token, 1))
                    peer.expect(p.Gone)
                peer.hello(role)
                peer.send(p.Shutdown())
                assert f"the role {role} may not send Shutdown" in peer.expect(p.Refused).reason
    assert not broker.broker._sessions.is_shutting_down
    with raw_peer(broker, "client") as peer:
        peer.hello("client")


@attack("T25")
def test_nothing_is_compressed() -> None:
    """So that nothing is larger when it is taken apart than it was on the wire."""
    packers = ["zlib", "gzip", "bz2", "lzma", "zipfile", "tarfile", "compression", "zstandard"]
    texts = [path.read_text("utf-8") for path in (ROOT / "achilles").rglob("*.py")]
    found = [name for name in packers if any(f"import {name}" in text for text in texts)]
    assert not found + [name for name in packers if any(f"from {name}" in text for text in texts)]
