"""What a hostile peer can send costs that peer its session, and nobody else anything."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from achilles.core import protocol as p
from achilles.core.link import Link
from tests.brokers import (
    RawPeer,
    RunningBroker,
    answer_one,
    frames_of,
    hello,
    raw_peer,
    wait_for,
)
from tests.security.attacks import attack

HEADER_SIZE = 36
TOKEN = bytes(range(16))

# A valid message of each kind that a peer may send in a session, by role.
VALID: dict[str, list[p.Wire]] = {
    "client": [
        p.Submit(0, 0, [1, 2], [b"a", b"b"]),
        p.Blob(0, 2, b"function"),
        p.Forget(0, [2]),
        p.Cancel([1]),
        p.StatusRequest(),
        p.Letter(1, 1, 1, p.IMPORT, b"answer"),
        p.Heartbeat(),
        p.Resync(),
        p.Goodbye("bye"),
    ],
    "worker": [
        p.Done(1, [0], b"\0", [b"value"], 0.1),
        p.Returned(1, [0]),
        p.Crashed(1, 0, "reason"),
        p.Letter(0, 1, 1, p.IMPORT, b"question"),
        p.Drain(),
        p.Relay(1, 1, 1, p.Submit(0, 0, [1, 2], [b"a", b"b"])),
        p.Relay(1, 1, 1, p.Blob(0, 2, b"function")),
        p.Relay(1, 1, 1, p.Cancel([1])),
        p.Relay(1, 1, 0, p.Goodbye("ended")),
    ],
    "admin": [p.StatusRequest(), p.ReloadKeys()],
}
OF_OTHERS: dict[str, list[p.Wire]] = {
    "client": [
        *(one for one in VALID["worker"] if not isinstance(one, p.Letter)),
        p.ReloadKeys(),
        p.Shutdown(),
    ],
    "worker": [*VALID["client"][:5], p.ReloadKeys(), p.Shutdown()],
    "admin": [*VALID["client"][:4], *VALID["worker"]],
}
FROM_BROKERS: list[p.Wire] = [
    p.Run(1, 1, 0, 0, [0], [b"call"]),
    p.Revoke(1, [0]),
    p.Running([1]),
    p.Results([1], b"\0", [b"value"]),
    p.Failed(1, p.LOST, ["story"]),
    p.Cluster(1, 1),
    p.Credit(1),
    p.ShuttingDown(),
    p.KeysReloaded(1),
    p.Lend(1, True),
]


class Scene:
    """A broker with an honest client and an honest worker, and whoever attacks it."""

    def __init__(self, broker: RunningBroker, client: RawPeer, worker: RawPeer) -> None:
        self.broker = broker
        self._client, self._worker = client, worker
        self._number = 0

    def attacker(self, role: str) -> RawPeer:
        return raw_peer(self.broker, role)

    def check_still_serves(self) -> None:
        """The honest ones have not noticed anything."""
        self._number += 1
        answer_one(self._client, self._worker, self._number)

    def cut(self, peer: RawPeer) -> str:
        """Check that the peer has lost its session; the reason that it was given."""
        reason = peer.expect(p.Refused).reason
        peer.expect(p.Gone)
        self.check_still_serves()
        return reason


@pytest.fixture
def scene(achilles_home: Path) -> Iterator[Scene]:
    with (
        RunningBroker(achilles_home) as broker,
        raw_peer(broker, "client") as client,
        raw_peer(broker, "worker") as worker,
    ):
        client.hello("client", name="honest")
        worker.hello("worker", name="honest")
        yield Scene(broker, client, worker)


def body_of(message: p.Wire) -> Any:
    return msgspec.msgpack.decode(bytes(frames_of(message)[0])[HEADER_SIZE:])


def in_session(peer: RawPeer, body: bytes, *parts: bytes) -> list[bytes]:
    """Frames with a right header around any body."""
    peer.link.sent += 1
    head = struct.pack("<2sBx16sQQ", b"ac", p.VERSION, peer.link.token, peer.link.sent, 0)
    return [head + body, *parts]


def malformed_frames(peer: RawPeer) -> dict[str, Sequence[bytes]]:
    token, good = peer.link.token, msgspec.msgpack.encode(["beat"])

    def header(magic: bytes = b"ac", version: int = p.VERSION) -> bytes:
        return struct.pack("<2sBx16sQQ", magic, version, token, 0, 0)

    submit = body_of(p.Submit(0, 0, [1], [b"a"]))
    return {
        "nothing": [b""],
        "less than a header": [header()[:-1]],
        "a header alone": [header()],
        "another magic": [header(magic=b"HT") + good],
        "another version": [header(version=p.VERSION + 1) + good],
        "no msgpack": [header() + b"\xc1"],
        "trailing bytes": [header() + good + b"\0"],
        "extra parts": [header() + good, b"extra"],
        "many extra parts": [header() + good, *[b""] * 1000],
        "hostile nesting": [header() + b"\x91" * 100_000 + b"\xc0"],
        "hostile nesting in a field": [
            header() + b"\x96\xa6submit\0\0\x91\1" + b"\x91" * 100_000 + b"\xc0\0"
        ],
        "an array that claims four billion items": [header() + b"\xdd\xff\xff\xff\xff"],
        "bytes that claim four gigabytes": [header() + b"\x92\xa3bye\xdb\xff\xff\xff\xff"],
        "an unknown type": [header() + msgspec.msgpack.encode(["reboot"])],
        "a map": [header() + msgspec.msgpack.encode({"type": "beat"})],
        "no type": [header() + msgspec.msgpack.encode([])],
        "a number for a type": [header() + msgspec.msgpack.encode([5])],
        "text that is not UTF-8": [header() + b"\x92\xa3bye\xa1\xff"],
        "more parts than there are": [header() + msgspec.msgpack.encode([*submit[:4], [2], 0])],
        "no parts": [header() + msgspec.msgpack.encode([*submit[:4], [0], 0])],
        "a negative number of parts": [header() + msgspec.msgpack.encode([*submit[:4], [-1], 0])],
        "a huge number of parts": [header() + msgspec.msgpack.encode([*submit[:4], [2**63], 0])],
        "text for a payload": [header() + msgspec.msgpack.encode([*submit[:4], ["x"], 0])],
        "too many tasks": [
            header() + msgspec.msgpack.encode(["submit", 0, 0, [*range(10_001)], [b""] * 10_001, 0])
        ],
        "too many tasks in a relay": [
            header()
            + msgspec.msgpack.encode(
                ["relay", 1, 1, 1, ["submit", 0, 0, [*range(10_001)], [b""] * 10_001, 0]]
            )
        ],
        "a relay in a relay": [
            header()
            + msgspec.msgpack.encode(["relay", 1, 1, 1, ["relay", 1, 1, 1, ["cancel", [1]]]])
        ],
        "a relay without its parts": [
            header() + msgspec.msgpack.encode(["relay", 1, 1, 1, [*submit[:4], [2], 0]])
        ],
        "columns of two lengths": [
            header() + msgspec.msgpack.encode(["submit", 0, 0, [1, 2], [b"a"], 0])
        ],
    }


@attack("T24")
@pytest.mark.bad_input(70)
@pytest.mark.parametrize("role", ["client", "worker"])
def test_malformed_frames_cut_their_senders_session(scene: Scene, role: str) -> None:
    with scene.attacker(role) as names_only:
        names_only.hello(role)
        names = list(malformed_frames(names_only))
    assert len(names) > 20
    for name in names:
        with scene.attacker(role) as peer:
            peer.hello(role)
            peer.send_frames(*malformed_frames(peer)[name])
            assert scene.cut(peer), name


def test_malformed_frames_before_a_session_are_passed_over(scene: Scene) -> None:
    with scene.attacker("client") as peer:
        for frames in malformed_frames(peer).values():
            peer.send_frames(*frames)
        scene.check_still_serves()
        peer.hello("client")  # whoever finds our language yet is welcome


@attack("T24")
@pytest.mark.bad_input(70)
@pytest.mark.parametrize("role", list(VALID))
def test_each_field_of_each_message_is_checked(scene: Scene, role: str) -> None:
    """Missing, of every wrong type, and once too many."""
    wrong = [None, True, -1, 2**64 - 1, 1.5, "text", b"bytes", [], [None], {"a": 1}, [[1]], [-1]]
    with scene.attacker(role) as peer:
        peer.hello(role)
        for message in VALID[role]:
            fields = body_of(message)
            bodies = [fields[:length] for length in range(1, len(fields))]
            bodies.append([*fields, 0])
            for index in range(1, len(fields)):
                bodies += [[*fields[:index], value, *fields[index + 1 :]] for value in wrong]
            for body in bodies:
                peer.send_frames(*in_session(peer, msgspec.msgpack.encode(body)))
                if _has_lost_its_session(peer):
                    peer.hello(role)
            leave(peer)
            scene.check_still_serves()
            peer.hello(role)


def leave(peer: RawPeer) -> None:
    """End the session: a worker that stays would be given the honest client's tasks."""
    peer.send_frames(*in_session(peer, msgspec.msgpack.encode(["bye", ""])))
    peer.send(p.Heartbeat(), Link(peer.link.token))
    peer.expect(p.Gone)


