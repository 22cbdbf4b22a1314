"""Curves as a picture: what stands in it."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from genpipe.pipeline.curve_drawing import draw_curves
from genpipe.pipeline.curves import Curve

FELL: Curve = {100: {"loss": 1.0, "psnr": 10.0}, 200: {"loss": 0.5, "psnr": 20.0}, 300: {"loss": 0.4, "psnr": 21.0}}
SHORT: Curve = {100: {"loss": 0.9}, 300: {"loss": 0.6}}
SVG = "{http://www.w3.org/2000/svg}"


def test_every_curve_has_its_points_in_the_panel_of_its_metric(tmp_path: Path) -> None:
    curves = {"decoder": {"A": FELL, "B": SHORT}, "prior": {"B": SHORT}}
    draw_curves(curves, file := tmp_path / "new/curves.svg", names={"A": "runs/demo", "B": "runs/wider"})
    root = ElementTree.parse(file).getroot()
    texts = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    titles = ["decoder: held-out loss", "decoder: held-out psnr", "prior: held-out loss"]
    assert set(titles) <= set(texts) and {"A: runs/demo", "B: runs/wider"} <= set(texts)
    panels = [group for group in root.iter(f"{SVG}g") if re.fullmatch(r"axes_\d+", group.get("id", ""))]
    assert [_lines(panel) for panel in panels] == [[3, 2], [3], [2]]


def _lines(panel: ElementTree.Element) -> list[int]:
    """The number of points of each curve, by the markers on it."""
    groups = [group for group in panel if group.get("id", "").startswith("line2d_")]
    return [len(list(group.iter(f"{SVG}use"))) for group in groups]
