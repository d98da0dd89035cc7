"""What the transport does beside ZeroMQ for peers of this host:
references instead of large payloads, and pipes.
"""

from __future__ import annotations

import os
from errno import ENFILE
from typing import Any, NoReturn

import pytest
import zmq

from achilles.core import protocol as p
from achilles.core.protocol import Buffer
from achilles.net import near, pipes
from achilles.net.endpoint import LOCAL_USER
from achilles.net.transport import Route
from achilles.runtime import shared
from tests.security.attacks import attack
from tests.unit.net.pairs import Arrived, Pair, connect, connect_by_pipes, needs_pipes

needs_memfd = pytest.mark.skipif(not shared.IS_AVAILABLE, reason="there is no memfd here")


# --- Large payloads between processes of this host ------------------------------------------------


def large() -> memoryview:
    view = shared.store([os.urandom(1 << 20)])
    assert isinstance(view, memoryview)
    return view


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each message that was unfolded had, as it came."""
    counts: list[int] = []
    original = near.unfold

    def unfold(frames: Any, *, keep: bool) -> Any:
        counts.append(len(frames))
        return original(frames, keep=keep)

    monkeypatch.setattr(near, "unfold", unfold)
    return counts


@needs_memfd
def test_a_large_payload_passes_as_a_reference_both_ways(pair: Pair, unfolded: list[int]) -> None:
    route = connect(pair)
    view = large()
    frames: list[Buffer] = [b"head", view]
    pair.dealer.send(pair.dealer.fold(frames))
    assert pair.at_router()[1] == [b"head", bytes(view)]
    pair.router.send(route, route.fold(frames))
    assert pair.at_dealer() == [[b"head", bytes(view)]]
    assert unfolded == [2, 2]
    assert route.is_local


@needs_memfd
def test_what_cannot_be_unfolded_is_lost_and_then_comes_in_full(
    pair: Pair, unfolded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Its receiver sees at once that there was a message, as by a heartbeat."""
    route = connect(pair)
    view = large()
    header = p.Header(b"t" * 16, 7, 5)
    head, *_ = p.encode(header, p.Goodbye("x"))
    gone = [bytes(frame) for frame in near.fold([head, large()])]
    caplog.set_level("INFO", "achilles.net")
    pair.dealer.send(gone)
    assert p.decode(pair.at_router()[1]) == (header, p.Heartbeat())
    pair.until(lambda: not pair.dealer.folds)
    pair.dealer.send(pair.dealer.fold([b"head", view]))
    assert pair.at_router()[1] == [b"head", bytes(view)]
    pair.router.send(route, gone)
    assert p.decode(pair.at_dealer()[0]) == (header, p.Heartbeat())
    pair.until(lambda: not route.folds)
    pair.router.send(route, route.fold([b"head", view]))
    assert pair.at_dealer() == [[b"head", bytes(view)]]
    assert len(unfolded) == 2
    assert caplog.text.count("come in full from here on") == 2


