"""The stage on committed pictures: names, gates, roles, and that its parts are what a launcher may run anywhere."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gallery import SIDE, Gallery, pictures, unit
from PIL import Image
from pydantic import ValidationError

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import ConfigError
from genpipe.evaluation.per_sample import read_values
from genpipe.lineage import content_digest
from genpipe.stages import evaluate
from genpipe.stages.evaluate import Config
from genpipe.storage import open_storage

if TYPE_CHECKING:
    from conftest import TinyPipeline

CAPTIONS = [f"picture {i}" for i in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    gallery = Gallery(tmp_path_factory.mktemp("store"))
    clip, shard = gallery.clip(), gallery.shards({"train": pictures(range(12), CAPTIONS)})
    return {
        "shard": shard,
        "judge": clip,
        "judge_features": gallery.features(shard, clip, {"train": (unit(12, seed=0), unit(12, seed=1))}),
        "sample": gallery.shards({"train": pictures(range(50, 60), CAPTIONS[:10])}, kind="samples"),
        "autoencoder": gallery.autoencoder(kind="identity"),
    }


def config(metrics: Mapping[str, Any], **settings: Any) -> Config:
    return Config.model_validate({"metrics": metrics, **settings})


def given(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Those of the inputs that the stage takes, as a pipeline gives them."""
    return {role: inputs[role] for role, takes in evaluate.roles(cfg).items() if not takes.optional}


