"""A release's page of samples: its data against the artifacts, and the page itself in a real browser, from a file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Browser
from toybox import wait_for

from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.data.shard_dataset import open_shards
from genpipe.evaluation.drawn import Drawings
from genpipe.release.samples_page import write_samples_page
from genpipe.release.verify import verify

if TYPE_CHECKING:
    from conftest import TinyPipeline

SETTINGS = (
    "stages.release.each=1",
    "stages.release.rows=1",
    "stages.release.title=Shapes",
    "stages.release.samples=5",
    "stages.release.max_memorized=1",
)
MEASURED = "stages.evaluate.metrics={memorization: {networks: [{kind: pixels}]}, retrieval: {judge: self}}"


def data_of(page: Path) -> dict[str, Any]:
    [text] = re.findall(r"const DATA = (.*);\n", page.read_text("utf-8"))
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def release(tiny: TinyPipeline) -> Artifact:
    return tiny.run("release", MEASURED, *SETTINGS)


@pytest.fixture(scope="module")
def folder(release: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the release, far from its store."""
    return shutil.copytree(fetch(release), tmp_path_factory.mktemp("elsewhere") / "a release")


def test_the_first_pictures_of_each_split_are_shown_with_what_is_known(folder: Path, tiny: TinyPipeline) -> None:
    data, samples = data_of(folder / "samples.html"), tiny.run("sample")
    scores = tiny.run("evaluate", MEASURED)
    near = {
        (row["split"], row["row"]): row for row in pq.read_table(Path(scores.uri, "memorization.parquet")).to_pylist()
    }
    right = pq.read_table(Path(scores.uri, "per_sample")).to_pandas().query("number == 'train/memorized'")
    training = open_shards(tiny.run("shard"), split="train")
    assert [picture["split"] for picture in data["pictures"]] == ["train"] * 5 + ["heldout"] * 4
    for place, picture in enumerate(data["pictures"]):
        row, shards = place % 5, open_shards(samples, split=picture["split"])
        assert (folder / picture["file"]).read_bytes() == shards.image_bytes(row)
        assert (picture["caption"], picture["key"]) == (shards.captions(row)[0], shards.key(row))
        known, [neighbor] = near[picture["split"], row], picture["neighbors"]
        assert picture["values"]["p"] == known["p"] and neighbor["distance"] == known["distance_pixels"]
        assert neighbor["key"] == training.key(known["nearest_pixels"]) and "file" not in neighbor
        if picture["split"] == "train":
            assert picture["values"]["memorized"] == right.set_index("row")["value"][row]
    assert data["title"] == "Shapes" and data["system"] == tiny.run("system").fingerprint
    assert {part["role"] for part in data["parts"]} == read_manifest(tiny.run("system").uri).inputs.keys()
    assert data["data"] == [{"kind": "shards", "fingerprint": tiny.run("shard").fingerprint}]


def test_the_page_asks_for_nothing_that_is_not_in_the_release(folder: Path) -> None:
    """And its files are hashed as the others are."""
    text = (folder / "samples.html").read_text("utf-8")
    assert not re.search(r"https?://|@import|<link|<script src|url\(", text)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == sorted(
        Path(picture["file"]).name for picture in data_of(folder / "samples.html")["pictures"]
    ), "no training picture"
    record = json.loads((folder / "release.json").read_text())
    assert "samples.html" in record["files"] and "samples/train-000000.png" in record["files"]
    assert "[samples.html](samples.html)" in (folder / "MODEL_CARD.md").read_text()


def test_training_pictures_are_there_if_they_are_asked_for(
    tiny: TinyPipeline, release: Artifact, tmp_path: Path
) -> None:
    """A caption stays text, whatever is written in it."""
    samples, scores = (read_manifest(tiny.run(name, MEASURED).uri) for name in ("sample", "evaluate"))
    assert samples is not None and scores is not None
    drawings = Drawings.of_samples(samples, [scores])
    about = {"title": "</script><b id=planted>", "system": "0" * 64, "parts": [], "data": []}
    write_samples_page(tmp_path, drawings, most=1, training=True, about=about)
    page = tmp_path / "samples.html"
    assert "</script><b" not in page.read_text("utf-8")
    data = data_of(page)
    assert data["title"] == about["title"]
    shards = open_shards(tiny.run("shard"), split="train")
    for picture, drawn in zip(data["pictures"], [drawings.pictures[0], drawings.pictures[16]], strict=True):
        [neighbor], row = picture["neighbors"], drawn.neighbors[0].row
        assert (tmp_path / neighbor["file"]).read_bytes() == shards.image_bytes(row)
        assert neighbor["caption"] in shards.captions(row)


def test_there_is_none_without_samples_of_the_system(pixel_tiny: TinyPipeline) -> None:
    alone = "stages.release.inputs={evaluate: null, sample: null}"
    folder = Path(pixel_tiny.run("release", *SETTINGS[:3], alone).uri)
    assert not (folder / "samples.html").exists() and "samples.html" not in (folder / "MODEL_CARD.md").read_text()


@pytest.fixture
def browser(folder: Path, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser((folder / "samples.html").as_uri(), tmp_path / "profile")
    try:
        wait_for(lambda: browser.run("document.body && document.body.dataset.ready") == "yes")
        yield browser
    finally:
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_works_from_a_file(browser: Browser, folder: Path) -> None:
    images = "[...document.querySelectorAll('#drawn img')]"
    wait_for(lambda: browser.run(f"{images}.every(each => each.naturalWidth > 0)"))
    assert browser.run(f"{images}.map(each => each.naturalWidth)") == [32] * 9
    data = data_of(folder / "samples.html")
    browser.run("document.querySelector('#split').value = 'heldout'; document.querySelector('#split').oninput()")
    assert browser.run(f"{images}.length") == 4
    browser.run("document.querySelector('#split').value = ''; document.querySelector('#metric').value = 'p'")
    bound = sorted(picture["values"]["p"] for picture in data["pictures"])[4]
    browser.run(
        f"document.querySelector('#most').value = {bound}; document.querySelector('#order').value = '-1'; list()"
    )
    expected = [picture["values"]["p"] for picture in data["pictures"] if picture["values"]["p"] <= bound]
    shown = browser.run("[...document.querySelectorAll('#drawn figcaption')].map(each => each.textContent)")
    found = [float(caption.rpartition("(")[2].rstrip(")")) for caption in shown]
    assert found == pytest.approx(sorted(expected, reverse=True), rel=1e-2)
    browser.run("document.querySelector('#drawn button').click()")
    assert browser.run("dialog.open") and "nearest in training (pixels)" in browser.run("dialog.textContent")


def test_a_release_with_a_page_is_what_was_made(release: Artifact) -> None:
    import torch

    assert verify(release.uri, device=torch.device("cpu")).holds(tolerance=0)
