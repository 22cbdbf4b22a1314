"""Every stage at the smallest size beats, on held-out data, what anybody could do without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from genpipe.artifacts import fetch, read_manifest
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset
from genpipe.diffusion.process import FIXED_TIMES
from genpipe.evaluation.fidelity import psnr

if TYPE_CHECKING:
    from conftest import TinyPipeline

LONGER = [
    "stages.clip.train.samples=4096",
    "stages.prior.train.samples=12800",
    "stages.decoder.train.samples=5120",
    "stages.upsampler.train.samples=10240",
]


@pytest.fixture(scope="module")
def heldout(tiny: TinyPipeline) -> dict[str, dict[str, float]]:
    """What each stage's last validation found, by stage."""
    tiny.run("decoder", *LONGER), tiny.run("prior", *LONGER), tiny.run("upsampler", *LONGER)
    manifests = {name: read_manifest(planned.artifact.uri) for name, planned in tiny.plan(*LONGER).items()}
    return {name: manifest.metrics for name, manifest in manifests.items() if manifest is not None}


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
