"""What a running broker logs of its visitors: one line an event, and nothing that is secret."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import zmq

from achilles.net.endpoint import CurveKeys
from tests.brokers import RunningBroker, raw_peer
from tests.modes import wait_until
from tests.security.test_doors import is_let_in

LOGGER = "achilles.broker"


def test_who_came_who_was_refused_and_who_left(
    achilles_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    with RunningBroker(achilles_home) as broker:
        join = broker.join("client")
        stranger = CurveKeys(*zmq.curve_keypair(), join.keys.broker_public)
        assert not is_let_in(join.address, stranger)
        assert not is_let_in(join.address, None)
        with raw_peer(broker, "client") as client:
            client.hello("client")
            client.send_frames(b"junk")
        logged(caplog, "refused 127.0.0.1: its key is not allowed")
        logged(caplog, "refused somebody: the connection is not encrypted")
        logged(caplog, "session 1 of client")
        logged(caplog, "ends: it broke the protocol")
    for secret in (join.keys.secret, stranger.secret):
        assert secret.decode() not in caplog.text
    assert all("\n" not in message for message in caplog.messages)


def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    wait_until(lambda: any(text in message for message in list(caplog.messages)), text)
