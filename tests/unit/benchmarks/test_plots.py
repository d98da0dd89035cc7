"""Charts are well-formed, and their bars are as long as their values."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.plots import COLOURS, LABELS, NUMBERS, OURS, WIDTH, Bar, bars, lines, number
from benchmarks.stats import Summary

SVG = "{http://www.w3.org/2000/svg}"
ROOM = WIDTH - LABELS - NUMBERS


def widths(drawing: str) -> list[float]:
    """Of the bars, without the ground."""
    found = ElementTree.fromstring(drawing).findall(f"{SVG}rect")
    return [float(rect.attrib["width"]) for rect in found[1:]]


def test_bars_are_as_long_as_their_values() -> None:
    rows = [
        Bar("whole", Summary(8.0, 8.0, 8.0, 1), True),
        Bar("half", Summary(4.0, 4.0, 4.0, 1), False),
    ]
    assert widths(bars("title", "s", rows)) == [ROOM, ROOM / 2]


def test_logarithmic_bars_are_as_long_as_their_powers() -> None:
    rows = [Bar(f"{value}", Summary(value, value, value, 1), False) for value in (10, 100, 1000)]
    assert widths(bars("title", "1/s", rows, logarithmic=True)) == [1, ROOM / 2, ROOM]


def test_a_missing_value_says_why_and_texts_are_escaped() -> None:
    drawing = bars("a < b & c", "µs", [Bar('"<peer>"', None, False, "absent: no wheel")])
    texts = [element.text for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    assert "a < b & c" in texts
    assert '"<peer>"' in texts
    assert "absent: no wheel" in texts
    assert widths(drawing) == []


def test_ours_have_a_colour_of_their_own() -> None:
    one = Summary(1.0, 1.0, 1.0, 1)
    drawing = bars("title", "s", [Bar("achilles", one, True), Bar("peer", one, False)])
    assert drawing.count(OURS) == 1


@pytest.mark.parametrize("logarithmic", [False, True])
def test_values_of_zero_and_no_values_are_drawn(logarithmic: bool) -> None:
    zero = Bar("zero", Summary(0.0, 0.0, 0.0, 1), False)
    assert widths(bars("title", "s", [zero], logarithmic=logarithmic)) == [1]
    ElementTree.fromstring(bars("title", "s", [], logarithmic=logarithmic))


def test_lines_go_through_their_points() -> None:
    """Equal factors are equal distances to the right; half the value is half the height."""
    points = {10.0: Summary(2.0, 1.0, 3.0, 3), 100.0: Summary(4.0, 4.0, 4.0, 1)}
    drawing = lines("a < b", "workers", "µs", {"one": points, "<other>": {1000.0: points[100.0]}})
    root = ElementTree.fromstring(drawing)
    (one, other) = (line.attrib for line in root.findall(f"{SVG}polyline"))
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in one["points"].split())
    ((x3, y3),) = (map(float, pair.split(",")) for pair in other["points"].split())
    zero = max(float(line.attrib["y2"]) for line in root.findall(f"{SVG}line"))
    assert zero - y1 == pytest.approx((zero - y2) / 2)
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert y3 == y2
    assert (one["stroke"], other["stroke"]) == COLOURS[:2]
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"a < b", "<other>", "workers", "1,000"} <= set(texts)


def test_no_lines_are_drawn() -> None:
    assert not ElementTree.fromstring(lines("title", "n", "s", {})).findall(f"{SVG}polyline")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.7, "1,000"),
        (-4.0, "-4"),
        (115234, "115,000"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
