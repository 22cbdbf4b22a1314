"""The stage on tiny systems: what it writes, that the folder draws by itself, and what is not released."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml
from PIL import Image

from genpipe import __version__, artifacts, load
from genpipe.artifacts import Artifact, fetch, read_manifest, sha256_file
from genpipe.config import ConfigError
from genpipe.data.shard_dataset import open_shards
from genpipe.data.takedown import affected, plan_removal
from genpipe.pipeline.graph import load_pipeline

if TYPE_CHECKING:
    from conftest import Command, TinyPipeline

PIXEL = (
    "stages.release.title=Shapes",
    "stages.release.each=2",
    "stages.release.rows=3",
    "stages.release.limits=Blurs.",
    "stages.release.license=CC-BY-4.0",
    "stages.release.data_licenses={shapes: CC0}",
    "stages.evaluate.observe.gates={decoder/loss: {max: 10}}",
    "stages.evaluate.batch_size=24",  # scores of its own: those that another file made in this store have no gates
)


@pytest.fixture(scope="module")
def pixel(pixel_tiny: TinyPipeline) -> Artifact:
    """A release of a class-conditional system on pixels, with its scores."""
    return pixel_tiny.run("release", *PIXEL)


@pytest.fixture
def moved(pixel: Artifact, tmp_path: Path) -> Path:
    """A copy of the release in a place of its own, far from the store."""
    return shutil.copytree(fetch(pixel), tmp_path / "elsewhere" / "release")


def test_everything_is_in_the_folder_and_hashed(pixel: Artifact) -> None:
    folder = fetch(pixel)
    record = json.loads((folder / "release.json").read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"release.json", "manifest.json"} == record["files"].keys()
    assert {"system.yaml", "MODEL_CARD.md", "DATA_CARD.md", "grid.png", "parts/decoder/weights.safetensors"} <= files
    assert all(sha256_file(folder / path) == digest for path, digest in record["files"].items())
    assert record["genpipe"] == __version__ and record["machine"]["hardware"]
    assert [prompt["text"] for prompt in record["grid"]["prompts"]] == ["bar", "circle", "cross"]
    assert Image.open(folder / "grid.png").size == (2 * 16, 3 * 16)


def test_a_release_draws_what_its_system_draws_without_the_store(
    pixel: Artifact, moved: Path, pixel_tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own store is out of reach meanwhile, so that nothing can be read there."""
    asked = {"labels": ["cross", "bar"], "seed": 3}
    expected = [np.asarray(picture) for picture in load(pixel_tiny.run("system").uri).sample(**asked)]
    monkeypatch.chdir(moved)
    store = Path(pixel_tiny.store)
    hidden = store.rename(store.with_name("hidden"))
    try:
        system = load(moved)
        drawn = [np.asarray(picture) for picture in system.sample(**asked)]
    finally:
        hidden.rename(store)
    assert (system.size, system.conditioned_on, system.classes[2]) == (16, {"label"}, "cross")
    assert np.array_equal(drawn, expected)


def test_nothing_in_it_names_a_place_outside(pixel: Artifact, pixel_tiny: TinyPipeline) -> None:
    record = yaml.safe_load((fetch(pixel) / "system.yaml").read_text())
    assert {part["uri"] for part in record["parts"].values()} == {"parts/decoder"}
    for name in ("system.yaml", "MODEL_CARD.md", "DATA_CARD.md", "release.json"):
        text = (fetch(pixel) / name).read_text()
        assert str(pixel_tiny.store) not in text and str(pixel_tiny.shapes) not in text, name


def test_the_cards_say_what_the_manifests_say(pixel: Artifact, pixel_tiny: TinyPipeline) -> None:
    model, data = ((fetch(pixel) / name).read_text() for name in ("MODEL_CARD.md", "DATA_CARD.md"))
    shards, scores = (read_manifest(pixel_tiny.run(name, *PIXEL).uri) for name in ("shard", "evaluate"))
    assert shards is not None and scores is not None
    for split in ("train", "heldout"):
        assert f"| {split} samples | {shards.artifact.meta['samples'][split]} |" in data
    assert "| shapes | CC0 |" in data and "None: every part began with random weights." in data
    assert "# Shapes" in model and "Blurs." in model and "CC-BY-4.0" in model
    loss = scores.metrics["decoder/loss"]
    assert f"| `decoder/loss` | {loss:.4g} |" in model
    assert f"| `decoder/loss` | at most 10 | {loss:.4g} | yes |" in model
    assert "It was not measured" in model, "memorization is none of its metrics"


