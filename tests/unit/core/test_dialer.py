"""A peer calls until it is answered, and calls again when its session is gone."""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from achilles.core.dialer import CALLING, JOINED, REFUSED, Dialer
from achilles.core.link import Packet
from achilles.core.liveness import RATE_MIN

TOKEN = b"t" * 16
HELLO = p.ClientHello(b"i" * 16, "client", "0", "3.11", "me")
WELCOME = p.Welcome(TOKEN, b"e" * 16, "me", 0, 1.0, 15.0)


def packet(message: p.Wire, token: bytes = TOKEN, seq: int = 0) -> Packet:
    """A packet of the broker's."""
    return Packet(p.Header(token, seq, 0), message)


def kinds(packets: list[Packet]) -> list[type]:
    """What was sent."""
    return [type(packet.message) for packet in packets]


@pytest.fixture
def dialer() -> Dialer:
    """One that has joined."""
    made = Dialer(HELLO)
    assert kinds(made.start(0.0)) == [p.ClientHello]
    assert made.receive(packet(WELCOME, p.NO_TOKEN), 0.1) == ([], [WELCOME])
    return made


def test_a_hello_is_repeated_until_it_is_answered() -> None:
    """It, or its answer, can be lost."""
    made = Dialer(HELLO)
    made.start(0.0)
    assert made.tick(0.1) == []
    assert kinds(made.tick(0.6)) == [p.ClientHello]
    assert made.state == CALLING
    assert made.send([p.Cancel([1])]) == []


def test_a_second_welcome_is_passed_over(dialer: Dialer) -> None:
    """It answers a repeated hello."""
    assert dialer.receive(packet(WELCOME, p.NO_TOKEN), 0.2) == ([], [])
    assert dialer.state == JOINED


def test_messages_of_the_session_are_handed_on_once(dialer: Dialer) -> None:
    """Heartbeats and other tokens are not."""
    message = p.Running([1])
    assert dialer.receive(packet(message, seq=1), 1.0).messages == [message]
    assert dialer.receive(packet(message, seq=1), 1.0).messages == []
    assert dialer.receive(packet(p.Heartbeat(), seq=1), 1.0).messages == []
    assert dialer.receive(packet(message, b"x" * 16, 2), 1.0) == ([], [])


def test_it_beats(dialer: Dialer) -> None:
    """Every interval, and at once when a connection was made."""
    assert kinds(dialer.tick(1.2)) == [p.Heartbeat]
    assert dialer.next_deadline() == 2.2
    assert kinds(dialer.connected(1.3)) == [p.Heartbeat]


def test_a_session_that_is_gone_begins_anew(dialer: Dialer) -> None:
    """The core above hears of it, and the broker gets a hello."""
    step = dialer.receive(packet(p.Gone()), 3.0)
    assert kinds(step.packets) == [p.ClientHello]
    assert step.messages == [p.Gone()]
    assert dialer.state == CALLING
    assert dialer.receive(packet(p.Gone()), 3.1) == ([], [])


def test_a_refusal_ends_the_calls() -> None:
    """Its reason is kept for the user."""
    made = Dialer(HELLO)
    made.start(0.0)
    made.receive(packet(p.Refused("no"), p.NO_TOKEN), 0.1)
    assert made.state == REFUSED
    assert made.reason == "no"
    assert made.next_deadline() is None
    assert made.tick(9.0) == []


def test_whoever_had_a_session_says_so_and_keeps_what_was_not_acknowledged(dialer: Dialer) -> None:
    """The broker of the next one may be another."""
    cancel = p.Cancel([1])
    (first,) = dialer.send([cancel])
    dialer.send([p.Cancel([2])])
    assert first.message is cancel
    dialer.receive(Packet(p.Header(TOKEN, 0, 1), p.Heartbeat()), 0.3)
    packets, messages = dialer.receive(packet(p.Gone()), 0.4)
    assert messages == [p.Gone()]
    (hello,) = packets
    assert hello.message == p.ClientHello(b"i" * 16, "client", "0", "3.11", "me", is_back=True)
    assert not HELLO.is_back
    assert dialer.unacknowledged == [p.Cancel([2])]


def test_a_broker_that_sends_much_is_not_silent_meanwhile(dialer: Dialer) -> None:
    """Its announcement counts as a sign of life for as long as the message may take."""
    dialer.receive(packet(p.Heartbeat(coming=20 * RATE_MIN)), 1.0)
    assert dialer.heard_at == 21.0
    dialer.receive(packet(p.Heartbeat()), 2.0)
    assert dialer.heard_at == 2.0
