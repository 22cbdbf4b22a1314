"""Pictures of graphs: everything that a plan has is in them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import toybox
import yaml
from PIL import Image

from genpipe.pipeline.drawing import draw
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import Planned, plan

LINE = {"train": {"samples": 8, "global_batch_size": 4}}


@pytest.fixture
def plans(tmp_path: Path) -> list[Planned]:
    toybox.install()
    stages = {
        "points": {"kind": "toys.toy_data"},
        "line": {"kind": "toys.toy_line", "inputs": {"toy_data": "points"}, "matrix": {"train.seed": [3, 4]}} | LINE,
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "store": str(tmp_path / "store"), "stages": stages}))
    return plan(load_pipeline(str(path)))


def test_every_instance_its_status_and_what_tells_it_apart_are_drawn(plans: list[Planned], tmp_path: Path) -> None:
    draw(plans, tmp_path / "graph.svg", title="toy")
    texts = [element.text for element in ElementTree.parse(tmp_path / "graph.svg").iter() if element.text]
    drawn = " ".join(text.strip() for text in texts)
    for said in ("points", "line@0", "line@1", "train.seed=3", "train.seed=4", "toys.toy_data"):
        assert said in drawn, drawn
    assert drawn.split().count("run") == 3


def test_a_png_is_a_picture(plans: list[Planned], tmp_path: Path) -> None:
    draw(plans, tmp_path / "graph.png", title="toy")
    with Image.open(tmp_path / "graph.png") as picture:
        colors = picture.convert("RGB").getcolors(2**24)
    assert colors is not None and len(colors) > 10


def test_another_format_is_refused(plans: list[Planned], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"graph\.bmp.*\.svg"):
        draw(plans, tmp_path / "graph.bmp", title="toy")
