"""Plans: what is cached and why not, what depends on what, and stages that do not agree with one another."""

from __future__ import annotations

import os
import shutil
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe import artifacts
from genpipe.artifacts import ManifestError
from genpipe.config import ConfigError
from genpipe.pipeline import graph

if TYPE_CHECKING:
    from conftest import TinyPipeline

SOURCE = "configs/pipeline/tiny.yaml"


def told(tiny: TinyPipeline, *overrides: str) -> str:
    """What a user is told who plans the tiny pipeline with these settings."""
    with pytest.raises(ConfigError) as error:
        tiny.plan(*overrides)
    text = str(error.value)
    return text[text.index(SOURCE) :] if SOURCE in text else text


def test_a_run_stage_is_cached_and_what_follows_is_not(tiny: TinyPipeline) -> None:
    made = tiny.run("shard")
    plan = tiny.plan()
    assert list(plan) == [name for name in graph.STAGES if name != "upsampler2"], "in the order of the graph"
    assert (plan["shard"].status, plan["shard"].artifact) == ("cached", made)
    assert plan["shard"].why == "committed with this configuration and these inputs"
    fresh = tiny.plan("stages.clip.train.seed=3")["clip"]
    assert fresh.status == "run"
    assert fresh.artifact.meta == {"embed_dim": 16, "text_width": 32, "context_length": 16, "clip_image_size": 16}


def test_everything_is_cached_after_a_run(tiny: TinyPipeline) -> None:
    made = tiny.run("evaluate")
    plan = tiny.plan()
    assert {planned.status for planned in plan.values()} == {"cached"}
    assert plan["evaluate"].artifact == made
    changed = tiny.plan("stages.decoder.train.grad_clip=0.5")
    assert [name for name, planned in changed.items() if planned.status == "run"] == ["decoder", "evaluate"]
    assert changed["decoder"].why == "train.grad_clip: 1.0 -> 0.5"
    assert changed["evaluate"].why == "its input decoder changed"
    seeded = tiny.plan("stages.autoencoder.train.seed=1", "stages.autoencoder.kl_weight=2e-6")
    ran = [name for name, planned in seeded.items() if planned.status == "run"]
    assert ran == ["autoencoder", "features", "decoder", "prior", "evaluate"]
    assert seeded["autoencoder"].why == "kl_weight: 1e-06 -> 2e-06; train.seed: 0 -> 1"
    assert seeded["decoder"].why == "its input autoencoder changed; its input features changed"


def test_resources_never_change_a_fingerprint(tiny: TinyPipeline) -> None:
    overrides = [
        f"stages.{name}.resources.{setting}"
        for name in tiny.plan()
        for setting in (
            "workers=4",
            "cpus=2",
            "gpus=1",
            "loader_threads=3",
            "loader_processes=2",
            "checkpoint_seconds=1",
            "max_failures=0",
        )
    ]
    before, after = tiny.plan(), tiny.plan(*overrides)
    assert after["clip"].cfg.resources.workers == 4
    assert {n: p.artifact.fingerprint for n, p in before.items()} == {
        n: p.artifact.fingerprint for n, p in after.items()
    }


SETTINGS = {
    "shard.quality": st.integers(1, 100),
    "autoencoder.kl_weight": st.floats(1e-9, 1),
    "clip.train.seed": st.integers(0, 99),
    "features.batch_size": st.integers(1, 99),
    "prior.drop_text": st.floats(0, 0.99),
    "decoder.train.optim.kind": st.sampled_from(["adamw", "muon"]),
    "upsampler.noise_aug": st.floats(0, 0.99),
    "evaluate.seed": st.integers(0, 9),
}
NEEDS: dict[str, set[str]] = {
    "shard": set(),
    "autoencoder": {"shard"},
    "clip": {"shard"},
    "features": {"shard", "autoencoder", "clip"},
    "prior": {"features"},
    "decoder": {"autoencoder", "features"},
    "upsampler": {"shard"},
    "evaluate": {"shard", "autoencoder", "clip", "features", "prior", "decoder", "upsampler"},
}
"""The picture of the design, by hand."""


def downstream(name: str) -> set[str]:
    return {name}.union(*(downstream(later) for later, needs in NEEDS.items() if name in needs))


@settings(max_examples=40)
@given(st.sampled_from(sorted(SETTINGS)), st.data())
def test_a_setting_changes_its_stage_and_what_depends_on_it(
    tiny: TinyPipeline, setting: str, data: st.DataObject
) -> None:
    value = data.draw(SETTINGS[setting])
    name, *path = setting.split(".")
    before, after = tiny.plan(), tiny.plan(f"stages.{setting}={value}")
    changed = {n for n in before if before[n].artifact.fingerprint != after[n].artifact.fingerprint}
    same = reduce(getattr, path, before[name].cfg) == value
    assert changed == (set() if same else downstream(name))