def _has_lost_its_session(peer: RawPeer) -> bool:
    """Ask something that a session answers, and see."""
    peer.send(p.Heartbeat(), Link(peer.link.token))
    while True:
        message = peer.receive()
        assert message is not None, "neither an answer nor an end"
        if isinstance(message, p.Heartbeat):
            return False
        if isinstance(message, p.Gone):
            while peer.receive(0.02) is not None:
                pass  # what else was said of it
            return True


def test_truncation_at_every_byte_cuts_the_session(scene: Scene) -> None:
    with scene.attacker("client") as peer:
        whole = bytes(frames_of(p.Submit(0, 0, [1, 2], [b"a", b"b"]))[0])
        for length in range(HEADER_SIZE, len(whole)):
            peer.hello("client")
            peer.send_frames(*in_session(peer, whole[HEADER_SIZE:length]))
            peer.expect(p.Refused)
    scene.check_still_serves()


def test_what_a_broker_tells_a_task_is_not_for_workers_to_say(scene: Scene) -> None:
    with scene.attacker("worker") as peer:
        peer.hello("worker")
        peer.send(p.Relay(1, 1, 1, p.Results([1], b"\0", [b"value"])))
        assert "a task does not send Results" in scene.cut(peer)


@attack("T11")
@pytest.mark.parametrize("role", list(OF_OTHERS))
def test_a_role_may_not_send_what_others_may(scene: Scene, role: str) -> None:
    for message in [*OF_OTHERS[role], *FROM_BROKERS]:
        with scene.attacker(role) as peer:
            peer.hello(role)
            peer.send(message)
            reason = scene.cut(peer)
            assert f"the role {role} may not send {type(message).__name__}" in reason


