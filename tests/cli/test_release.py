"""`genpipe verify` on a real release: as it was made, and changed in every way that it must notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from genpipe.artifacts import fetch
from genpipe.storage import open_storage

if TYPE_CHECKING:
    from conftest import Command, TinyPipeline


@pytest.fixture
def release(pixel_tiny: TinyPipeline, tmp_path: Path) -> Path:
    """A copy of a release, elsewhere."""
    made = pixel_tiny.run(
        "release",
        "stages.release.each=2",
        "stages.release.rows=2",
        "stages.release.inputs={evaluate: null, sample: null}",
    )
    return shutil.copytree(fetch(made), tmp_path / "release")


def test_a_release_that_is_what_was_made(genpipe: Command, release: Path) -> None:
    code, said, error = genpipe("verify", str(release), "--tolerance", "0")
    assert code == 0 and "the same bit for bit" in said and "each is as it was made" in said, error
    code, _, error = genpipe("sample", str(release), "--label", "cross", "--out", str(release.with_suffix(".png")))
    assert code == 0, error


def test_changed_missing_and_added_files_are_named(genpipe: Command, release: Path) -> None:
    card = release / "MODEL_CARD.md"
    card.write_text(card.read_text().replace("License", "LICENSE"))
    (release / "DATA_CARD.md").unlink()
    (release / "extra.bin").write_text("more")
    code, said, error = genpipe("verify", str(release))
    assert code == 1
    for sentence in ("MODEL_CARD.md: its content differs", "DATA_CARD.md: is missing", "extra.bin: was not committed"):
        assert sentence in error.replace("\n", " "), error
    assert "the same bit for bit" in said, "weights and grid are what they were"


def test_other_weights_draw_another_grid(genpipe: Command, release: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = release / "parts/decoder/weights.safetensors"
    weights = load_file(path)
    save_file({name: tensor * 1.05 for name, tensor in weights.items()}, path)
    code, said, error = genpipe("verify", str(release))
    assert code == 1 and "decoder/weights.safetensors: its content differs" in error
    assert "a pixel differs by up to" in error and "the same" not in said
    path.write_bytes(b"nothing")
    code, _, error = genpipe("verify", str(release))
    assert code == 1 and "the grid cannot be drawn" in error.replace("\n", " ")


def test_a_grid_within_the_tolerance(genpipe: Command, release: Path) -> None:
    """A pixel that is three levels off passes with a tolerance of three; its file does not."""
    grid = Image.open(release / "grid.png")
    red, green, blue = grid.getpixel((0, 0))
    grid.putpixel((0, 0), (red - 3 if red > 2 else red + 3, green, blue))
    grid.save(release / "grid.png")
    for tolerance, where in (("2", 2), ("3", 1)):
        code, *printed = genpipe("verify", str(release), "--tolerance", tolerance)
        assert code == 1 and "by up to 3 of 255 levels" in printed[where - 1], printed


def test_a_release_under_s3(genpipe: Command, release: Path, s3_server: str, tmp_path: Path) -> None:
    """It is drawn from and verified there; a file that is damaged there is named, and nothing of it is drawn."""
    there = open_storage(f"s3://genpipe/{tmp_path.name}/release")
    paths = [path for path in release.rglob("*") if path.is_file()]
    for path in paths:
        there.upload(path.relative_to(release).as_posix(), path)
    code, _, error = genpipe("sample", there.uri, "--label", "cross", "--out", str(tmp_path / "grid.png"))
    assert code == 0, error
    code, said, error = genpipe("verify", there.uri)
    assert code == 0 and "the same bit for bit" in said, error
    there.write("parts/decoder/model.json", b"{}")
    code, _, error = genpipe("verify", there.uri)
    assert code == 1 and "parts/decoder/model.json: has 2 bytes" in error.replace("\n", " ")


def test_lists_that_do_not_agree(genpipe: Command, release: Path) -> None:
    """Of release.json alone, as its own hash is in the manifest."""
    path = release / "release.json"
    record = json.loads(path.read_text())
    record["files"]["grid.png"] = "0" * 64
    path.write_text(json.dumps(record))
    code, _, error = genpipe("verify", str(release))
    assert code == 1 and "release.json: " in error and "grid.png: release.json and manifest.json" in error


def test_what_is_no_release_is_refused(genpipe: Command, pixel_tiny: TinyPipeline, tmp_path: Path) -> None:
    code, _, error = genpipe("verify", pixel_tiny.run("system").uri)
    assert code == 2 and "not a release" in error
    code, _, error = genpipe("verify", str(tmp_path))
    assert code == 2 and "manifest.json" in error