def test_new_pictures_make_everything_anew(tiny: TinyPipeline, shapes: Path, tmp_path: Path) -> None:
    tiny.run("shard")
    copy = tmp_path / "shapes"
    shutil.copytree(shapes, copy)
    same = tiny.plan(f"stages.shard.source.path={copy}")["shard"]
    assert same.why == f"source.path: {shapes} -> {copy}"
    moved = graph.load_pipeline(str(write_pipeline(tmp_path, tiny, copy)))
    first = graph.plan(moved)[0].artifact.fingerprint
    assert graph.plan(moved)[0].artifact.fingerprint == first
    caption = copy / "small-red-bar.txt"
    stat = caption.stat()
    caption.write_text("a small green bar\n")
    os.utime(caption, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert graph.plan(moved)[0].artifact.fingerprint != first


def write_pipeline(folder: Path, tiny: TinyPipeline, source: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        f"name: mine\nstore: {tiny.store}\nstages: {{shard: {{source: {{kind: folder, path: {source}}}}}}}\n"
    )
    return path


def test_only_takes_what_a_stage_needs(tiny: TinyPipeline) -> None:
    pipeline = tiny.load()
    assert [planned.name for planned in graph.plan(pipeline, only=["clip"])] == ["shard", "clip"]
    assert [planned.name for planned in graph.plan(pipeline, only=["upsampler", "prior"])] == [
        *("shard", "autoencoder", "clip", "features", "prior", "upsampler"),
    ]


def test_a_given_artifact_stands_for_its_stage(tiny: TinyPipeline) -> None:
    shard = tiny.run("shard").model_copy(update={"fingerprint": "0" * 64})
    plan = graph.plan(tiny.load(), only=["clip"], given={"shard": shard})
    assert [planned.name for planned in plan] == ["clip"]
    assert plan[0].inputs == {"shard": shard}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.autoencoder.image_size=64"],
            "stages.autoencoder: image_size 64 is larger than the shards' 32 px; lower it or raise "
            "stages.shard.image_size",
        ),
        (
            ["stages.autoencoder.image_size=15"],
            "stages.autoencoder: image_size 15 is not a multiple of the model's factor 2",
        ),
        (
            ["stages.autoencoder.adversarial={start: 0}"],
            "stages.autoencoder: adversarial.model.layers 3 is too many for images of 16 px; lower it",
        ),
        (
            ["stages.clip.model.image_size=64"],
            "stages.clip: model.image_size 64 is larger than the shards' 32 px; lower it or raise "
            "stages.shard.image_size",
        ),
        (
            ["stages.clip.train.micro_batch_size=8"],
            "stages.clip: train.micro_batch_size: the contrastive loss compares the whole batch at once, so it cannot "
            "be cut; set tower_batch_size instead, which saves the same memory",
        ),
        (
            ["stages.decoder.model.denoiser.heads=5"],
            "stages.decoder.model.denoiser: width 64 is not divisible by heads 5; change one",
        ),
        (
            ["stages.decoder.model.denoiser.width=62"],
            "stages.decoder.model.denoiser: width 62 is not divisible by 4, as positions 'absolute' need; change it",
        ),
        (
            ["stages.decoder.model.denoiser={width: 60, positions: relative}"],
            "stages.decoder.model.denoiser: width / heads 30 is not divisible by 4, as positions 'relative' need; "
            "change it",
        ),
        (
            ["stages.prior.model.heads=3"],
            "stages.prior.model: width 32 is not divisible by heads 3; change one",
        ),
        (
            ["stages.clip.model.patch_size=5"],
            "stages.clip.model: image_size 16 is not divisible by patch_size 5; change one",
        ),
        (
            ["stages.decoder.model.denoiser.patch_size=3"],
            "stages.decoder: model.denoiser.patch_size makes cells of 3, which do not divide the latents' 8; change it",
        ),
        (
            ["stages.upsampler.image_size=64", "stages.upsampler.low_size=16"],
            "stages.upsampler: image_size 64 is larger than the shards' 32 px; lower it or raise "
            "stages.shard.image_size",
        ),
        (
            ["stages.upsampler.low_size=32"],
            "stages.upsampler: image_size 32 is not larger than low_size 32",
        ),
        (
            ["stages.upsampler.crop=15"],
            "stages.upsampler: crop 15 must be a multiple of the 2 px of the model's coarsest cells, and at most "
            "image_size 32",
        ),
        (
            ["stages.upsampler.model.patch_size=3", "stages.upsampler.crop=15"],
            "stages.upsampler: image_size 32 is not a multiple of the 3 px of the model's coarsest cells; change one",
        ),
        (
            ["stages.upsampler.low_size=8"],
            "stages.evaluate: upsampler.low_size is 8, but the autoencoder's images are 16 px; set them equal",
        ),
        (
            ["stages.evaluate.gate={train/recal_at_1: 0.5}"],
            "stages.evaluate: gate: no metric 'train/recal_at_1'; did you mean 'train/recall_at_1'?",
        ),
    ],
)
def test_stages_that_disagree(tiny: TinyPipeline, overrides: list[str], message: str) -> None:
    assert told(tiny, *overrides) == f"{SOURCE}: {message}"


