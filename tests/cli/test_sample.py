"""`genpipe sample`: from a pipeline and from a system's URI, with texts, classes, and without the data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from genpipe import api

if TYPE_CHECKING:
    from conftest import Command, TinyPipeline


@pytest.fixture
def config(tiny: TinyPipeline, tmp_path: Path) -> Path:
    """A YAML of the tiny pipeline with the store and data of the tests, whose system is made."""
    tiny.run("system")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"base: {tiny.config}\nstore: {tiny.store}\nstages: {{shard: {{source: {{path: {tiny.shapes}}}}}}}\n"
    )
    return path


def test_a_grid_of_each_prompt(genpipe: Command, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "grid.png"
    arguments = ("sample", str(config), "a red circle", "a blue bar", "--each", "2", "--out", str(out))
    code, _, error = genpipe(*arguments)
    assert code == 0, error
    one = np.asarray(Image.open(out))
    genpipe(*arguments)
    assert np.array_equal(one, np.asarray(Image.open(out)))
    genpipe(*arguments, "--seed", "1")
    assert not np.array_equal(one, np.asarray(Image.open(out)))


def test_a_pipeline_and_its_system_draw_the_same(
    genpipe: Command, config: Path, tiny: TinyPipeline, tmp_path: Path
) -> None:
    """And write nothing into the store, which may be read-only; nor do other commands that only look."""
    outs = [tmp_path / "pipeline.png", tmp_path / "system.png"]
    sources = (str(config), tiny.run("system").uri)
    shards, before = tiny.run("shard").uri, written(tiny.store)
    for source, out in zip(sources, outs, strict=True):
        assert genpipe("sample", source, "a red circle", "--out", str(out))[0] == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert genpipe("plan", str(config))[0] == 0
    assert genpipe("data", "show", shards, "--out", str(tmp_path / "sheet.png"))[0] == 0
    assert written(tiny.store) == before


def written(folder: Path | str) -> dict[Path, int]:
    """When each file and folder was last written."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def test_the_training_data_need_not_be_there(genpipe: Command, tiny: TinyPipeline, tmp_path: Path) -> None:
    """Images that were moved away, and shards that were deleted; the YAML is the same."""
    images, store = tmp_path / "images", tmp_path / "store"
    shutil.copytree(tiny.shapes, images)
    moved = type(tiny)(store, images)
    moved.run("system", f"tracking.uri=sqlite:///{tiny.store}/mlflow.db", *(SHORT := short()))
    shutil.rmtree(images)
    shutil.rmtree(store / "artifacts/shards")
    path = tmp_path / "tiny.yaml"
    settings = "".join(f"  {name}: {{train: {{samples: 32}}}}\n" for name in TRAINED)
    path.write_text(
        f"base: {tiny.config}\nstore: {store}\nstages:\n  shard: {{source: {{path: {images}}}}}\n{settings}"
    )
    code, _, error = genpipe("sample", str(path), "a red circle", "--out", str(tmp_path / "grid.png"))
    assert code == 0 and len(SHORT) == len(TRAINED), error
    path.write_text(path.read_text().replace("samples: 32", "samples: 16"))
    code, _, error = genpipe("sample", str(path), "a red circle")
    assert code == 2 and str(images) in error and str(store) in error


TRAINED = ("autoencoder", "clip", "prior", "decoder", "upsampler")


def short() -> list[str]:
    return [f"stages.{name}.train.samples=32" for name in TRAINED]


def test_classes_are_drawn_by_name_or_number(genpipe: Command, pixel_tiny: TinyPipeline, tmp_path: Path) -> None:
    uri, outs = pixel_tiny.run("system").uri, [tmp_path / "name.png", tmp_path / "number.png"]
    for label, out in zip(("cross", "2"), outs, strict=True):
        code, _, error = genpipe("sample", uri, "--label", label, "--each", "1", "--out", str(out))
        assert code == 0, error
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--label", "star"), ("labels", "star", "bar, circle, cross")),
        (("a cross",), ("prompts", "label")),
        ((), ("labels", "required")),
    ],
)
def test_what_a_class_conditional_system_is_not_told(
    genpipe: Command, pixel_tiny: TinyPipeline, arguments: tuple[str, ...], named: tuple[str, ...]
) -> None:
    code, _, error = genpipe("sample", pixel_tiny.run("system").uri, *arguments)
    assert code == 2 and all(part in error for part in named), error