def test_a_takedown_names_the_releases_that_have_seen_the_sample(
    pixel: Artifact, pixel_tiny: TinyPipeline, genpipe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on the command line, which says that copies are not found; and release.json names the shards anywhere."""
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    shard = pixel_tiny.run("shard")
    key = open_shards(shard, split="train").key(0)
    assert pixel.uri in {artifact.uri for artifact in affected(plan_removal(shard.uri, {key})).made_from}
    (keys := tmp_path / "keys.txt").write_text(key)
    code, said, _ = genpipe("data", "remove", shard.uri, "--keys", str(keys))
    assert code == 130 and pixel.uri in said and "withdraw the copies" in said
    assert json.loads((fetch(pixel) / "release.json").read_text())["made_from"]["shards"] == [shard.fingerprint]


def test_a_missed_gate_is_refused(pixel_tiny: TinyPipeline) -> None:
    gate = "stages.evaluate.observe.gates={decoder/loss: {max: 0.001}}"
    with pytest.raises(ValueError, match=r"decoder/loss is .* its gate asks for at most 0\.001"):
        pixel_tiny.run("release", *PIXEL[:1], "stages.evaluate.part_size=7", gate)


def test_scores_of_another_system_are_refused(pixel_tiny: TinyPipeline) -> None:
    other = pixel_tiny.run("evaluate", "stages.system.model.decoder.steps=3", "stages.evaluate.metrics={grid: {}}",
                           "stages.evaluate.inputs={trained: []}")  # fmt: skip
    with pytest.raises(ValueError, match="measured pictures of the system"):
        pixel_tiny.run("release", f"stages.release.inputs.evaluate=[{other.uri}]")


def copies(tiny: TinyPipeline, store: Path) -> Artifact:
    """The training pictures themselves, as if a system had drawn them."""
    shard = tiny.run("shard")
    identity = artifacts.identity("copies", version=1, settings={}, inputs={"shard": shard})
    fingerprint = artifacts.fingerprint(identity)
    uri = artifacts.artifact_uri(str(store), "samples", fingerprint)
    target = Artifact(kind="samples", uri=uri, fingerprint=fingerprint, meta={**shard.meta, "clips": []})
    folder = Path(shutil.copytree(fetch(shard), store / "copies"))
    (folder / "manifest.json").unlink()
    return artifacts.commit(
        target, folder=folder, identity=identity, config={}, inputs={"shard": shard}, metrics={}, run_id=""
    )


@pytest.mark.slow
def test_what_memorizes_is_refused_and_a_setting_lets_it_pass(tiny: TinyPipeline, tmp_path: Path) -> None:
    """And a text-to-image system with upsamplers, its tokenizer and prompts of its samples is released whole."""
    memorization = "stages.evaluate.metrics={memorization: {networks: [{kind: pixels}], level: 0.1}}"
    measured = (
        f"stages.evaluate.inputs={{sample: {copies(tiny, tmp_path).uri}}}",
        memorization,
        "stages.release.each=1",
    )
    with pytest.raises(ValueError, match="max_memorized: train/memorized is 1, and 0\\.9 may be"):
        tiny.run("release", "stages.release.max_memorized=0.9", *measured)
    release = tiny.run("release", "stages.release.max_memorized=1", *measured)
    folder = fetch(release)
    assert (folder / "parts/clip/tokenizer.json").exists() and (folder / "parts/upsamplers.0/model.json").exists()
    assert "- `train/memorized`: 100 % of the pictures" in (folder / "MODEL_CARD.md").read_text()
    asked = {"prompts": ["a red circle"], "seed": 5}
    [there], [here] = load(release.uri).sample(**asked), load(tiny.run("system").uri).sample(**asked)
    assert np.array_equal(np.asarray(there), np.asarray(here))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("stages.release.prompts=[a cat]",), "conditioned on label"),
        (("stages.release.max_memorized=2",), "max_memorized"),
        (("stages.release.inputs.evaluate=decoder",), "evaluate would fit"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    pixel_tiny: TinyPipeline, settings: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        pixel_tiny.plan("stages.release.each=1", *settings)


def test_the_settings_that_come_with_genpipe_are_settings(tiny: TinyPipeline, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    own = Path("configs/stage/release.yaml").resolve()
    path.write_text(f"base: {tiny.config}\nstages: {{release: {{base: {own}}}}}\n")
    assert load_pipeline(str(path)).instances["release"].cfg.model_dump()["title"] == "An emoji artist"


def test_a_grid_of_texts_needs_some(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError, match=r"inputs\.sample"):
        tiny.plan("stages.release.each=1", "stages.release.inputs.sample=null")
