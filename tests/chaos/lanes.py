"""One direction of a proxied connection: what goes in comes out in order,
when the weather lets it. Time is an argument.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from math import inf

LANE_BYTES = 256 * 1024  # on their way at once; more stays with the sender, as with any TCP


@dataclass
class Weather:
    """Of all connections of a proxy, in one direction. Seconds, and bytes a second."""

    delay: float = 0.0
    jitter: float = 0.0  # at most so much more
    rate: float = inf
    is_open: bool = True  # else nothing comes out, and nobody is told
    flips: int = 0  # so many pieces will have one bit turned

    def clear(self) -> None:
        """The sun shines."""
        self.delay = self.jitter = 0.0
        self.rate = inf
        self.is_open = True
        self.flips = 0


class Lane:
    """Bytes on their way. A throttled or late piece holds up those behind it; no byte is lost,
    as in a connection.
    """

    def __init__(self, weather: Weather, stream: random.Random) -> None:
        self.weather = weather
        self.size = 0
        self.flipped = 0
        self.delayed = 0  # bytes that were not passed on at once
        self._random = stream
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._free_at = -inf  # when the last piece is out

    @property
    def is_full(self) -> bool:
        """Whether nothing should be pushed now."""
        return self.size >= LANE_BYTES

    def push(self, data: bytes, now: float) -> None:
        """Bytes begin their way; the weather of this moment is theirs."""
        weather = self.weather
        if weather.flips > 0:
            weather.flips -= 1
            self.flipped += 1
            data = flip(data, self._random.randrange(8 * len(data)))
        due = now + weather.delay + self._random.random() * weather.jitter
        due = max(due, self._free_at) + len(data) / weather.rate
        self._free_at = due
        self._pieces.append((due, data))
        self.size += len(data)
        if due > now or not weather.is_open:
            self.delayed += len(data)

    def pop(self, now: float) -> bytes:
        """What has arrived by now."""
        if not self.weather.is_open:
            return b""
        out = []
        while self._pieces and self._pieces[0][0] <= now:
            out.append(self._pieces.popleft()[1])
        data = b"".join(out)
        self.size -= len(data)
        return data

    def next_deadline(self) -> float | None:
        """When `pop` has something to give."""
        return self._pieces[0][0] if self._pieces and self.weather.is_open else None

    def __repr__(self) -> str:
        return f"<Lane {self.size} bytes on their way, {self.weather}>"


def flip(data: bytes, bit: int) -> bytes:
    """The data with one bit turned."""
    turned = bytearray(data)
    turned[bit // 8] ^= 1 << bit % 8
    return bytes(turned)
