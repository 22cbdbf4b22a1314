"""What the stages leave behind: weights, statistics and features that mean what they say, numbers that recur."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.generation.conditions import Text
from genpipe.generation.systems import load_system
from genpipe.stages import is_training, load_stage, upsampler
from genpipe.storage import open_storage
from genpipe.training.objective import Batch
from genpipe.weights import MODELS, load_weights, save_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
TRAINED = ("autoencoder", "clip", "prior", "decoder", "upsampler")


@pytest.fixture(scope="module")
def made(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Every artifact of a whole run."""
    tiny.run("evaluate")
    return {name: planned.artifact for name, planned in tiny.plan().items()}


def folder(artifact: Artifact) -> Path:
    return artifacts.fetch(artifact)


def metrics(artifact: Artifact) -> dict[str, float]:
    return artifacts.verify(artifact.uri).metrics


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_stage_builds_its_parts(tiny: TinyPipeline, made: dict[str, Artifact], name: str) -> None:
    spec = tiny.spec(name)
    stage = load_stage(name)
    cfg = stage.Config.model_validate(spec.config)
    objective = stage.objective(cfg, spec.inputs, CPU)
    assert is_training(stage)
    assert set(objective.active(0)) <= objective.trainable.keys()
    assert next(iter(objective.trainable)) == name, "the part that is exported bears the stage's name"
    assert all(p.dtype == torch.float32 for module in objective.trainable.values() for p in module.parameters())
    data = stage.data(cfg, spec.inputs)
    assert {"train": data.train.length, "heldout": data.heldout.length} == made["shard"].meta["samples"]


@pytest.mark.parametrize("name", TRAINED)
def test_batches_depend_on_the_position_alone(tiny: TinyPipeline, made: dict[str, Artifact], name: str) -> None:
    spec = tiny.spec(name)
    stage = load_stage(name)
    train = stage.data(stage.Config.model_validate(spec.config), spec.inputs).train
    indices, positions = np.arange(6), np.arange(100, 106)
    whole = samples(train.collate(indices, positions))
    parts = [samples(train.collate(indices[part], positions[part])) for part in (slice(0, 2), slice(2, 6))]
    for one, other in zip(whole, [*parts[0], *parts[1]], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def samples(batch: Batch) -> list[Batch]:
    """Each sample of a batch, without the padding that depends on the others'; captions' tokens gathered to theirs."""
    apart = dict(batch)
    if (places := apart.pop("text_places", None)) is not None:
        encodings = apart.pop("text_encodings")
        apart["tokens"] = [encodings[row[row >= 0]] for row in places]
    if "tokens" in batch:
        apart["tokens"] = [row[row != 0] for row in batch["tokens"]]
    return [{key: values[i] for key, values in apart.items()} for i in range(len(next(iter(batch.values()))))]


@pytest.mark.parametrize("name", TRAINED)
def test_weights_come_back_as_they_went(made: dict[str, Artifact], name: str, tmp_path: Path) -> None:
    module, extra = load_weights(folder(made[name]), kind=name, device=CPU)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    stored = load_file(folder(made[name]) / "weights.safetensors")
    assert stored.keys() == module.state_dict().keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in module.state_dict().items())
    config = TypeAdapter(MODELS[name][1]).validate_python(artifacts.verify(made[name].uri).config["model"])
    sizes = {
        "autoencoder": {},
        "clip": {
            "vocab_size": module.text_tower.tokens.num_embeddings if name == "clip" else 0,
            "context_length": 16,
            "eot_id": 2,
        },
        "prior": {"embed_dim": 16, "text_width": 32},
        "decoder": {"latent_channels": 4, "embed_dim": 16, "text_width": 32},
        "upsampler": {},
    }[name]
    save_weights(module, tmp_path, kind=name, config=config, sizes=sizes, extra=extra)
    again = load_weights(tmp_path, kind=name, device=CPU)
    assert again.extra == extra
    assert all(torch.equal(stored[key], tensor) for key, tensor in again.module.state_dict().items())


