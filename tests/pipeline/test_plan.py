"""Plans: what is cached and why not, what depends on what, and stages that do not fit one another."""

from __future__ import annotations

import hashlib
import json
import os
import re
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
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan, why_not
from genpipe.storage import LocalStorage

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
    plans = tiny.plan()
    assert (plans["shard"].status, plans["shard"].artifact) == ("cached", made)
    fresh = tiny.plan("stages.clip.train.seed=3")["clip"]
    assert fresh.status == "run"
    assert fresh.artifact.meta == {"embed_dim": 16, "text_width": 32, "context_length": 16, "clip_image_size": 16}


def test_everything_is_cached_after_a_run(tiny: TinyPipeline) -> None:
    made = tiny.run("evaluate")
    plans = tiny.plan()
    assert {planned.status for planned in plans.values()} == {"cached"}
    assert plans["evaluate"].artifact == made
    changed = tiny.plan("stages.decoder.train.grad_clip=0.5")
    assert [name for name, planned in changed.items() if planned.status == "run"] == [
        "decoder", "system", "sample", "evaluate",
    ]  # fmt: skip
    assert changed["decoder"].why == "train.grad_clip: 1.0 -> 0.5"
    assert changed["system"].why == "its input decoder changed"
    seeded = tiny.plan("stages.autoencoder.train.seed=1", "stages.autoencoder.kl_weight=2e-6")
    ran = [name for name, planned in seeded.items() if planned.status == "run"]
    assert ran == ["autoencoder", "features", "prior", "decoder", "system", "sample", "evaluate"]
    assert seeded["autoencoder"].why == "kl_weight: 1e-06 -> 2e-06; train.seed: 0 -> 1"
    assert seeded["decoder"].why == "its input autoencoder changed; its input features changed"


def test_an_image_says_which_commit_it_was_built_from(tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENPIPE_REVISION", "0123abcd")
    assert tiny.spec("shard").git_revision == "0123abcd"


RESOURCES = {
    "workers": 4,
    "cpus": 2.0,
    "gpus": 1.0,
    "accelerator_type": "H100",
    "memory": 2.0,
    "custom": "{fast: 1}",
    "placement": "SPREAD",
    "loader_threads": 3,
    "loader_processes": 2,
    "shard_over": 2,
    "recompute_blocks": True,
    "offload_averages": True,
    "compile": True,
    "checkpoint_seconds": 1.0,
    "failure_hours": 2.0,
    "keep_checkpoints": 5,
    "hang_seconds": 9.0,
    "max_failures": 0,
}


def test_nothing_in_resources_or_observe_changes_a_fingerprint(tiny: TinyPipeline) -> None:
    """Every setting of both blocks is changed, whatever it is called."""
    before = tiny.plan()
    overrides = []
    for name, planned in before.items():
        cfg = planned.instance.cfg
        tried = RESOURCES.keys() | {"validation"}  # see below: it does not go with `keep_best`
        assert tried == type(cfg.resources).model_fields.keys(), "a new resource is to be tried here"
        overrides += [f"stages.{name}.resources.{setting}={value}" for setting, value in RESOURCES.items()]
        for setting, value in cfg.observe.model_dump().items():
            if isinstance(value, int):
                overrides.append(f"stages.{name}.observe.{setting}={value + 1}")
            elif setting == "sampler":
                overrides.append(f"stages.{name}.observe.sampler.steps={value['steps'] + 1}")
            elif setting == "keep_best":
                overrides.append(f"stages.{name}.observe.keep_best={{metric: loss, goal: min}}")
            else:
                assert setting == "gates", f"{name}.observe.{setting} is to be tried here"
                metric = "pool" if name == "evaluate" else "some_metric"  # of what evaluate gives, which it checks
                overrides.append(f"stages.{name}.observe.gates.{metric}.min=0.5")
    after = tiny.plan(*overrides)
    assert all(after[name].instance.cfg.observe != planned.instance.cfg.observe for name, planned in before.items())
    assert {n: p.artifact.fingerprint for n, p in before.items()} == {
        n: p.artifact.fingerprint for n, p in after.items()
    }


def test_the_name_of_an_instance_is_no_part_of_its_identity(tiny: TinyPipeline, tmp_path: Path) -> None:
    made = tiny.run("clip")
    path = write_pipeline(tmp_path, tiny, tiny.shapes)
    text = path.read_text().replace("shard: {", "pictures: {kind: shard, ")
    path.write_text(text)
    shard, clip = (tiny.load().instances[name] for name in ("shard", "clip"))
    settings = clip.cfg.model_dump(mode="json")
    overrides = [f"stages.encoder={json.dumps({'kind': 'clip', 'inputs': {'shard': 'pictures'}, **settings})}"]
    overrides += [f"stages.pictures.{k}={json.dumps(v)}" for k, v in shard.cfg.model_dump(mode="json").items()]
    renamed = plan(load_pipeline(str(path), overrides))
    assert [(p.name, p.status) for p in renamed] == [("pictures", "cached"), ("encoder", "cached")]
    assert renamed[1].artifact == made


SETTINGS = {
    "shard.quality": st.integers(1, 100),
    "autoencoder.kl_weight": st.floats(1e-9, 1),
    "clip.train.seed": st.integers(0, 99),
    "features.batch_size": st.integers(1, 99),
    "prior.drop_text": st.floats(0, 0.99),
    "decoder.train.optim.kind": st.sampled_from(["adamw", "muon"]),
    "upsampler.noise_aug": st.floats(0, 0.99),
    "sample.seed": st.integers(0, 9),
    "evaluate.part_size": st.integers(1, 9),
}
NEEDS: dict[str, set[str]] = {
    "shard": set(),
    "autoencoder": {"shard"},
    "clip": {"shard"},
    "features": {"shard", "autoencoder", "clip"},
    "prior": {"features"},
    "decoder": {"autoencoder", "features"},
    "upsampler": {"shard"},
    "system": {"autoencoder", "clip", "prior", "decoder", "upsampler"},
    "sample": {"shard", "system"},
    "evaluate": {"shard", "sample", "autoencoder", "clip", "features", "prior", "decoder", "upsampler"},
}
"""The picture of the design, by hand."""


def downstream(name: str) -> set[str]:
    return {name}.union(*(downstream(later) for later, needs in NEEDS.items() if name in needs))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), st.data())
