from __future__ import annotations

import random

from tests.chaos.lanes import LANE_BYTES, Lane, Weather, flip


def lane(weather: Weather | None = None) -> Lane:
    return Lane(weather or Weather(), random.Random(0))


def test_in_good_weather_bytes_pass_at_once() -> None:
    one = lane()
    one.push(b"ab", 1.0)
    one.push(b"c", 1.0)
    assert one.next_deadline() == 1.0
    assert one.pop(1.0) == b"abc"
    assert (one.size, one.delayed, one.next_deadline()) == (0, 0, None)


def test_late_bytes_come_late_and_in_order() -> None:
    weather = Weather(delay=2.0)
    one = lane(weather)
    one.push(b"slow", 0.0)
    weather.clear()
    one.push(b"fast", 1.0)  # cannot overtake
    assert one.pop(1.9) == b""
    assert one.next_deadline() == 2.0
    assert one.pop(2.0) == b"slowfast"
    assert one.delayed == 8


def test_jitter_adds_at_most_so_much() -> None:
    one = lane(Weather(delay=1.0, jitter=0.5))
    dues = []
    for at in range(0, 1000, 10):
        one.push(b"x", float(at))
        due = one.next_deadline()
        assert due is not None
        dues.append(due - at)
        one.pop(due)
    assert 1.0 <= min(dues) < 1.1
    assert 1.4 < max(dues) <= 1.5


def test_a_narrow_line_takes_its_time() -> None:
    one = lane(Weather(rate=10.0))
    one.push(bytes(20), 0.0)
    one.push(bytes(10), 0.0)
    assert one.pop(1.9) == b""
    assert len(one.pop(2.0)) == 20
    assert one.next_deadline() == 3.0


def test_a_black_hole_keeps_what_goes_in() -> None:
    weather = Weather(is_open=False)
    one = lane(weather)
    one.push(b"later", 0.0)
    assert (one.pop(100.0), one.next_deadline(), one.delayed) == (b"", None, 5)
    weather.clear()
    assert one.pop(100.0) == b"later"


def test_it_is_full_before_memory_is() -> None:
    one = lane(Weather(is_open=False))
    one.push(bytes(LANE_BYTES - 1), 0.0)
    assert not one.is_full
    one.push(b"x", 0.0)
    assert one.is_full


def test_as_many_pieces_are_damaged_as_were_asked_for_by_one_bit_each() -> None:
    weather = Weather(flips=2)
    one = lane(weather)
    for _ in range(3):
        one.push(bytes(100), 0.0)
    data = one.pop(0.0)
    assert (sum(byte.bit_count() for byte in data), one.flipped, weather.flips) == (2, 2, 0)
    assert not any(data[200:])


def test_each_bit_can_be_turned() -> None:
    assert [flip(b"\x00\x00", bit) for bit in (0, 7, 8, 15)] == [
        b"\x01\x00",
        b"\x80\x00",
        b"\x00\x01",
        b"\x00\x80",
    ]
