"""A link delivers every numbered message once and in order, whatever the transport loses."""

from __future__ import annotations

import random

import pytest

from achilles.core import protocol as p
from achilles.core.link import RESYNC_INTERVAL, UNACKED_MAX, Link, Packet, encoded
from achilles.core.liveness import ANNOUNCED_BYTES
from achilles.errors import ProtocolError

TOKEN = b"t" * 16
SIZES = ((1, ANNOUNCED_BYTES // 2), (2, ANNOUNCED_BYTES), (3, 10))  # of payloads, by task


def crossed(packet: Packet) -> Packet:
    """The packet after the codec."""
    return Packet(*p.decode([bytes(frame) for frame in p.encode(*packet)]))


def ids(packet: Packet) -> list[int]:
    """What a `Cancel`, our numbered message for tests, carries."""
    assert isinstance(packet.message, p.Cancel)
    return packet.message.ids


def test_messages_arrive_once_and_in_order() -> None:
    """The ordinary case, and a copy of it."""
    one, other = Link(TOKEN), Link(TOKEN)
    packet = crossed(one.wrap(p.Cancel([1])))
    assert other.receive(packet, 0.0) == (True, [])
    assert other.receive(packet, 0.0) == (False, [])


def test_a_gap_is_asked_for_once_and_sent_again() -> None:
    """Everything from the gap on comes again, in order."""
    one, other = Link(TOKEN), Link(TOKEN)
    packets = [one.wrap(p.Cancel([index])) for index in range(4)]
    assert other.receive(crossed(packets[0]), 0.0)[0]
    is_new, answers = other.receive(crossed(packets[2]), 0.0)
    assert not is_new
    assert [type(a.message) for a in answers] == [p.Resync]
    assert other.receive(crossed(packets[3]), 0.1) == (False, [])
    is_new, again = one.receive(crossed(answers[0]), 0.2)
    assert not is_new
    assert [ids(packet) for packet in again] == [[1], [2], [3]]
    assert [other.receive(crossed(packet), 0.3)[0] for packet in again] == [True] * 3


def test_who_asks_for_the_same_again_and_again_is_answered_now_and_then() -> None:
    """Or a few bytes would be answered by all that is kept, as often as they come;
    who has got on is answered at once.
    """
    one = Link(TOKEN)
    for index in range(4):
        one.wrap(p.Cancel([index]))
    ask, later = (Packet(p.Header(TOKEN, 0, ack), p.Resync()) for ack in (0, 1))
    answers = [len(one.receive(ask, 10.0 + n / 1000)[1]) for n in range(100)]
    assert answers == [4] + [0] * 99
    assert len(one.receive(later, 10.1)[1]) == 3
    assert len(one.receive(later, 10.1 + RESYNC_INTERVAL)[1]) == 3


def test_a_heartbeat_shows_a_lost_tail() -> None:
    """Without a later message nothing else would."""
    one, other = Link(TOKEN), Link(TOKEN)
    one.wrap(p.Cancel([1]))
    is_new, answers = other.receive(crossed(one.wrap(p.Heartbeat())), 0.0)
    assert is_new
    assert [type(a.message) for a in answers] == [p.Resync]


def test_what_is_acknowledged_is_not_kept() -> None:
    """Each header acknowledges."""
    one, other = Link(TOKEN), Link(TOKEN)
    other.receive(crossed(one.wrap(p.Cancel([1]))), 0.0)
    assert one.unacknowledged == 1
    one.receive(crossed(other.wrap(p.Heartbeat())), 0.0)
    assert one.unacknowledged == 0


def test_a_silent_receiver_acknowledges_now_and_then() -> None:
    """Or the sender would keep everything."""
    one, other = Link(TOKEN), Link(TOKEN)
    answers: list[Packet] = []
    for index in range(UNACKED_MAX):
        answers += other.receive(crossed(one.wrap(p.Cancel([index]))), 0.0)[1]
    assert [type(a.message) for a in answers] == [p.Heartbeat]


def test_acknowledging_what_was_never_sent_is_refused() -> None:
    """A peer that does so is not ours."""
    with pytest.raises(ProtocolError, match="message 5 is acknowledged; 0 were sent"):
        Link(TOKEN).receive(Packet(p.Header(TOKEN, 1, 5), p.Heartbeat()), 0.0)


@pytest.mark.parametrize("seed", range(50))
def test_a_lossy_channel_delivers_everything(seed: int) -> None:
    """Random losses and copies, heartbeats from time to time:
    all messages arrive once and in order.
    """
    chance = random.Random(seed)
    one, other = Link(TOKEN), Link(TOKEN)
    got: list[int] = []
    to_other: list[Packet] = []
    to_one: list[Packet] = []
    now, sent = 0.0, 0
    while len(got) < 60:
        now += 0.3
        assert now < 300, f"seed {seed}: it does not get on"
        if sent < 60:
            to_other.append(one.wrap(p.Cancel([sent])))
            sent += 1
        to_other.append(one.wrap(p.Heartbeat()))
        lossy = chance.random() < 0.5
        for packet in to_other:
            if lossy and chance.random() < 0.4:
                continue
            is_new, answers = other.receive(crossed(packet), now)
            to_one += answers
            if is_new and isinstance(packet.message, p.Cancel):
                got += ids(packet)
        to_other = []
        for packet in to_one:
            if not (lossy and chance.random() < 0.4):
                to_other += one.receive(crossed(packet), now)[1]
        to_one = []
    assert got == list(range(60))


def test_a_packet_is_announced_by_what_travels_of_it() -> None:
    large = Link(TOKEN).wrap(p.Results([1], b"\0", [bytes(SIZES[1][1])]))
    assert encoded(large, lambda frames: frames[:1]) == [p.encode(*large)[:1]]


def test_a_large_packet_is_announced() -> None:
    """By a heartbeat of its size, which asks for nothing that cannot be there yet."""
    one, other = Link(TOKEN), Link(TOKEN)
    small, large, last = (one.wrap(p.Results([n], b"\0", [bytes(size)])) for n, size in SIZES)
    assert [len(encoded(packet)) for packet in (small, large, last)] == [1, 2, 1]
    for packet in (small, large, last):
        for frames in encoded(packet):
            arrived = Packet(*p.decode([bytes(frame) for frame in frames]))
            assert other.receive(arrived, 0.0) == (True, [])
            if isinstance(arrived.message, p.Heartbeat):
                assert SIZES[1][1] <= arrived.message.coming < SIZES[1][1] + 1000
    assert other.received == 3