def test_weights_that_do_not_fit_are_refused(made: dict[str, Artifact], tmp_path: Path) -> None:
    source = folder(made["prior"])
    with pytest.raises(ValueError, match="holds the weights of a prior, not of a decoder"):
        load_weights(source, kind="decoder", device=CPU)
    (tmp_path / "model.json").write_bytes((source / "model.json").read_bytes())
    stored = load_file(source / "weights.safetensors")
    stored["query_M"] = stored["query_M"][:3].clone()
    save_file(stored, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors: does not fit model.json beside it: [\s\S]*query_M"):
        load_weights(tmp_path, kind="prior", device=CPU)


def test_exported_weights_are_the_average_and_not_the_last(tiny: TinyPipeline, made: dict[str, Artifact]) -> None:
    """With no memory the average is the last weights; the stage's memory must give others, from the same training."""
    forgetful = tiny.run("upsampler", "stages.upsampler.train.ema_decay=0")
    one, other = (load_file(folder(a) / "weights.safetensors") for a in (made["upsampler"], forgetful))
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def exact_features(tiny: TinyPipeline) -> Artifact:
    """The cache of encoders that ran in fp32, whatever this machine is fast at."""
    return tiny.run("features", "stages.features.precision=fp32")


def test_latents_are_standardized_over_the_training_images(made: dict[str, Artifact], exact_features: Artifact) -> None:
    """Their samples are: what the means vary and what the posteriors spread add up to 1 (law of total variance)."""
    dataset = FeatureDataset(folder(exact_features), split="train")
    values = dataset.latents(np.arange(len(dataset))).double()
    assert values.shape[1:] == (4, 8, 8)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(4).double(), atol=2e-3, rtol=0)
    autoencoder = load_weights(folder(made["autoencoder"]), kind="autoencoder", device=CPU).module
    images = image_batch(ShardDataset(folder(made["shard"]), split="train"), np.arange(len(dataset)), size=16)
    with torch.no_grad():
        _, logvar = autoencoder.encode(to_float(images))
    std = torch.tensor(made["autoencoder"].meta["latent_std"]).double()
    spread = logvar.double().exp().mean((0, 2, 3)) / std.square()
    total = values.var((0, 2, 3), correction=0) + spread
    torch.testing.assert_close(total, torch.ones(4).double(), atol=2e-3, rtol=0)


def test_embeddings_standardize_with_the_statistics_in_the_manifest(made: dict[str, Artifact]) -> None:
    features = FeatureDataset(folder(made["features"]), split="train")
    embeds = features.image_embeds(np.arange(len(features))).double()
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)).double(), atol=2e-3, rtol=0)
    meta = made["clip"].meta
    assert {key: made["features"].meta[key] for key in ("image_embed_mean", "image_embed_std", "tokenizer")} == {
        key: meta[key] for key in ("image_embed_mean", "image_embed_std", "tokenizer")
    }
    mean, std = (torch.tensor(meta[f"image_embed_{name}"], dtype=torch.float64) for name in ("mean", "std"))
    torch.testing.assert_close(mean, embeds.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, embeds.std(0, correction=0), atol=1e-3, rtol=0)