@pytest.mark.parametrize("message", [p.Welcome(TOKEN, TOKEN, "x", 1, 1.0, 1.0), p.Refused("no")])
def test_a_peer_that_plays_broker_is_cut(scene: Scene, message: p.Wire) -> None:
    with scene.attacker("client") as peer:
        peer.hello("client")
        peer.send(message, peer.link)
        scene.cut(peer)


@attack("T26")
@pytest.mark.parametrize(
    "changes",
    [
        {"incarnation": b"short"},
        {"role": "king"},
        {"name": "a\nb"},
        {"name": "x" * 201},
        {"python": "\x1b[2J"},
        {"slots_max": -1},
    ],
)
def test_a_hello_that_cannot_be_begins_no_session(scene: Scene, changes: dict[str, Any]) -> None:
    with scene.attacker("client") as peer:
        peer.send(hello(changes.pop("role", "client"), **changes), Link(p.NO_TOKEN))
        scene.check_still_serves()
        assert not isinstance(peer.receive(0.05), p.Welcome)


@pytest.mark.parametrize("slots", [0, -1, 4097, 2**63])
def test_a_worker_of_impossible_size_begins_no_session(scene: Scene, slots: int) -> None:
    with scene.attacker("worker") as peer:
        peer.send(hello("worker", slots=slots), Link(p.NO_TOKEN))
        scene.check_still_serves()
        assert not isinstance(peer.receive(0.05), p.Welcome)