def test_a_setting_changes_its_stage_and_what_depends_on_it(
    tiny: TinyPipeline, setting: str, data: st.DataObject
) -> None:
    value = data.draw(SETTINGS[setting])
    name, *path = setting.split(".")
    before, after = tiny.plan(), tiny.plan(f"stages.{setting}={value}")
    changed = {n for n in before if before[n].artifact.fingerprint != after[n].artifact.fingerprint}
    same = reduce(getattr, path, before[name].instance.cfg) == value
    assert changed == (set() if same else downstream(name))


def test_a_moved_folder_is_the_same_and_a_new_caption_is_not(tiny: TinyPipeline, shapes: Path, tmp_path: Path) -> None:
    tiny.run("shard")
    copy = tmp_path / "shapes"
    shutil.copytree(shapes, copy)
    assert tiny.plan(f"stages.shard.source.path={copy}")["shard"].status == "cached"
    caption = copy / "small-red-bar.txt"
    stat = caption.stat()
    caption.write_text("a small green bar\n")
    os.utime(caption, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = tiny.plan(f"stages.shard.source.path={copy}")["shard"]
    assert (changed.status, changed.why) == ("run", "its source changed")


def write_pipeline(folder: Path, tiny: TinyPipeline, source: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        f"name: mine\nstore: {tiny.store}\nstages: {{shard: {{source: {{kind: folder, path: {source}}}}}}}\n"
    )
    return path


def test_only_takes_what_a_stage_needs(tiny: TinyPipeline) -> None:
    pipeline = tiny.load()
    assert [planned.name for planned in plan(pipeline, only=["clip"])] == ["shard", "clip"]
    assert [planned.name for planned in plan(pipeline, only=["upsampler", "prior"])] == [
        *("shard", "autoencoder", "clip", "features", "prior", "upsampler"),
    ]


def test_an_artifact_is_taken_by_its_uri(tiny: TinyPipeline) -> None:
    shard = tiny.run("shard", "stages.shard.quality=60")
    plans = plan(tiny.load(f"stages.clip.inputs.shard={shard.uri}"), only=["clip"])
    assert [planned.name for planned in plans] == ["clip"]
    assert plans[0].inputs == {"shard": shard}


@pytest.mark.parametrize("uri", ["none/here", "s3:/typo"])
def test_a_uri_without_an_artifact_is_refused(tiny: TinyPipeline, uri: str) -> None:
    message = told(tiny, f"stages.clip.inputs.shard={uri}")
    assert "stages.clip.inputs.shard" in message and uri in message


def test_an_artifact_of_another_kind_is_refused(tiny: TinyPipeline) -> None:
    clip = tiny.run("clip")
    message = told(tiny, f"stages.autoencoder.inputs.shard={clip.uri}")
    assert (
        f"stages.autoencoder.inputs.shard: takes an artifact of kind shards or samples, but {clip.uri} is of kind clip"
        in message
    )
    assert "shard, sample would fit" in message


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
    ],
)
def test_stages_that_do_not_fit(tiny: TinyPipeline, overrides: list[str], message: str) -> None:
    assert told(tiny, *overrides) == f"{SOURCE}: {message}"


