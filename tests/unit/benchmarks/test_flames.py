"""Flame graphs: what stands on what, how wide, and how much each function took itself."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.flames import WIDTH, Stacks, boxes, by_function, flame_graph, parse

TEXT = """\
main (a.py:1);work (b.py:2);poll (achilles/net/c.py:7) 6
main (a.py:1);work (b.py:3) 1
main (a.py:1);work (b.py:2) 1
other (d.py:4) 2
"""
SVG = "{http://www.w3.org/2000/svg}"


def test_folded_stacks_are_read() -> None:
    stacks = parse(TEXT)
    assert stacks[("main (a.py:1)", "work (b.py:2)", "poll (achilles/net/c.py:7)")] == 6
    assert sum(stacks.values()) == 10


def test_equal_stacks_are_added_up() -> None:
    assert parse("a;b 1\na;b 2\n") == {("a", "b"): 3}


@pytest.mark.parametrize("line", ["a;b", "a;b x", "1"])
def test_another_format_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not a folded stack"):
        parse(line)


def test_the_time_of_a_function_is_its_own_over_all_its_lines() -> None:
    assert by_function(parse(TEXT)) == {
        "poll (achilles/net/c.py)": 0.6,
        "work (b.py)": 0.2,
        "other (d.py)": 0.2,
    }


def test_a_box_is_as_wide_as_its_samples_and_stands_on_its_caller() -> None:
    found = {box.name: box for box in boxes(parse(TEXT))}
    main, work, other = (
        found[name] for name in ("main (a.py:1)", "work (b.py:2)", "other (d.py:4)")
    )
    assert (main.left, main.width, main.depth) == (0.0, 0.8, 0)
    assert (work.depth, work.samples) == (1, 7)
    assert work.width == pytest.approx(0.7)
    assert main.left <= work.left
    assert work.left + work.width <= main.left + main.width + 1e-9
    assert other.left == pytest.approx(0.8)
    assert other.depth == 0


def test_a_drawing_is_well_formed_and_in_its_frame() -> None:
    stacks: Stacks = {("<module> (a & b.py:1)",): 1, ("x",): 100_000}
    drawing = ElementTree.fromstring(flame_graph("t < u", stacks))
    rects = drawing.findall(f"{SVG}g/{SVG}rect")
    assert len(rects) == 1  # what is too narrow to be seen is left out
    assert float(rects[0].attrib["width"]) <= WIDTH


def test_no_samples_are_a_drawing_too() -> None:
    ElementTree.fromstring(flame_graph("nothing", {}))
    assert boxes({}) == []
