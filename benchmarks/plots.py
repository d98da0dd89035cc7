"""Charts as SVG, without a library: bars, a row a contestant,
and lines over what grows by powers of ten.

The drawing is plain text with a white ground,
so that it reads the same in a light and in a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.stats import Summary

WIDTH, LABELS, NUMBERS, ROW, TOP, BOTTOM = 760, 210, 90, 26, 46, 34
OURS, OTHERS, LINE, TEXT = "#1f6feb", "#8b949e", "#d0d7de", "#24292f"
COLOURS = (OURS, "#bf3989", "#1a7f37", "#9a6700", OTHERS)  # of lines
LEFT, HEIGHT, LEGEND = 70, 300, 18


class Bar(NamedTuple):
    """One row; ``value`` None: not measured, and ``note`` says why."""

    label: str
    value: Summary | None
    is_ours: bool
    note: str = ""


def bars(title: str, unit: str, rows: Sequence[Bar], *, logarithmic: bool = False) -> str:
    """A chart of medians, with a thin line from the lowest to the highest round."""
    found = [row.value for row in rows if row.value is not None and row.value.high > 0]
    scale = _Scale(
        [value for one in found for value in (one.low, one.median, one.high)], logarithmic
    )
    height = TOP + ROW * len(rows) + BOTTOM
    parts = _head(title, height)
    bottom = height - BOTTOM
    for tick in scale.ticks:
        x = scale.place(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="{LINE}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" font-size="10">{number(tick)}</text>'
        )
    for index, row in enumerate(rows):
        parts += _row(row, TOP + ROW * index, scale)
    parts.append(f'<text x="{WIDTH - 12}" y="22" text-anchor="end">{escape(unit)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def lines(title: str, grows: str, unit: str, series: Mapping[str, Mapping[float, Summary]]) -> str:
    """A line a series, from 0 in ``unit``, over what ``grows``, which is logarithmic;
    a thin stroke is a point's rounds.
    """
    points = [(x, y) for line in series.values() for x, y in line.items()]
    powers = [math.log10(x) for x, _ in points] or [0.0]
    first, last = math.floor(min(powers)), math.ceil(max(powers))
    highest = max([y.high for _, y in points if y.high > 0], default=1.0)
    top, bottom, right = TOP + LEGEND * len(series), TOP + LEGEND * len(series) + HEIGHT, WIDTH - 30

    def x_of(value: float) -> float:
        return LEFT + (right - LEFT) * (math.log10(value) - first) / max(last - first, 1)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * value / highest

    parts = _head(title, bottom + BOTTOM)
    for power in range(first, last + 1):
        x = x_of(10.0**power)
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{LINE}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" font-size="10">{10**power:,}</text>'
        )
    for tick in _steps(highest):
        y = y_of(tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{LINE}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{number(tick)}</text>'
        )
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x_of(x), y) for x, y in sorted(line.items())]
        path = " ".join(f"{x:.1f},{y_of(y.median):.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<line x1="{x:.1f}" y1="{y_of(y.low):.1f}" x2="{x:.1f}" y2="{y_of(y.high):.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y_of(y.median):.1f}" r="3" fill="{colour}"/>'
            for x, y in places
        ]
        parts.append(
            f'<text x="{LEFT}" y="{TOP - 6 + LEGEND * index}" fill="{colour}">{escape(name)}</text>'
        )
    parts.append(f'<text x="{WIDTH - 12}" y="22" text-anchor="end">{escape(unit)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 28}" text-anchor="end">{escape(grows)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _head(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12" fill="{TEXT}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]


def _steps(highest: float) -> list[float]:
    """Round values from 0 up to the highest."""
    step = 10.0 ** math.floor(math.log10(highest))
    while highest / step < 4:
        step /= 2
    return [step * index for index in range(int(highest / step) + 1)]


def _row(row: Bar, y: float, scale: _Scale) -> list[str]:
    middle = y + ROW / 2
    text = f'<text x="{LABELS - 8}" y="{middle + 4}" text-anchor="end">{escape(row.label)}</text>'
    if row.value is None:
        return [
            text,
            f'<text x="{LABELS + 6}" y="{middle + 4}" font-style="italic">{escape(row.note)}</text>',
        ]
    end, low, high = (scale.place(value) for value in row.value[0:3])
    colour = OURS if row.is_ours else OTHERS
    return [
        text,
        f'<rect x="{LABELS}" y="{y + 5}" width="{max(end - LABELS, 1):.1f}" height="{ROW - 10}" fill="{colour}"/>',
        f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="{TEXT}"/>',
        f'<text x="{max(end, high) + 6:.1f}" y="{middle + 4}">{number(row.value.median)}</text>',
    ]


class _Scale:
    """From values to places; from 0, or logarithmic from the power of ten below the smallest."""

    def __init__(self, values: Sequence[float], logarithmic: bool) -> None:
        positive = [value for value in values if value > 0]
        self._high = max(positive, default=1.0)
        self._low = 10.0 ** math.floor(math.log10(min(positive, default=1.0)))
        self._logarithmic = logarithmic
        if logarithmic:
            self._high = 10.0 ** math.ceil(math.log10(self._high))
            self._high = max(self._high, self._low * 10)

    def place(self, value: float) -> float:
        """Where it is, in user units from the left."""
        room = WIDTH - LABELS - NUMBERS
        if not self._logarithmic:
            return LABELS + room * max(value, 0.0) / self._high
        if value <= self._low:
            return LABELS
        return LABELS + room * math.log10(value / self._low) / math.log10(self._high / self._low)

    @property
    def ticks(self) -> list[float]:
        if self._logarithmic:
            first, last = round(math.log10(self._low)), round(math.log10(self._high))
            return [10.0**power for power in range(first, last + 1)]
        return _steps(self._high)


def number(value: float) -> str:
    """Three significant digits, with separators from a thousand on."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    value = round(value, digits)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
