"""Trained parts' own validations once more: the numbers of training, and better than without any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from gallery import measured

from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset
from genpipe.diffusion.process import FIXED_TIMES
from genpipe.evaluation.fidelity import psnr
from genpipe.evaluation.metrics.heldout import HeldoutConfig

if TYPE_CHECKING:
    from conftest import TinyPipeline

LONGER = [
    "stages.clip.train.samples=4096",
    "stages.prior.train.samples=12800",
    "stages.decoder.train.samples=5120",
    "stages.upsampler.train.samples=10240",
]
TRAINED = ("autoencoder", "clip", "prior", "decoder", "upsampler")


@pytest.fixture(scope="module")
def trained(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Every part of the tiny pipeline, trained for a little longer."""
    return {name: tiny.run(name, *LONGER) for name in TRAINED}


@pytest.fixture(scope="module")
def found(trained: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the metric finds."""
    inputs = {f"trained.{number}": artifact for number, artifact in enumerate(trained.values())}
    return measured(HeldoutConfig(), inputs, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def heldout(found: dict[str, float]) -> dict[str, dict[str, float]]:
    """The same by part."""
    split = [(*name.split("/", 1), value) for name, value in found.items()]
    return {part: {name: value for of, name, value in split if of == part} for part in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
def test_the_numbers_are_those_that_training_ended_with(
    trained: dict[str, Artifact], heldout: dict[str, dict[str, float]], name: str
) -> None:
    """The committed weights, loaded anew, on the same held-out samples with the same noise."""
    manifest = read_manifest(trained[name].uri)
    assert manifest is not None and manifest.metrics
    assert heldout[name] == pytest.approx(manifest.metrics, rel=1e-6)


def test_several_of_a_kind_are_numbered(trained: dict[str, Artifact], tmp_path: Path) -> None:
    parts = [trained["autoencoder"], trained["prior"], trained["autoencoder"]]
    inputs = {f"trained.{number}": artifact for number, artifact in enumerate(parts)}
    names = {name.split("/")[0] for name in measured(HeldoutConfig(), inputs, tmp_path)}
    assert names == {"autoencoder.0", "prior", "autoencoder.1"}
    assert HeldoutConfig().names(inputs) == ["autoencoder.0/*", "prior/*", "autoencoder.1/*"]


def test_what_was_not_trained_is_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was made by features, which trains nothing"):
        measured(HeldoutConfig(), {"trained.0": tiny.run("features")}, tmp_path)


def images(tiny: TinyPipeline, split: str) -> torch.Tensor:
    """The images of a split at 16 px, in [-1, 1]."""
    dataset = ShardDataset(fetch(tiny.run("shard")), split=split)  # type: ignore[arg-type]
    return to_float(image_batch(dataset, np.arange(len(dataset)), size=16))


def test_the_autoencoder_beats_the_mean_image(tiny: TinyPipeline, heldout: dict[str, dict[str, float]]) -> None:
    mean, real = images(tiny, "train").mean(0, keepdim=True), images(tiny, "heldout")
    assert heldout["autoencoder"]["psnr"] > psnr(mean.expand_as(real), real).mean().item() + 3


def test_clip_beats_chance(heldout: dict[str, dict[str, float]]) -> None:
    found = heldout["clip"]
    assert found["image_to_text_r1"] > 2 / found["pool"] and found["text_to_image_r1"] > 2 / found["pool"]


def test_the_prior_beats_other_captions_and_none(heldout: dict[str, dict[str, float]]) -> None:
    found = heldout["prior"]
    assert found["cosine"] > found["cosine_unrelated"] + 0.1
    assert found["cosine"] > found["cosine_unconditional"] + 0.1


def test_the_decoder_beats_the_best_linear_denoiser(tiny: TinyPipeline, heldout: dict[str, dict[str, float]]) -> None:
    """One that knows mean and variance of each value of the latents, and predicts the velocity from x_t."""
    features = fetch(tiny.run("features", *LONGER))
    train, real = (
        dataset.latents(np.arange(len(dataset))).float()
        for dataset in (FeatureDataset(features, split=split) for split in ("train", "heldout"))  # type: ignore[arg-type]
    )
    mean, variance = train.mean(0), train.var(0)
    errors = []
    for t in FIXED_TIMES:
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
        x_t = (1 - t) * real + t * noise
        gain = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)  # cov(noise - x0, x_t) / var(x_t)
        velocity = -mean + gain * (x_t - (1 - t) * mean)
        errors.append((velocity - (noise - real)).square().mean().item())
    assert heldout["decoder"]["loss"] < np.mean(errors)


def test_the_upsampler_beats_bicubic_enlargement(heldout: dict[str, dict[str, float]]) -> None:
    assert heldout["upsampler"]["psnr"] > heldout["upsampler"]["psnr_bicubic"]