def test_a_source_that_is_not_there(tiny: TinyPipeline, tmp_path: Path) -> None:
    assert told(tiny, f"stages.shard.source.path={tmp_path / 'none'}") == (
        f"{SOURCE}: stages.shard: source.path: the folder {tmp_path / 'none'} does not exist; give the folder that "
        "holds the images"
    )


def test_faults_of_the_whole_pipeline_come_together(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.load("stages.decodr={}", "stages.prior.model.widht=8", "stages.upsampler.train.samples=-1")
    assert str(error.value).splitlines() == [
        "override 'stages.prior.model.widht=8': stages.prior.model.widht: unknown key; did you mean 'width'?",
        "override 'stages.upsampler.train.samples=-1': stages.upsampler.train.samples: input should be greater than "
        "or equal to 0, got -1",
        "override 'stages.decodr={}': stages.decodr: no such stage; did you mean 'decoder'?",
    ]


def test_a_stage_whose_inputs_are_not_configured(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("name: half\nstore: runs\nstages: {features: {}}\n")
    with pytest.raises(ConfigError) as error:
        graph.load_pipeline(str(path))
    assert str(error.value) == (
        f"{path}: stages.features: needs the stages shard, autoencoder, clip, which are not configured"
    )


def test_a_store_on_s3_needs_a_tracking_server(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.load("store=s3://bucket/prefix")
    assert str(error.value).endswith(f"{SOURCE}: tracking.uri: required when the store is on S3; name an MLflow server")


def test_a_prior_trained_on_another_clip_is_refused(tiny: TinyPipeline) -> None:
    """Given by hand, sizes equal: without the check it would give noise."""
    clip = tiny.plan()["clip"].artifact
    prior = tiny.plan("stages.clip.train.seed=1")["prior"].artifact
    other = tiny.plan("stages.clip.train.seed=1")["clip"].artifact
    assert prior.meta["clip"] == other.fingerprint != clip.fingerprint
    with pytest.raises(ConfigError) as error:
        graph.plan(tiny.load(), given={"prior": prior})
    assert str(error.value).endswith(
        f"{SOURCE}: stages.evaluate: prior was made with clip {other.fingerprint[:12]}, but clip here is "
        f"{clip.fingerprint[:12]}; use the clip it was made with, or make prior again"
    )


def test_a_damaged_manifest_stops_the_plan(tiny: TinyPipeline, tmp_path: Path) -> None:
    source = tiny.run("shard")
    store = tmp_path / "store"
    uri = artifacts.artifact_uri(str(store), "shard", source.fingerprint)
    shutil.copytree(source.uri, uri)
    assert tiny.plan(f"store={store}")["shard"].status == "cached"
    manifest = Path(uri, "manifest.json")
    manifest.write_text(manifest.read_text().replace('"samples_train"', '"samples_trian"'))
    with pytest.raises(ManifestError) as error:
        tiny.plan(f"store={store}")
    assert str(error.value) == (
        f"{manifest}: changed since it was written (its digest differs); delete {uri} to have it made again, or "
        "restore it from a copy"
    )


def test_the_nearest_artifact_explains_why(tiny: TinyPipeline) -> None:
    tiny.run("shard")
    tiny.run("shard", "stages.shard.quality=80")
    assert tiny.plan("stages.shard.quality=81")["shard"].why in ("quality: 95 -> 81", "quality: 80 -> 81")
    assert tiny.plan("stages.shard.quality=80", "stages.shard.split_seed=1")["shard"].why == "split_seed: 0 -> 1"
    many = tiny.plan(*(f"stages.shard.{s}" for s in ("quality=70", "split_seed=1", "image_size=40", "part_size=9")))
    assert many["shard"].why.endswith("; and 1 more")


def test_a_spec_is_what_the_plan_says(tiny: TinyPipeline) -> None:
    spec = tiny.spec("clip")
    planned = tiny.plan()["clip"]
    assert (spec.target, spec.inputs, spec.stage) == (planned.artifact, planned.inputs, "clip")
    assert spec.config == planned.cfg.model_dump(mode="json")
    assert spec.tracking_uri == f"sqlite:///{tiny.store}/mlflow.db"
