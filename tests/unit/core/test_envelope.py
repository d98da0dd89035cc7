"""Letters carry any message of a task's, whole; what user code can write there is refused,
and does nothing else.
"""

from __future__ import annotations

import random
import struct

import pytest

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.errors import ProtocolError
from achilles.runtime import side

LARGE = bytes(p.PART_MAX + 5)


def test_the_kind_is_the_side_channels() -> None:
    assert envelope.NESTED == side.NESTED


@pytest.mark.parametrize(
    "message",
    [
        p.Submit(1, 2, [1, 2], [b"a", b"b"], 3, p.Options(retries=1), (4,)),
        p.Blob(0, 1, b"f"),
        p.Cancel([1], kill=True),
        p.Results([1], b"\0", [b"value"]),
        p.Failed(1, p.REFUSED, ["why"]),
        p.Cluster(1, 2),
    ],
)
def test_messages_come_back(message: p.Submit) -> None:
    assert envelope.unpack(envelope.pack(7, message)) == (7, message)


def test_large_payloads_come_back() -> None:
    seq, message = envelope.unpack(envelope.pack(0, p.Submit(0, 0, [1, 2], [LARGE, b"small"])))
    assert isinstance(message, p.Submit)
    large, small = message.payloads
    assert isinstance(large, p.Parts)
    assert len(large) == 2
    assert (seq, large.join(), small) == (0, LARGE, b"small")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\1",
        struct.pack("<BI", 1, 0),
        struct.pack("<BI", 1, 1),
        struct.pack("<BI", 1, 2**32 - 1),
        struct.pack("<BII", 1, 1, 5) + b"four",
        struct.pack("<BII", 1, 1, 4) + b"four",
        envelope.pack(1, p.Cluster(1, 2)) + b"more",
    ],
)
def test_what_is_no_letter_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        envelope.unpack(body)


def test_noise_is_refused_or_read() -> None:
    chance = random.Random(3)
    good = envelope.pack(1, p.Submit(1, 0, [1, 2], [b"a", bytes(70_000)]))[:200]
    for _ in range(2000):
        body = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            envelope.unpack(bytes(body))
        except ProtocolError:
            pass