def run(cfg: Config, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Every part by a worker of its own, in any order, then merged: what a launcher does."""
    out.mkdir(exist_ok=True)
    uri, taken = str(out / "made"), given(cfg, inputs)
    evaluate.check_inputs(cfg, taken)
    parts = evaluate.parts(cfg, taken)
    assert parts == evaluate.parts(cfg, taken) and len(set(parts)) == len(parts)
    for number, part in enumerate(random.Random(0).sample(parts, len(parts))):
        (folder := out / str(number)).mkdir()
        artifacts.add_part(uri, part, folder, evaluate.Worker(cfg, taken)(part, folder))
    done = artifacts.finished_parts(uri)
    for _ in range(2):  # it may be called again
        results = evaluate.merge_parts(cfg, taken, open_storage(uri), [done[part]["stats"] for part in parts], out)
    meta, metrics = evaluate.finalize(cfg, taken, results, out)
    (out / "meta.json").write_text(json.dumps(meta))
    return metrics


def test_numbers_of_all_metrics_and_their_files(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    frechet = {"kind": "frechet", "network": {"kind": "clip"}}
    metrics = {"retrieval": {"recall_at": [2]}, "grid": None, "all": {**frechet, "against": "train"}, "own": frechet}
    found = run(config(metrics, part_size=4), inputs, tmp_path)
    assert found.keys() == {
        *(f"train/{name}" for name in ("recall_at_2", "ceiling_at_2", "cosine", "cosine_unrelated", "pictures")),
        "pool",
        "all/train/frechet_clip_10",
        "own/train/frechet_clip_10",
    }
    assert (found["pool"], found["train/pictures"]) == (12, 10)
    assert found["all/train/frechet_clip_10"] != found["own/train/frechet_clip_10"]
    files = {path.relative_to(tmp_path / "made").as_posix() for path in (tmp_path / "made").rglob("*.*")}
    assert "grid.png" in files


def test_features_are_computed_once_for_all_that_want_them(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """And the artifact says by which network, of how many pictures, which were shrunk how."""
    frechet = {"kind": "frechet", "network": {"kind": "clip"}}
    alone = config({"a": {**frechet, "against": "train"}}, part_size=4)
    both = config({"a": {**frechet, "against": "train"}, "b": frechet}, part_size=4)
    assert len(evaluate.parts(alone, inputs)) == 6, "10 generated and 12 real pictures"
    assert len(evaluate.parts(both, inputs)) == 9, "and the 10 originals"
    first, second = run(alone, inputs, tmp_path / "alone"), run(both, inputs, tmp_path / "both")
    assert first.items() <= second.items()
    meta = json.loads((tmp_path / "both/meta.json").read_text())["protocol"]
    assert meta["content"] == {role: content_digest(inputs[role]) for role in ("sample", "shard")}
    [network] = meta["networks"].values()
    assert network["network"] == content_digest(inputs["judge"]) and network["read_at"] == SIDE
    assert network["pictures"] == {"sample/train": 10, "originals/train": 10, "train/train": 12}


def test_only_what_the_metrics_ask_for_is_taken(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    cfg = config({"reconstruction": {"split": "train"}})
    assert evaluate.roles(cfg).keys() == {"shard", "autoencoder"}
    assert run(cfg, inputs, tmp_path) == {"reconstruction/psnr": 100, "reconstruction/ssim": pytest.approx(1)}
    everything = config({"retrieval": {"judge": "self"}, "heldout": {}, "grid": {}})
    assert evaluate.roles(everything).keys() == {"sample", "grid_sample", "shard", "clip", "features", "trained"}
    assert evaluate.roles(everything)["trained"].several


def test_a_gate_must_name_a_number_that_is_given(inputs: dict[str, Artifact]) -> None:
    metrics = {"retrieval": {"recall_at": [10]}, "far": {"kind": "frechet", "network": {"kind": "clip"}}}

    def gated(name: str) -> None:
        cfg = config(metrics, observe={"gates": {name: {"min": 0.5}}})
        evaluate.check_inputs(cfg, given(cfg, inputs))

    for name in ("train/recall_at_10", "heldout/ceiling_at_10", "far/train/frechet_clip_256", "pool"):
        gated(name)
    for name, remedy in {
        "train/recall_at_5": "did you mean 'train/recall_at_10'",
        "train/frechet_clip_256": "did you mean 'far/train/frechet_clip_*'",
        "nonsense": "they give pool, train/recall_at_10",
    }.items():
        with pytest.raises(ValueError, match=re.escape(name)) as error:
            gated(name)
        assert "observe.gates" in str(error.value) and remedy in str(error.value)


def test_values_of_pictures_are_kept_whose_means_are_the_numbers(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Of every metric that has some, with the intervals of the numbers in `scores.json`."""
    gallery, captions = Gallery(tmp_path / "store"), [*CAPTIONS, *(f"other {i}" for i in range(12))]
    of = pictures(range(24), captions)
    shard = gallery.shards({"train": of[:12], "heldout": of[12:]})
    halves = {"train": (unit(12, seed=0), unit(12, seed=1)), "heldout": (unit(12, seed=2), unit(12, seed=3))}
    given = {
        **inputs,
        "shard": shard,
        "judge_features": gallery.features(shard, inputs["judge"], halves),  # type: ignore[arg-type]
        "autoencoder": gallery.autoencoder(kind="folded", patch_size=2, width=16, multipliers=[1], latent_channels=4),
    }
    metrics = {
        "retrieval": {"recall_at": [2, 9]},
        "mine": {"kind": "nearest_real", "network": {"kind": "pixels"}},
        "memorization": {"networks": [{"kind": "pixels"}], "level": 0.2},
        "reconstruction": {"pictures": 9},
        "grid": {},
    }
    cfg = config(metrics, part_size=4)
    found = run(cfg, given, tmp_path / "out")
    made = tmp_path / "all"  # as a launcher commits it
    shutil.copytree(tmp_path / "out/made", made)
    shutil.copytree(tmp_path / "out", made, ignore=shutil.ignore_patterns("made", "[0-9]*"), dirs_exist_ok=True)
    values = read_values(gallery.commit("scores", made))
    assert values.keys() == {
        *(f"train/{name}_at_{k}" for name in ("recall", "ceiling") for k in (2, 9)),
        *("train/cosine", "mine/train/nearest_real_pixels", "train/memorized"),
        *("reconstruction/psnr", "reconstruction/ssim"),
    }
    told = json.loads((tmp_path / "out/scores.json").read_text())["numbers"]
    assert told.keys() == found.keys()
    for name, of_number in values.items():
        assert of_number.values.mean() == pytest.approx(found[name]), name
        assert told[name]["low"] <= told[name]["value"] <= told[name]["high"]
        assert told[name]["pictures"] == len(of_number.keys) == (9 if "reconstruction" in name else 10)
    assert values["train/cosine"].keys == CAPTIONS[:10]
    assert told["pool"] == {"value": 24}


def test_a_baseline_is_of_numbers_with_values_of_pictures(inputs: dict[str, Artifact]) -> None:
    metrics = {"retrieval": {"recall_at": [10]}, "far": {"kind": "frechet", "network": {"kind": "clip"}}}

    def gated(name: str) -> None:
        cfg = config(metrics, observe={"gates": {name: {"not_worse_than": "models:/system@champion"}}})
        evaluate.check_inputs(cfg, given(cfg, inputs))

    gated("train/recall_at_10")
    for name in ("far/train/frechet_clip_256", "pool", "train/cosine_unrelated"):
        with pytest.raises(ValueError, match=f"{re.escape(name)}.not_worse_than: .* a number of whole sets"):
            gated(name)


def test_settings_say_what_is_wrong_with_them() -> None:
    assert config({"grid": {}}).metrics["grid"] == config({"grid": {"kind": "grid"}}).metrics["grid"]
    for metrics in ({}, {"gird": {}}, {"a b": {"kind": "grid"}}, {"a/b": {"kind": "grid"}}, {"grid": {"row": 3}}):
        with pytest.raises(ValidationError):
            config(metrics)


def test_the_tiny_pipeline_is_scored(tiny: TinyPipeline) -> None:
    scores = tiny.run("evaluate")
    manifest = artifacts.verify(scores.uri)
    found, counts = manifest.metrics, tiny.run("shard").meta["samples"]
    assert found["pool"] == counts["train"] + counts["heldout"]
    assert (found["train/pictures"], found["heldout/pictures"]) == (16, 4)
    for split in ("train", "heldout"):
        recalls = [found[f"{split}/self_recall_at_{k}"] for k in (1, 5, 10)]
        assert 0 <= recalls[0] <= recalls[1] <= recalls[2] <= 1
    assert {"train/nearest_real_pixels", "heldout/memorized", "memorized_heldout"} <= found.keys()
    assert np.asarray(Image.open(Path(scores.uri, "memorization-train.png"))).std() > 0
    assert set(scores.meta["protocol"]["content"]) == {"sample", "shard"}
    assert {"autoencoder/psnr", "clip/loss", "prior/loss", "decoder/loss", "upsampler/psnr"} <= found.keys()
    picture = np.asarray(Image.open(Path(scores.uri, "grid.png")))
    assert picture.shape[0] > 12 * 96 and picture.shape[1] > 4 * 96, "12 rows, two pictures of each split"
    assert picture.std() > 0


def test_three_seeds_are_scored_side_by_side(tiny: TinyPipeline) -> None:
    """In the store of the tiny pipeline, whose first decoder is the first of the three."""
    seeds = type(tiny)(tiny.store, tiny.shapes, tiny.config.with_name("seeds-tiny.yaml"))
    scores = [artifacts.verify(seeds.run(f"evaluate@{seed}").uri) for seed in range(3)]
    assert len({manifest.artifact.fingerprint for manifest in scores}) == 3
    assert scores[0].inputs["sample"].fingerprint == tiny.plan()["sample"].artifact.fingerprint
    for manifest in scores:
        assert {"train/self_recall_at_10", "decoder.0/loss", "decoder.2/loss"} <= manifest.metrics.keys()
    assert len({manifest.metrics["train/self_cosine"] for manifest in scores}) == 3


def test_a_class_conditional_system_is_scored(pixel_tiny: TinyPipeline) -> None:
    """Without a CLIP and without captions to compare."""
    scores = pixel_tiny.run("evaluate")
    found = artifacts.verify(scores.uri).metrics
    assert {name.split("/")[0] for name in found} == {"decoder", "train"}
    assert found["train/nearest_real_pixels_chance"] == pytest.approx(0.2), "of five classes"
    assert found["train/nearest_real_pixels_ceiling"] > 0.4 and found["train/classification_pixels_real"] > 0.3
    assert np.asarray(Image.open(Path(scores.uri, "grid.png"))).std() > 0


def test_a_gate_that_no_metric_has_is_found_by_the_plan(tiny: TinyPipeline) -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.evaluate: observe\.gates: .*'train/self_recall_at_11'.*self_recall_at_1"
    ):
        tiny.plan("stages.evaluate.observe.gates={train/self_recall_at_11: {min: 0.5}}")
    gated = "stages.evaluate.observe.gates={train/self_recall_at_10: {min: 0.5}}"
    assert tiny.plan(gated)["evaluate"].artifact.fingerprint == tiny.plan()["evaluate"].artifact.fingerprint
