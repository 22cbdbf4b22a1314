"""The features stage on the tiny pipeline: variants, spread, damage, several sources, and caches that are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.order import caption_draws
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.data.train_sets import cached_data, example_features
from genpipe.generation.conditions import Statistics
from genpipe.launch.local import run_local
from genpipe.lineage import check_lineage, check_made_from
from genpipe.models.text_encoders import load_text_encoder, write_record
from genpipe.pipeline.spec import StageSpec
from genpipe.stages import features, load_stage
from genpipe.weights import load_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Features with mirror images and variances, and what they were made from."""
    changes = ("flip=true", "latent_samples=true", "dtype=float32", "precision=fp32")
    settings = [f"stages.features.{change}" for change in changes]
    artifact = tiny.run("features", *settings)
    return {**{name: planned.artifact for name, planned in tiny.plan(*settings).items()}, "features": artifact}


def test_mirror_images_and_variances_are_the_encoders(made: dict[str, Artifact]) -> None:
    autoencoder = load_weights(Path(made["autoencoder"].uri), kind="autoencoder", device=CPU).module
    clip = load_weights(Path(made["clip"].uri), kind="clip", device=CPU).module
    dataset = FeatureDataset(Path(made["features"].uri), split="train")
    assert dataset.variants == 2 and dataset.has_spread
    rows = np.array([5, 0, 11])
    images = to_float(image_batch(ShardDataset(Path(made["shard"].uri), split="train"), rows, size=16))
    mean, std = (torch.tensor(made["autoencoder"].meta[f"latent_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    noise = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32)
    close = {"atol": 1e-4, "rtol": 1e-4}
    for variant, seen in enumerate((images, images.flip(-1))):
        variants = np.full(3, variant)
        with torch.no_grad():
            latents, logvar = autoencoder.encode(seen)
            embeds = clip.encode_image(seen)
        torch.testing.assert_close(dataset.latents(rows, variants=variants), (latents - mean) / std, **close)
        torch.testing.assert_close(dataset.image_embeds(rows, variants=variants), embeds, **close)
        sampled = dataset.latent_samples(rows, noise=noise, variants=variants)
        expected = (latents + (logvar / 2).exp() * torch.from_numpy(noise) - mean) / std
        torch.testing.assert_close(sampled, expected, **close)


def test_numbers_that_the_cache_cannot_hold_are_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    spec = tiny.spec("features")
    worker = features.Worker(features.Config.model_validate(spec.config), spec.inputs)
    part = features.parts(worker.cfg, spec.inputs)[0]
    worker(part, tmp_path)
    worker.statistics = Statistics(worker.statistics.mean, 1e-6 * worker.statistics.std)
    with pytest.raises(ValueError, match=r"^latents: not all are finite in float16 \(.* is [\d.]+e\+06\); set dtype"):
        worker(part, tmp_path)


def test_the_empty_caption_is_cached(made: dict[str, Artifact]) -> None:
    clip = load_weights(Path(made["clip"].uri), kind="clip", device=CPU).module
    tokens = CaptionTokenizer.load(Path(made["clip"].uri, "tokenizer.json")).encode_batch([""], context_length=16)
    with torch.no_grad():
        embed, encodings = clip.encode_text(torch.from_numpy(tokens))
    text = FeatureDataset(Path(made["features"].uri), split="train").null_text()
    torch.testing.assert_close(text["text_embeds"], embed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text["text_encodings"], encodings[0, :2], atol=1e-5, rtol=1e-5)
    assert text["text_places"].tolist() == [[0, 1]], "begin and end of text"


def test_training_takes_either_image_and_a_new_sample_each_time(made: dict[str, Artifact]) -> None:
    """By the position alone; held-out batches are the means of the images as they are."""
    data = cached_data(made, arrays=("latents", "image_embeds"), seed=3)
    dataset = FeatureDataset(Path(made["features"].uri), split="train")
    index, positions = np.zeros(200, np.int64), np.arange(1000, 1200)
    batch = data.train.collate(index, positions)
    both = [dataset.image_embeds(index[:1], variants=np.array([v]))[0] for v in (0, 1)]
    taken = [int(torch.equal(embed, both[1])) for embed in batch["image_embeds"]]
    assert all(torch.equal(embed, both[v]) for embed, v in zip(batch["image_embeds"], taken, strict=True))
    assert 60 < sum(taken) < 140
    means = torch.stack([dataset.latents(index[:1], variants=np.array([v]))[0] for v in (0, 1)])[taken]
    differences = (batch["latents"] - means).flatten(1)
    assert (differences.std(1) > 0).all() and torch.pdist(differences).min() > 0
    part = data.train.collate(index[7:9], positions[7:9])
    assert all(torch.equal(part[name], batch[name][7:9]) for name in ("latents", "image_embeds", "text_embeds"))
    held = FeatureDataset(Path(made["features"].uri), split="heldout")
    first = data.heldout.collate(np.array([2, 1]), np.array([0, 1]))
    assert torch.equal(first["latents"], held.latents(np.array([2, 1])))
    assert torch.equal(first["image_embeds"], held.image_embeds(np.array([2, 1])))


def copied(artifact: Artifact, folder: Path) -> Artifact:
    shutil.copytree(artifact.uri, folder)
    return artifact.model_copy(update={"uri": str(folder)})


def committed_anew(artifact: Artifact) -> Artifact:
    """The manifest over what lies in the folder now, as if a stage had made it: the same fingerprint."""
    folder, manifest = Path(artifact.uri), artifacts.read_manifest(artifact.uri, check_files=False)
    assert manifest is not None
    (folder / artifacts.MANIFEST).unlink()
    identity = manifest.identity
    return artifacts.commit(artifact, folder=folder, identity=identity, config={}, inputs={}, metrics={})


@pytest.mark.parametrize(
    ("name", "file"), [("autoencoder", "weights.safetensors"), ("clip", "weights.safetensors"), ("shard", "*.tar")]
)
def test_a_cache_of_other_weights_or_shards_is_refused(
    made: dict[str, Artifact], tmp_path: Path, name: str, file: str
) -> None:
    """Made again with the same configuration, so that the fingerprint is the same, but with another outcome."""
    check_made_from(made)
    other = copied(made[name], tmp_path / name)
    path = next(Path(other.uri).glob(file))
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(bytes(data))
    inputs = {**made, name: committed_anew(other)}
    check_lineage(inputs)
    with pytest.raises(ValueError) as error:
        cached_data(inputs, arrays=("latents",), seed=0)
    told = str(error.value)
    assert f"{made['features'].uri} was made from another {name} (" in told
    assert f"{tmp_path / name} holds" in told and f"restore the {name} it was made from" in told


def test_a_cache_of_another_configuration_is_refused(tiny: TinyPipeline, made: dict[str, Artifact]) -> None:
    other = tiny.run("shard", "stages.shard.quality=80")
    with pytest.raises(ValueError, match=r"features was made with shard \w{12}, but shard here is \w{12}"):
        check_lineage({"features": made["features"], "shard": other})


def features_of(tiny: TinyPipeline, folder: Path, inputs: dict[str, Artifact], *overrides: str) -> StageSpec:
    """The stage on other inputs, to be committed in `folder`."""
    spec = tiny.spec("features", *overrides)
    identity = artifacts.identity("features", version=features.VERSION, settings={}, inputs=inputs, source=str(folder))
    target = Artifact(
        kind="features",
        uri=str(folder / "features"),
        fingerprint=artifacts.fingerprint(identity),
        meta=features.check_inputs(features.Config.model_validate(spec.config), inputs),
    )
    return spec.model_copy(update={"inputs": inputs, "target": target, "identity": identity})


def test_a_damaged_image_is_stood_in_for_and_told_of(
    tiny: TinyPipeline, made: dict[str, Artifact], tmp_path: Path
) -> None:
    shard = copied(made["shard"], tmp_path / "shard")
    dataset = ShardDataset(Path(shard.uri), split="train")
    name = dataset.shards()[0]
    offset = pq.read_table(Path(shard.uri, f"{name}.index.parquet"))["offset"][4].as_py()
    with Path(shard.uri, f"{name}.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(bytes(100))
    shard = committed_anew(shard)
    inputs = {"shard": shard, "autoencoder": made["autoencoder"], "clip": made["clip"]}

    artifact = run_local(features_of(tiny, tmp_path, inputs, "stages.features.max_bad_share=0.1"))
    cache = FeatureDataset(Path(artifact.uri), split="train")
    cache.verify_alignment(dataset)
    both = cache.latents(np.array([4, 5])), cache.text(np.array([4, 5]), np.zeros(2))["text_embeds"]
    assert all(torch.equal(one, other) for one, other in both)
    assert not torch.equal(*cache.latents(np.array([5, 6])))
    (reject,) = pq.read_table(Path(artifact.uri, features.BAD_SAMPLES)).to_pylist()
    assert (reject["key"], reject["source"], reject["reason"]) == (dataset.key(4), f"{name}.tar", "not_an_image")
    assert artifacts.verify(artifact.uri).metrics["bad_samples"] == 1

    with pytest.raises(ValueError) as error:
        run_local(features_of(tiny, tmp_path / "strict", inputs))
    assert f"1 of 60 images are damaged, the first {dataset.key(4)} in {name}.tar" in str(error.value)
    assert "or raise max_bad_share (0.01)" in str(error.value)


def test_samples_of_the_latents_have_deviation_one(made: dict[str, Artifact]) -> None:
    """The law of total variance over all that is cached: images and their mirror images have the same."""
    folder = Path(made["features"].uri)
    means, logvars = (
        np.concatenate([np.load(path) for path in sorted(folder.glob(f"train-*/{name}.npy"))])[:, 0].astype(np.float64)
        for name in ("latents", "latent_logvars")
    )
    np.testing.assert_allclose(means.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(means.var((0, 2, 3)) + np.exp(logvars).mean((0, 2, 3)), 1, atol=1e-5)


def test_parts_at_once_change_nothing(
    tiny: TinyPipeline, made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: made[name] for name in ("shard", "autoencoder", "clip")}
    files = []
    for at_once in (1, features.Worker.parts_at_once):
        monkeypatch.setattr(features.Worker, "parts_at_once", at_once)
        spec = features_of(tiny, tmp_path / str(at_once), inputs, "stages.features.batch_size=8")
        files.append(artifacts.verify(run_local(spec).uri).files)
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A T5 at random weights, whose context of 4 tokens cuts "a large red circle"."""
    pytest.importorskip("transformers")
    from models.test_text_encoders import config, write_t5

    folder = tmp_path_factory.mktemp("t5")
    cfg = config(write_t5(folder), context_length=4)
    write_record(cfg, folder)
    identity = artifacts.identity("text_encoder", version=1, settings={}, inputs={}, source=str(folder))
    meta = {"text_width": 32, "context_length": 4}
    made = Artifact(kind="text_encoder", uri=str(folder), fingerprint=artifacts.fingerprint(identity), meta=meta)
    return artifacts.commit(made, folder=folder, identity=identity, config={}, inputs={}, metrics={})


@pytest.mark.parametrize(
    ("encoders", "held"),
    [
        (("autoencoder",), {"latents", "labels"}),
        (("clip",), {"image_embeds", "text_embeds", "text_encodings", "text_places", "labels"}),
        (("text_encoder",), {"text_encodings", "text_places", "labels"}),
        (("autoencoder", "text_encoder"), {"latents", "text_encodings", "text_places", "labels"}),
        (
            ("autoencoder", "clip", "text_encoder"),
            {"latents", "image_embeds", "text_embeds", "text_encodings", "text_places", "labels"},
        ),
    ],
)
def test_the_cache_holds_what_the_encoders_give(
    tiny: TinyPipeline,
    made: dict[str, Artifact],
    text_encoder: Artifact,
    tmp_path: Path,
    encoders: tuple[str, ...],
    held: set[str],
) -> None:
    """Labels with any; text encodings are the text encoder's where there is one."""
    shard = labeled(made["shard"], tmp_path / "shard")
    every = {**made, "text_encoder": text_encoder, "shard": shard}
    artifact = run_local(features_of(tiny, tmp_path, {name: every[name] for name in ("shard", *encoders)}))
    meta = artifact.meta
    data = cached_data({"features": artifact}, arrays=("latents", "image_embeds"), seed=0)
    batch = data.train.collate(np.arange(6), np.arange(6))
    assert batch.keys() == held
    assert batch["labels"].tolist() == [2, 0, 1, 2, 0, 1] and meta["classes"] == ["a", "b", "c"]
    example = example_features({"features": artifact}, arrays=("latents", "image_embeds"), batch_size=6)
    assert example.keys() == held
    for name in held - {"text_encodings", "text_places"}:
        assert (example[name].shape, example[name].dtype) == (batch[name].shape, batch[name].dtype)
    assert ("latent_std" in meta, "embed_dim" in meta) == ("autoencoder" in encoders, "clip" in encoders)
    metrics = artifacts.verify(artifact.uri).metrics
    if "text_encoder" in encoders:
        assert (meta["text_width"], meta["context_length"]) == (32, 4)
        assert metrics["captions_cut"] == metrics["captions"] > 0
        captions = [ShardDataset(Path(shard.uri), split="train").captions(i)[0] for i in range(6)]
        encodings, _ = load_text_encoder(Path(text_encoder.uri), device=CPU).encode(captions)
        found = batch["text_encodings"][batch["text_places"]].float()
        torch.testing.assert_close(found, encodings, atol=2e-3, rtol=2e-3)
    else:
        assert metrics["captions_cut"] == 0
    null = FeatureDataset(Path(artifact.uri), split="train")
    assert ("text_width" in meta) == (Path(artifact.uri) / "null_text").exists()
    if "text_width" in meta:
        assert null.null_text().keys() == held & {"text_embeds", "text_encodings", "text_places"}


def labeled(shard: Artifact, folder: Path) -> Artifact:
    """Its samples in classes 2, 0, 1, 2, ... as their index has it."""
    made = copied(shard, folder)
    for path in folder.glob("*.index.parquet"):
        table = pq.read_table(path)
        labels = pa.array((np.arange(len(table)) + 2) % 3, pa.int32())
        pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", labels), path)
    return committed_anew(made.model_copy(update={"meta": {**made.meta, "classes": ["a", "b", "c"]}}))


def test_a_cache_of_no_encoder_is_refused(made: dict[str, Artifact]) -> None:
    with pytest.raises(ValueError, match="name an autoencoder, a clip or a text_encoder"):
        features.check_inputs(features.Config(), {"shard": made["shard"]})


def test_sources_and_caption_weights_reach_training(
    tiny: TinyPipeline, made: dict[str, Artifact], tmp_path: Path
) -> None:
    """The second shard is of another source, and of its samples' two captions the second counts nine times."""
    shard = copied(made["shard"], tmp_path / "shard")
    folder = Path(shard.uri)
    first, second = sorted(folder.glob("train-*.index.parquet"))[:2]
    for path, source in ((first, "drawn"), (second, "traced")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["source"] = source
            if source == "traced":
                row["captions"], row["caption_weights"] = [row["captions"][0], "a shape"], [1.0, 9.0]
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    for path in folder.glob("heldout-*.index.parquet"):
        rows = [row | {"source": "drawn"} for row in pq.read_table(path).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    shard = committed_anew(shard)
    inputs = {"shard": shard, "autoencoder": made["autoencoder"], "clip": made["clip"]}

    artifact = run_local(features_of(tiny, tmp_path, inputs))
    stage = load_stage("prior")
    cfg = stage.Config.model_validate(tiny.spec("prior").config)
    train = stage.data(cfg, {"features": artifact}).train
    counts = [pq.read_metadata(path).num_rows for path in (first, second)]
    assert dict(train.sources) == {"drawn": range(counts[0]), "traced": range(counts[0], sum(counts))}
    last = np.full(1000, train.length - 1)
    batch = train.collate(last, np.arange(1000))
    cache = FeatureDataset(Path(artifact.uri), split="train")
    second_caption = cache.text(last[:1], np.array([0.5]))["text_embeds"][0]
    chosen = (batch["text_embeds"] == second_caption).all(1).numpy()
    assert (chosen == (caption_draws(np.arange(1000), seed=cfg.train.seed) >= 0.1)).all()
    assert 0.85 < chosen.mean() < 0.95