@attack("T11")
def test_a_hello_at_the_wrong_door_is_refused(scene: Scene) -> None:
    for door, role in (("client", "worker"), ("worker", "client"), ("worker", "admin")):
        with scene.attacker(door) as peer:
            peer.send(hello(role), Link(p.NO_TOKEN))
            assert f"not for the role {role}" in peer.expect(p.Refused).reason
    scene.check_still_serves()


@attack("T18")
def test_a_guessed_or_stale_token_opens_nothing(scene: Scene) -> None:
    with scene.attacker("client") as peer:
        peer.hello("client")
        stale = peer.link.token
        peer.send(p.Goodbye("done"))
        for token in (stale, bytes(16), b"\xff" * 16):
            peer.send(p.Submit(0, 0, [1], [b"a"]), Link(token))
            peer.expect(p.Gone)
    scene.check_still_serves()


@attack("T18")
def test_a_token_is_worth_nothing_at_the_other_door(scene: Scene) -> None:
    with scene.attacker("client") as client, scene.attacker("worker") as worker:
        client.hello("client")
        worker.send(p.Heartbeat(), Link(client.link.token))
        worker.expect(p.Gone)
        client.send(p.Heartbeat())
        client.expect(p.Heartbeat)
    scene.check_still_serves()


def test_an_acknowledgement_of_what_was_never_sent_cuts_the_session(scene: Scene) -> None:
    with scene.attacker("client") as peer:
        peer.hello("client")
        peer.send_frames(*p.encode(p.Header(peer.link.token, 0, 2**64 - 1), p.Heartbeat()))
        assert "is acknowledged" in scene.cut(peer)


def test_numbers_far_ahead_are_asked_for_and_do_no_harm(scene: Scene) -> None:
    with scene.attacker("client") as peer:
        peer.hello("client")
        peer.send_frames(*frames_of(p.StatusRequest(), peer.link.token, 2**64 - 1))
        peer.expect(p.Resync)
    scene.check_still_serves()


@attack("T20")
def test_a_frame_that_is_too_large_ends_the_connection(scene: Scene) -> None:
    with scene.attacker("client") as peer:
        peer.hello("client")
        routes = scene.broker.broker._sessions._by_route
        before = len(routes)
        peer.send_frames(bytes(17 * 1024 * 1024))
        wait_for(lambda: len(routes) < before, "the connection to be ended")
    scene.check_still_serves()


@attack("T24")
def test_noise_does_no_harm(scene: Scene) -> None:
    """Valid messages with random bytes changed, in a session of each role."""
    chance = random.Random(7)
    for role, messages in VALID.items():
        with scene.attacker(role) as peer:
            peer.hello(role)
            for message in messages * 10:
                body = bytearray(bytes(frames_of(message)[0])[HEADER_SIZE:])
                for _ in range(chance.randint(1, 3)):
                    body[chance.randrange(len(body))] = chance.randrange(256)
                peer.send_frames(*in_session(peer, bytes(body)))
                if _has_lost_its_session(peer):
                    peer.hello(role)
            leave(peer)
        scene.check_still_serves()


def test_a_peer_that_says_the_same_name_and_incarnation_takes_over_its_own_session_only(
    scene: Scene,
) -> None:
    """An incarnation is no secret among equals, but it does not cross roles."""
    incarnation = b"i" * 16
    with scene.attacker("client") as one, scene.attacker("worker") as other:
        one.hello("client", incarnation=incarnation)
        other.hello("worker", incarnation=incarnation)
        other.send(p.Heartbeat())
        other.expect(p.Heartbeat)
        leave(other)
    scene.check_still_serves()