def test_a_source_that_is_not_there(tiny: TinyPipeline, tmp_path: Path) -> None:
    assert told(tiny, f"stages.shard.source.path={tmp_path / 'none'}") == (
        f"{SOURCE}: stages.shard: source.path: the folder {tmp_path / 'none'} does not exist; give the folder that "
        "holds the images"
    )


def test_faults_of_the_whole_pipeline_come_together(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.load("stages.decodr={}", "stages.prior.model.widht=8", "stages.upsampler.train.samples=-1")
    widht, samples, decodr = sorted(str(error.value).splitlines(), key=lambda line: "widht" not in line)
    assert "stages.prior.model.widht" in widht and "'width'" in widht
    assert "stages.upsampler.train.samples" in samples + decodr and "'decoder'" in samples + decodr


def test_a_store_on_s3_needs_a_tracking_server(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.load("store=s3://bucket/prefix")
    assert str(error.value).endswith(f"{SOURCE}: tracking.uri: required when the store is on S3; name an MLflow server")


def test_a_damaged_manifest_stops_the_plan(tiny: TinyPipeline, tmp_path: Path) -> None:
    source = tiny.run("shard")
    store = tmp_path / "store"
    uri = artifacts.artifact_uri(str(store), "shards", source.fingerprint)
    shutil.copytree(source.uri, uri)
    assert tiny.plan(f"store={store}")["shard"].status == "cached"
    manifest = Path(uri, "manifest.json")
    manifest.write_text(manifest.read_text().replace('"samples_train"', '"samples_trian"'))
    with pytest.raises(ManifestError, match=re.escape(str(manifest))):
        tiny.plan(f"store={store}")


def test_a_swapped_artifact_is_refused_by_name(tiny: TinyPipeline, tmp_path: Path) -> None:
    """A copy of another artifact of the same stage at the address of this one is whole, and is not this one."""
    right, other = tiny.run("shard"), tiny.run("shard", "stages.shard.quality=80")
    store = tmp_path / "store"
    uri = artifacts.artifact_uri(str(store), "shards", right.fingerprint)
    shutil.copytree(other.uri, uri)
    with pytest.raises(ManifestError) as error:
        tiny.plan(f"store={store}")
    assert all(name in str(error.value) for name in (uri, right.fingerprint[:16], other.fingerprint[:16]))


def test_a_store_that_was_moved_is_whole(tiny: TinyPipeline, tmp_path: Path) -> None:
    tiny.run("features")
    store = tmp_path / "moved"
    shutil.copytree(Path(tiny.store) / "artifacts", store / "artifacts")
    moved = tiny.plan(f"store={store}")
    assert moved["features"].status == "cached"
    manifest = artifacts.read_manifest(moved["features"].artifact.uri)
    assert manifest is not None
    assert {role: a.uri for role, a in manifest.inputs.items()} == {
        role: a.uri for role, a in moved["features"].inputs.items()
    }, "inputs are found in the store that holds the artifact"


def test_a_manifest_gives_its_fingerprint_again(tiny: TinyPipeline) -> None:
    """From what is written, by hand: whoever has the manifest can derive it."""
    made = tiny.run("shard", "stages.shard.quality=80")
    record = json.loads(Path(made.uri, "manifest.json").read_text())
    identity = record["identity"]
    assert identity["stage"] == "shard" and identity["settings"]["quality"] == 80 and identity["source"]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == made.fingerprint == record["artifact"]["fingerprint"]


def test_the_nearest_artifact_explains_why(tiny: TinyPipeline) -> None:
    tiny.run("shard")
    tiny.run("shard", "stages.shard.quality=80")
    assert tiny.plan("stages.shard.quality=81")["shard"].why in ("quality: 95 -> 81", "quality: 80 -> 81")
    assert tiny.plan("stages.shard.quality=80", "stages.shard.split_seed=1")["shard"].why == "split_seed: 0 -> 1"
    many = tiny.plan(*(f"stages.shard.{s}" for s in ("quality=70", "split_seed=1", "image_size=40", "part_size=9")))
    assert many["shard"].why.endswith("; and 1 more")


def test_a_new_version_and_a_new_source_explain_why(tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from genpipe.stages import shard

    tiny.run("shard")
    monkeypatch.setattr(shard, "VERSION", shard.VERSION + 1)
    why = tiny.plan()["shard"].why
    assert f"{shard.VERSION - 1} -> {shard.VERSION}" in why and "version" in why


def test_a_thousand_artifacts_are_compared_without_listing_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lr in range(1000):
        settings = {"lr": lr}
        identity = artifacts.identity("thing", version=1, settings=settings, inputs={})
        uri = f"{tmp_path}/artifacts/thing/{lr}"
        made = artifacts.Artifact(kind="thing", uri=uri, fingerprint=artifacts.fingerprint(identity))
        artifacts.commit(made, identity=identity, config=settings, inputs={}, metrics={})
    listed: list[str] = []
    monkeypatch.setattr(LocalStorage, "list", lambda self, prefix="": listed.append(self.uri) or iter(()))
    wanted = artifacts.identity("thing", version=1, settings={"lr": -1}, inputs={})
    assert why_not(wanted, {"lr": -1}, store=str(tmp_path), kind="thing").endswith("-> -1")
    assert not listed


def test_artifacts_of_an_older_format_are_passed_over(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Format 1 had no identity, and lies where artifacts of some kinds still do."""
    folder = tmp_path / "store/artifacts/clip/0123456789abcdef"
    folder.mkdir(parents=True)
    old = {"format": 1, "artifact": {"kind": "clip", "uri": str(folder), "fingerprint": "0" * 64}, "version": 1}
    (folder / "manifest.json").write_text(json.dumps(old | {"config": {}, "inputs": {}, "digest": "0" * 64}))
    assert tiny.plan(f"store={tmp_path / 'store'}")["clip"].why == "not made yet"


def test_a_spec_is_what_the_plan_says(tiny: TinyPipeline) -> None:
    spec = tiny.spec("clip")
    planned = tiny.plan()["clip"]
    assert (spec.target, spec.inputs, spec.stage) == (planned.artifact, planned.inputs, "clip")
    assert spec.config == planned.instance.cfg.model_dump(mode="json")
    assert artifacts.fingerprint(spec.identity) == spec.target.fingerprint
    assert spec.tracking_uri == f"sqlite:///{tiny.store}/mlflow.db"


def test_a_step_must_divide_over_every_number_of_ranks_that_is_allowed(tiny: TinyPipeline) -> None:
    sizes = "stages.prior.train={global_batch_size: 24, micro_batch_size: 2}"
    fits = tiny.plan(sizes, "stages.prior.resources.workers=[2, 4]")
    assert fits["prior"].instance.cfg.resources.workers == (2, 4)
    assert fits["prior"].artifact.fingerprint == tiny.plan(sizes)["prior"].artifact.fingerprint
    refused = (
        r"stages.prior: resources.workers allows 2 to 5 ranks.* 24 is not a multiple of micro_batch_size 2 x 5 ranks"
    )
    with pytest.raises(ConfigError, match=rf"{refused} = 10; set global_batch_size to a multiple of 120, or"):
        tiny.plan(sizes, "stages.prior.resources.workers=[2, 5]")
    with pytest.raises(ConfigError, match=r"resources.*workers: \(4, 2\); give a number from 1 on, or \[least, most\]"):
        tiny.plan("stages.prior.resources.workers=[4, 2]")


def test_a_validator_is_asked_for_where_it_has_something_to_do(tiny: TinyPipeline) -> None:
    beside = ("stages.prior.observe.validate_every=64", "stages.prior.resources.validation={cpus: 2}")
    planned = tiny.plan(*beside)["prior"]
    assert planned.instance.cfg.resources.taken(3) == {"CPU": 5.0, "GPU": 0.0}
    assert planned.artifact.fingerprint == tiny.plan()["prior"].artifact.fingerprint
    refused = {
        "observe.validate_every is 0": "stages.prior.observe.validate_every=0",
        "train.best decides by what validation finds": "stages.prior.train.best={every: 64}",
        "observe.keep_best decides by what validation finds": "stages.prior.observe.keep_best={metric: loss}",
        r"0, where each worker has 1; on another kind of device": "stages.prior.resources.gpus=1",
        "this stage trains nothing": "stages.shard.resources.validation={}",
    }
    for said, setting in refused.items():
        with pytest.raises(ConfigError, match=said):
            tiny.plan(*beside, setting)
