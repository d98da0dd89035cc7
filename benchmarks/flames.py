"""Flame graphs as SVG, from stacks with how often each was seen,
and what they say of each function.

The picture: a box is a function, as wide as the part of the samples in which it ran or called; it
stands on its caller. The widths, not the order, mean something.
A box names itself in full when pointed at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.plots import TEXT

Stacks = Mapping[tuple[str, ...], int]  # from the outermost frame to the one that ran: samples

WIDTH, ROW, TOP, LETTER = 1200, 17, 44, 6.6
NARROWEST = 0.4  # of a box, in user units; what is narrower is not drawn
_LINE = re.compile(r":\d+\)$")
_FILE = re.compile(r"\((?P<file>[^()]*?)(:\d+)?\)$")


def parse(text: str) -> dict[tuple[str, ...], int]:
    """Folded stacks, a line each: frames with semicolons between them, a space, and a number.

    Raises:
        ValueError: a line is something else.
    """
    found: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        stack, separator, count = line.rpartition(" ")
        if not separator or not count.isdigit():
            raise ValueError(f"not a folded stack: {line[:80]!r}")
        found[tuple(stack.split(";"))] += int(count)
    return dict(found)


def by_function(stacks: Stacks) -> dict[str, float]:
    """Which part of the samples ran in which function itself, the largest first;
    its lines are taken together.
    """
    total = sum(stacks.values())
    found: Counter[str] = Counter()
    for stack, count in stacks.items():
        found[_LINE.sub(")", stack[-1])] += count
    return {function: count / total for function, count in found.most_common()}


@dataclass
class _Node:
    count: int = 0
    children: dict[str, _Node] = field(default_factory=dict)


class Box(NamedTuple):
    """``left`` and ``width`` as parts of the whole; ``depth`` 0 is at the bottom."""

    name: str
    left: float
    width: float
    depth: int
    samples: int


def boxes(stacks: Stacks) -> list[Box]:
    """Where each function stands."""
    root = _Node()
    for stack, count in stacks.items():
        node = root
        node.count += count
        for name in stack:
            node = node.children.setdefault(name, _Node())
            node.count += count
    return list(_placed(root, 0.0, 0, root.count)) if root.count else []


def _placed(node: _Node, left: float, depth: int, total: int) -> Iterator[Box]:
    for name, child in sorted(node.children.items()):
        width = child.count / total
        yield Box(name, left, width, depth, child.count)
        yield from _placed(child, left, depth + 1, total)
        left += width


def flame_graph(title: str, stacks: Stacks) -> str:
    """The drawing."""
    drawn = [box for box in boxes(stacks) if box.width * WIDTH >= NARROWEST]
    total = sum(stacks.values())
    height = TOP + ROW * (1 + max((box.depth for box in drawn), default=0)) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        f'width="{WIDTH}" height="{height}" font-family="monospace" font-size="11" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="24" font-size="15">{escape(title)}: {total:,} samples</text>',
    ]
    for box in drawn:
        y = height - 10 - ROW * (box.depth + 1)
        x, width = box.left * WIDTH, box.width * WIDTH
        name = box.name if len(box.name) * LETTER <= width else box.name[: int(width / LETTER) - 1]
        parts.append(
            f"<g><title>{escape(box.name)}: {box.samples:,} samples, {box.width:.1%}</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.3):.1f}" height="{ROW - 1}" '
            f'fill="{_colour(box.name)}"/>'
            + (f'<text x="{x + 3:.1f}" y="{y + 12}">{escape(name)}</text>' if len(name) > 2 else "")
            + "</g>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _colour(name: str) -> str:
    """A room of achilles by its own colour, the rest in grey."""
    rooms = {"core": "#f2a65a", "net": "#6fb1e8", "runtime": "#8cc98c", "zmq": "#c7b6e8"}
    match = _FILE.search(name)
    parts = match["file"].split("/") if match else []
    for room, colour in rooms.items():
        if room in parts:
            return colour
    return "#e9c95f" if "achilles" in parts else "#d5d9dd"