def test_a_folder_gets_each_picture_with_what_is_known_of_it(
    genpipe: Command, tiny: TinyPipeline, tmp_path: Path
) -> None:
    """Prompts of arguments and of a file, in this order; the grid shows the same pictures."""
    uri, out, lines = tiny.run("system").uri, tmp_path / "pictures", tmp_path / "prompts.txt"
    lines.write_text("a blue bar\n\na green cross \u2014 \u732b\n")
    arguments = ("a red circle", "--prompts", str(lines), "--each", "2", "--seed", "3", "--out", str(out))
    code, said, error = genpipe("sample", uri, *arguments)
    assert code == 0 and "6 pictures" in said, error
    assert sorted(path.name for path in out.iterdir()) == [*(f"0000{i}.png" for i in range(6)), "grid.png"]
    pictures = [Image.open(out / f"0000{i}.png") for i in range(6)]
    prompts = ["a red circle", "a blue bar", "a green cross \u2014 \u732b"]
    assert [picture.info["prompt"] for picture in pictures] == [prompt for prompt in prompts for _ in range(2)]
    assert {picture.info["seed"] for picture in pictures} == {"3"}
    grid = np.asarray(Image.open(out / "grid.png"))
    for i, picture in enumerate(pictures):
        assert picture.size == (32, 32) and contains(grid, np.asarray(picture)), i


def test_one_of_many_drafts_is_kept(genpipe: Command, tiny: TinyPipeline, tmp_path: Path) -> None:
    """Its number is where the grid shows it; alone it is the picture that all of them drawn in full had there."""
    uri, asked = tiny.run("system").uri, ("a red circle", "a blue bar", "--each", "3", "--seed", "3")
    names = ("drafts", "all", "one.png", "varied.png")
    drafts, whole, one, varied = (tmp_path / name for name in names)
    for arguments in (
        ("--draft", "--out", str(drafts)),
        ("--out", str(whole)),
        ("--pick", "4", "--out", str(one)),
        ("--pick", "4", "--vary", "2", "--out", str(varied)),
    ):
        code, _, error = genpipe("sample", uri, *asked, *arguments)
        assert code == 0, error
    assert Image.open(drafts / "00004.png").size == (16, 16)
    kept = Image.open(one)
    assert (kept.info["prompt"], kept.info["number"], kept.size) == ("a blue bar", "4", (32, 32))
    everything = [np.asarray(Image.open(whole / f"0000{i}.png")).astype(int) for i in range(6)]
    gaps = [np.abs(picture - np.asarray(kept)).max() for picture in everything]
    assert gaps[4] <= 1 < min(gaps[:4] + gaps[5:]), "rounding aside"
    row = np.asarray(Image.open(varied))
    picture = Image.open(drafts / "00004.png")
    expected = [np.asarray(each) for each in api.load(uri).vary(picture, each=2, seed=3)]
    assert np.abs(row[:, :32].astype(int) - expected[0]).max() <= 4 and row.shape == (32, 70, 3)


def contains(grid: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture lies somewhere in a grid, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(grid, picture.shape)
    corners = np.argwhere((windows[..., 0, 0, :] == picture[0, 0]).all(-1).squeeze(-1))
    return any(np.array_equal(windows[y, x, 0], picture) for y, x in corners)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("a bar", "--out", "apple.jpg"), ("--out apple.jpg", ".png")),
        (("a bar", "--out", "setup.txt/pictures"), ("--out", "cannot be made")),
        (("--prompts", "absent.txt"), ("--prompts", "absent.txt")),
        (("--prompts", "setup.txt"), ("--prompts", "holds no prompts")),
        (("a bar", " "), ("prompts[1]", "empty")),
        (("a bar", "--steps", "0"), ("--steps",)),
        (("a bar", "--label", "cross"), ("labels", "conditioned on text")),
        (("a bar", "--pick", "4"), ("numbers: there is no picture 4",)),
        (("a bar", "--vary", "2"), ("--vary", "--pick")),
        (("a bar", "--pick", "1", "--vary", "2", "--draft"), ("--vary", "--draft")),
        ((), ("prompts", "required")),
    ],
)
def test_each_mistake_is_named_and_nothing_drawn(
    genpipe: Command,
    tiny: TinyPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    named: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup.txt").write_text("\n \n")
    code, _, error = genpipe("sample", tiny.run("system").uri, *arguments)
    assert code == 2 and all(part in error for part in named), error
    assert [path.name for path in tmp_path.iterdir()] == ["setup.txt"]


def test_what_is_no_system_is_refused(genpipe: Command, config: Path, tiny: TinyPipeline) -> None:
    code, _, error = genpipe("sample", tiny.run("clip").uri, "a cat")
    assert code == 2 and "system" in error
    code, _, error = genpipe("sample", str(config), "--system", "systen", "a cat")
    assert code == 2 and "systen" in error and "it has system" in error
    config.write_text(config.read_text() + "name: other\n")
    changed = config.read_text().replace("stages: {", "stages: {decoder: {train: {seed: 5}}, ")
    config.write_text(changed)
    code, _, error = genpipe("sample", str(config), "a cat")
    assert code == 2 and "genpipe run" in error
