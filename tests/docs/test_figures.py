"""The figures: those in docs/figures are what the script draws, and nothing in them runs off the ground."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import figures
import pytest

SVG = "{http://www.w3.org/2000/svg}"


def test_the_files_are_those_of_the_script() -> None:
    drawn = {f"{draw.__name__}.svg": draw().svg() for draw in figures.FIGURES}
    assert {path.name: path.read_text(encoding="utf-8") for path in figures.FOLDER.iterdir()} == drawn, (
        "run `python docs/site/figures.py`"
    )


@pytest.mark.parametrize("draw", figures.FIGURES)
def test_boxes_and_arrows_lie_on_the_ground(draw: Callable[[], figures.Figure]) -> None:
    root = ElementTree.fromstring(draw().svg())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes, lines = root.findall(f"{SVG}rect")[1:], root.findall(f"{SVG}line")
    assert boxes and lines
    for box in boxes:
        x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
    for line in lines:
        assert all(0 <= float(line.attrib[name]) <= width for name in ("x1", "x2"))
        assert all(0 <= float(line.attrib[name]) <= height for name in ("y1", "y2"))