def test_features_are_what_the_encoders_say_of_the_same_rows(
    made: dict[str, Artifact], exact_features: Artifact
) -> None:
    autoencoder = load_weights(folder(made["autoencoder"]), kind="autoencoder", device=CPU).module
    clip = load_weights(folder(made["clip"]), kind="clip", device=CPU).module
    tokenizer = CaptionTokenizer.load(folder(made["clip"]) / "tokenizer.json")
    assert tokenizer.digest == made["clip"].meta["tokenizer"]
    mean, std = (torch.tensor(made["autoencoder"].meta[f"latent_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    for split in ("train", "heldout"):
        shards = ShardDataset(folder(made["shard"]), split=split)
        features = FeatureDataset(folder(exact_features), split=split)
        features.verify_alignment(shards)
        rows = np.random.default_rng(0).permutation(len(shards))[:7]
        images = to_float(image_batch(shards, rows, size=16))
        tokens = tokenizer.encode_batch([shards.captions(int(i))[0] for i in rows], context_length=16)
        with torch.no_grad():
            latents, _ = autoencoder.encode(images)
            text_embeds, encodings = clip.encode_text(torch.from_numpy(tokens))
            image_embeds = clip.encode_image(images)
        text = features.text(rows, np.zeros_like(rows))
        close: dict[str, Any] = {"atol": 2e-3, "rtol": 2e-3}  # the cache is float16
        torch.testing.assert_close(features.latents(rows).float(), (latents - mean) / std, **close)
        torch.testing.assert_close(features.image_embeds(rows).float(), image_embeds, **close)
        torch.testing.assert_close(text["text_embeds"].float(), text_embeds, **close)
        real = torch.from_numpy(tokens != 0)[:, : int((tokens != 0).sum(1).max())]
        padded = Text.from_cache(text)
        assert torch.equal(padded.text_mask, real)
        expected = torch.where(real[..., None], encodings[:, : real.shape[1]], 0)
        torch.testing.assert_close(padded.encodings, expected, **close)


def test_an_interrupted_data_stage_goes_on_with_the_next_part(tiny: TinyPipeline, made: dict[str, Artifact]) -> None:
    """Finished parts are kept: a second attempt does the others only, and gives the same files."""
    override = "stages.features.batch_size=7"
    spec = tiny.spec("features", override)
    stage = load_stage("features")
    cfg = stage.Config.model_validate(spec.config)
    first, *_ = stage.parts(cfg, spec.inputs)
    out = tiny.store / "part"
    out.mkdir()
    stats = stage.Worker(cfg, spec.inputs)(first, out)
    artifacts.add_part(spec.target.uri, first, out, stats)
    marker = Path(spec.target.uri, first, "latents.npy").stat().st_mtime_ns
    finished = tiny.run("features", override)
    assert Path(finished.uri, first, "latents.npy").stat().st_mtime_ns == marker
    one, other = (artifacts.verify(a.uri) for a in (finished, made["features"]))
    assert [file.path for file in one.files] == [file.path for file in other.files]


def test_a_decoder_may_give_dropped_captions_the_encoders_own_null_text(
    tiny: TinyPipeline, made: dict[str, Artifact]
) -> None:
    unet = "{kind: unet, width: 16, multipliers: [1, 2], attention_at: [2], head_width: 16, groups: 8, blocks: 1}"
    settings = (f"stages.decoder.model={{denoiser: {unet}, null_text: encoder}}", "stages.decoder.train.samples=32")
    decoder = load_weights(folder(tiny.run("decoder", *settings)), kind="decoder", device=CPU).module
    null = FeatureDataset(folder(made["features"]), split="train").null_text()
    expected = null["text_encodings"].float()
    assert torch.equal(decoder.null_encoding_W, expected) and expected.any()


def test_an_upsampler_may_draw_latents(tiny: TinyPipeline, made: dict[str, Artifact]) -> None:
    """Of images twice as large as those that the autoencoder was trained on."""
    settings = ("stages.upsampler.target=latents", "stages.upsampler.train.samples=32")
    assert tiny.run("upsampler", *settings).meta["autoencoder"] == made["autoencoder"].fingerprint
    system: Any = load_system(tiny.run("system", *settings), device=CPU)
    low = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = system.cascade.enlarge(low, generator=torch.Generator().manual_seed(0))[-1]
    assert large.shape == (2, 3, 32, 32) and large.isfinite().all()


def test_a_stage_is_the_same_twice(tiny: TinyPipeline, made: dict[str, Artifact], tmp_path: Path) -> None:
    """Training again from nothing gives the same bytes (one process, CPU)."""
    again = type(tiny)(tmp_path / "store", tiny.shapes)
    tracking = f"tracking.uri=sqlite:///{tiny.store}/mlflow.db"  # another would take seconds to make
    for name in ("shard", "autoencoder", "clip"):
        one, other = (artifacts.verify(a.uri) for a in (made[name], again.run(name, tracking)))
        assert [(f.path, f.sha256) for f in one.files] == [(f.path, f.sha256) for f in other.files]
        assert one.artifact.fingerprint == other.artifact.fingerprint


def test_stages_run_on_a_store_in_s3(
    tiny: TinyPipeline,
    made: dict[str, Artifact],
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts, checkpoints, commits and inputs all go through the server; the bytes are those of a local run."""
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    remote = type(tiny)(f"s3://genpipe/{tmp_path.name}", tiny.shapes)
    settings = (f"tracking.uri=sqlite:///{tiny.store}/mlflow.db", "stages.clip.resources.checkpoint_seconds=0.01")
    for name in ("shard", "clip"):
        one, other = (artifacts.verify(a.uri) for a in (made[name], remote.run(name, *settings)))
        assert [(f.path, f.sha256) for f in one.files] == [(f.path, f.sha256) for f in other.files]
    assert {planned.status for planned in list(remote.plan(*settings).values())[:3:2]} == {"cached"}
    assert list(open_storage(f"{remote.store}/work").list()) == [], "checkpoints and progress are gone"


def test_shrinking_is_the_mean_of_boxes_on_the_8_bit_grid() -> None:
    images = torch.tensor([[[[0.0, 0.5, -1.0, -1.0], [0.5, 1.0, -1.0, 1.0]]]]).repeat(1, 3, 2, 1)
    small = upsampler.shrink(images, size=2)
    expected = torch.tensor([0.5, -0.5])
    torch.testing.assert_close(small[0, 0], expected.expand(2, 2), atol=1 / 255, rtol=0)
    grid = (small + 1) * 127.5
    torch.testing.assert_close(grid, grid.round(), atol=1e-4, rtol=0)


def test_crops_are_the_same_squares_of_every_tensor() -> None:
    place = torch.arange(5 * 20 * 30).view(5, 1, 20, 30).float()
    one, other = upsampler.random_crops(
        [place, torch.cat([place + 0.5, place], 1)], side=7, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(one[:, 0] + 0.5, other[:, 0])
    assert torch.equal(one[:, 0], other[:, 1])
    for sample, crop in zip(place, one, strict=True):
        corner = int(crop[0, 0, 0] - sample[0, 0, 0])
        top, left = divmod(corner, 30)
        assert torch.equal(crop, sample[:, top : top + 7, left : left + 7])


def test_crops_reach_every_place() -> None:
    place = torch.arange(9).view(1, 1, 3, 3).float().repeat(400, 1, 1, 1)
    (crops,) = upsampler.random_crops([place], side=2, generator=torch.Generator().manual_seed(0))
    assert {int(crop[0, 0, 0]) for crop in crops} == {0, 1, 3, 4}