@needs_memfd
def test_memory_that_is_too_much_comes_in_full(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(pair)
    head, *_ = p.encode(p.Header(bytes(16), 1, 0), p.Goodbye("x"))
    view = large()

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(near, "adopt", fail)
    pair.dealer.send(pair.dealer.fold([head, view]))
    pair.until(lambda: not pair.dealer.folds)
    assert len(pair.at_router()[1]) == 1


@needs_memfd
def test_what_is_no_folded_message_is_for_the_codec_to_refuse(pair: Pair) -> None:
    route = connect(pair)
    broken = [near.MAGIC, b"x"]
    pair.dealer.send(broken)
    assert pair.at_router()[1] == broken
    pair.router.send(route, broken)
    assert pair.at_dealer() == [broken]


@attack("T39")
@needs_memfd
def test_references_are_taken_from_this_host_alone(pair: Pair, unfolded: list[int]) -> None:
    """Who comes over TCP cannot have anything opened here."""
    route = connect(pair)
    view = large()
    folded = [bytes(frame) for frame in near.fold([b"head", view])]
    route.is_local = False
    pair.dealer._is_local = False
    for message in (folded, [near.REFUSAL]):
        pair.dealer.send(message)
        assert pair.at_router()[1] == message
        pair.router.send(route, message)
        assert pair.at_dealer() == [message]
    assert not unfolded
    assert route.folds
    assert pair.dealer.folds


@attack("T39")
def test_whoever_has_a_key_is_not_local(pair: Pair) -> None:
    """By what libzmq says of this very message,
    not by a descriptor that may be another connection's by now.
    """
    assert pair.router._route(b"one", Arrived(900, LOCAL_USER)).is_local
    far = pair.router._route(b"two", Arrived(901, "client/a"))
    unknown = pair.router._route(b"three", Arrived(902, None))
    frames: list[Buffer] = [b"head", large()]
    for route in (far, unknown):
        assert not route.is_local
        assert route.fold(frames) is frames


# --- Pipes beside the connection ------------------------------------------------------------------


def ends_connection(pair: Pair, route: Route) -> None:
    """End the ZeroMQ connection, and nothing else."""
    route.connection.cut()
    pair.until(lambda: pair.closed)


@needs_pipes
def test_the_order_of_messages_is_the_same_when_pipes_begin(pair: Pair) -> None:
    route = connect(pair)
    for number in range(100):
        pair.dealer.send([b"%d" % number])
        pair.router.send(route, [b"%d" % number])
    pair.dealer.offer_pipes()
    for number in range(100, 200):
        pair.dealer.send([b"%d" % number])
        pair.router.send(route, [b"%d" % number])
        pair.loop.wait(0.0)
    pair.until(lambda: len(pair.to_router) == 200 and len(pair.to_dealer) == 200)
    wanted = [[b"%d" % number] for number in range(200)]
    assert [frames for _, frames in pair.to_router] == wanted
    assert pair.to_dealer == wanted
    assert route.pipes is not None


@needs_pipes
def test_while_messages_go_through_pipes_sockets_are_not_asked(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what comes to one is seen."""
    route = connect_by_pipes(pair)
    pair.until(lambda: not pair.loop.uses_sockets)
    polled: list[int] = []
    zmq_poll = zmq.zmq_poll

    def poll(items: Any, timeout: int) -> Any:
        polled.append(timeout)
        return zmq_poll(items, timeout)

    monkeypatch.setattr(zmq, "zmq_poll", poll)
    for _ in range(10):
        pair.dealer.send([b"there"])
        assert pair.at_router() == (route, [b"there"])
        pair.router.send(route, [b"and", b"back"])
        assert pair.at_dealer() == [[b"and", b"back"]]
    assert not polled
    dealer_pipes, pair.dealer._pipes = pair.dealer._pipes, None
    pair.dealer.send([b"by the socket"])
    assert pair.at_router() == (route, [b"by the socket"])
    assert polled
    pair.dealer._pipes = dealer_pipes


@needs_pipes
@needs_memfd
def test_a_large_payload_passes_as_a_reference_through_pipes_too(
    pair: Pair, unfolded: list[int]
) -> None:
    route = connect_by_pipes(pair)
    view = large()
    pair.dealer.send(pair.dealer.fold([b"head", view]))
    assert pair.at_router()[1] == [b"head", bytes(view)]
    pair.router.send(route, route.fold([b"head", view]))
    assert pair.at_dealer() == [[b"head", bytes(view)]]
    assert unfolded == [2, 2]


@needs_pipes
def test_what_was_written_before_the_connection_ends_still_comes(pair: Pair) -> None:
    route = connect_by_pipes(pair)
    for number in range(50):
        pair.dealer.send([b"%d" % number])
    ends_connection(pair, route)
    assert [frames for _, frames in pair.to_router] == [[b"%d" % number] for number in range(50)]
    assert pair.closed == [route]
    assert route.pipes is None


@needs_pipes
def test_pipes_that_end_are_told_of_and_messages_go_over_ipc_again(pair: Pair) -> None:
    lost: list[bool] = []
    pair.dealer._on_pipes_lost = lambda: lost.append(True)
    route = connect_by_pipes(pair)
    pair.router._drop_pipes(route)
    pair.until(lambda: lost)
    assert lost == [True]
    pair.dealer.send([b"there"])
    assert pair.at_router() == (route, [b"there"])
    pair.router.send(route, [b"back"])
    assert pair.at_dealer() == [[b"back"]]
    assert not pair.closed


@needs_pipes
def test_pipes_that_cannot_be_opened_are_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another container, no descriptors left: all goes over the connection, and nothing is lost."""
    route = connect(pair)

    def fail(_: Buffer) -> NoReturn:
        raise OSError(ENFILE, "there are no descriptors")

    monkeypatch.setattr(pipes, "accept", fail)
    caplog.set_level("DEBUG", "achilles.net")
    pair.dealer.offer_pipes()
    pair.dealer.send([b"meanwhile"])
    assert pair.at_router() == (route, [b"meanwhile"])
    pair.until(lambda: pair.dealer._offer is None)
    pair.dealer.send([b"there"])
    assert pair.at_router() == (route, [b"there"])
    assert route.pipes is None
    assert "go over ipc" in caplog.text
    monkeypatch.setattr(pipes, "offer", lambda: fail(b""))
    pair.dealer.offer_pipes()
    pair.dealer.send([b"there"])
    assert pair.at_router() == (route, [b"there"])
    assert "no pipes for them" in caplog.text


@needs_pipes
def test_an_answer_to_no_offer_is_passed_over(pair: Pair) -> None:
    route = connect(pair)
    answers = [pipes.answer(kind, 1) for kind in (pipes.ACCEPTED, pipes.REFUSED)]
    for answer in (*answers, *pipes.ANSWERS):
        pair.router.send(route, [answer])
    pair.router.send(route, [b"next"])
    assert pair.at_dealer() == [[b"next"]]


@needs_pipes
def test_who_switches_to_pipes_that_have_ended_meanwhile_keeps_its_session(pair: Pair) -> None:
    """It has done nothing wrong; a malformed message would end it."""
    route = connect(pair)
    pair.dealer.send([pipes.SWITCHED])
    pair.dealer.send([b"next"])
    assert pair.at_router() == (route, [b"next"])


@needs_pipes
def test_a_late_answer_to_an_earlier_offer_is_not_for_the_next_one(pair: Pair) -> None:
    route = connect(pair)
    pair.dealer.offer_pipes()
    late = [pipes.answer(kind, pair.dealer._offered) for kind in pipes.ANSWERS]
    pair.dealer.offer_pipes()
    for answer in late:
        pair.dealer._take([answer])
    pair.dealer.send([b"next"])
    assert pair.at_router() == (route, [b"next"])
    pair.until(lambda: pair.dealer._pipes is not None)


@needs_pipes
def test_many_pairs_are_not_made(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "PAIRS_MAX", 0)
    route = connect(pair)
    pair.dealer.offer_pipes()
    pair.until(lambda: pair.dealer._offer is None)
    assert pair.dealer._pipes is None
    assert route.pipes is None


@needs_pipes
def test_who_leaves_before_pipes_were_accepted_has_said_its_last_word(pair: Pair) -> None:
    route = connect(pair)
    pair.dealer.offer_pipes()
    pair.dealer.send([b"goodbye"])
    pair.until(lambda: not pair.dealer.has_outbox)
    assert pair.at_router() == (route, [b"goodbye"])


@needs_pipes
def test_what_is_no_message_in_a_pipe_is_for_the_codec_to_refuse(pair: Pair) -> None:
    route = connect_by_pipes(pair)
    assert pair.dealer._pipes is not None
    os.write(pair.dealer._pipes._ends.write, bytes(100))
    assert pair.at_router() == (route, [b""])
    assert route.pipes is None
    broken = [pipes.OFFER + b"x"]
    pair.until(lambda: pair.dealer._pipes is None)
    pair.dealer.send(broken)
    assert pair.at_router() == (route, broken)


@attack("T39")
@needs_pipes
def test_pipes_are_opened_for_this_host_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offer that comes over TCP is a malformed message."""
    opened: list[Buffer] = []
    monkeypatch.setattr(pipes, "accept", opened.append)
    route = connect(pair)
    route.is_local = False
    ends, theirs, frame, _ = pipes.offer()
    pair.dealer.send([frame])
    assert pair.at_router() == (route, [frame])
    assert not opened
    for fd in (*ends, theirs):
        os.close(fd)
