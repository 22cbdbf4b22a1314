"""Bits per dimension of pictures whose distribution is known, of a trained system, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gallery import SIDE, Gallery, evaluation
from torch import Tensor

from genpipe.artifacts import Artifact, read_manifest
from genpipe.config import ConfigError
from genpipe.diffusion.process import DiffusionConfig
from genpipe.diffusion.samplers import Denoise
from genpipe.diffusion.schedules import alpha_sigma
from genpipe.evaluation.metrics.likelihood import BIN, LikelihoodConfig
from genpipe.evaluation.metrics.metric import PixelModel
from genpipe.evaluation.per_sample import read_values
from genpipe.storage import open_storage

if TYPE_CHECKING:
    from conftest import TinyPipeline

MEANS, STD = (-0.4, 0.3), 0.2
PICTURES = 12
FLOW = DiffusionConfig()
LINEAR = DiffusionConfig(schedule="linear", predict="eps")
VALUES = torch.linspace(-1.0, 1.0, 256)


def log_chances(mean: Tensor) -> Tensor:
    """ln of a Gaussian's share in each of the 256 bins, fp32 [B, 256], for means [B]."""
    return torch.log_softmax(-0.5 * ((VALUES - mean[:, None]) / STD).square(), dim=1)


def of_labels(labels: list[int]) -> Tensor:
    return torch.tensor(MEANS)[torch.tensor(labels)]


def levels(diffusion: DiffusionConfig, t_B: Tensor, *, axes: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma, fp32 [B, 1, ...]."""
    alpha, sigma = alpha_sigma(t_B.double(), diffusion.noise_schedule)
    return alpha.view(-1, *[1] * axes).float(), sigma.view(-1, *[1] * axes).float()


def gaussian(diffusion: DiffusionConfig, labels: list[int]) -> Denoise:
    """The best estimate for Gaussian pictures, independent pixels around the mean of the label."""

    def denoise(x_t: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = levels(diffusion, t_B, axes=3)
        mean = of_labels(labels).view(-1, 1, 1, 1)
        return mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * mean)

    return denoise


def eight_bit(diffusion: DiffusionConfig, labels: list[int]) -> Denoise:
    """The same for pixels that have one of 256 values."""
    log_p = log_chances(of_labels(labels)).view(-1, 1, 1, 1, 256)

    def denoise(x_t: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = levels(diffusion, t_B, axes=4)
        off = (x_t[..., None] - alpha * VALUES) / sigma
        return torch.softmax(log_p - 0.5 * off.square(), dim=-1) @ VALUES

    return denoise


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Held-out pictures of two classes, and a system that only says what it is."""
    gallery, rng = Gallery(tmp_path_factory.mktemp("store")), np.random.default_rng(0)
    chances = log_chances(torch.tensor(MEANS)).exp().double().numpy()
    labels = [number % 2 for number in range(PICTURES)]
    drawn = [rng.choice(256, (SIDE, SIDE, 3), p=chances[of] / chances[of].sum()).astype(np.uint8) for of in labels]
    named = [(picture, f"class {of}") for picture, of in zip(drawn, labels, strict=True)]
    shard = gallery.shards({"heldout": named}, labels={"heldout": labels}, image_size=SIDE, classes=["0", "1"])
    return {"shard": shard, "system": system()}


def system(**meta: Any) -> Artifact:
    told = {"kind": "pixel", "size": SIDE, "classes": ["0", "1"], "parts": {"decoder": "d" * 64}, **meta}
    return Artifact(kind="system", uri="", fingerprint="f" * 64, meta=told)


def found_by(
    cfg: LikelihoodConfig, inputs: dict[str, Artifact], out: Path, of: Any, diffusion: DiffusionConfig
) -> dict[str, float]:
    """The numbers of a denoiser that is known; that it is told each picture's own caption and label."""
    asked: list[str] = []

    def told(captions: Any, labels: Any) -> Denoise:
        assert [f"class {label}" for label in labels] == list(captions)
        asked.extend(captions)
        return of(diffusion, list(labels))

    known = PixelModel(SIDE, diffusion, told)
    of_inputs = replace(evaluation(inputs, part_size=5), pixel_model=lambda artifact, device: known)
    measure = cfg.measure(of_inputs)
    partials = [measure(part, out) for part in cfg.parts(of_inputs)]
    assert len(partials) == 3 and len(asked) == PICTURES
    return cfg.merge(partials, open_storage(str(out)))


@pytest.mark.parametrize("diffusion", [FLOW, LINEAR], ids=["flow", "linear"])
def test_the_ode_finds_a_gaussians_density(
    inputs: dict[str, Artifact], tmp_path: Path, diffusion: DiffusionConfig
) -> None:
    """Of pictures with noise of a bin's width, as which they are measured, and with that of the first step."""
    cfg = LikelihoodConfig(estimates=("ode",))
    [(name, found)] = found_by(cfg, inputs, tmp_path, gaussian, diffusion).items()
    assert name == "likelihood/bits_per_dim_ode"
    images = evaluation(inputs).originals(np.arange(PICTURES), size=SIDE)
    means = of_labels([number % 2 for number in range(PICTURES)]).view(-1, 1, 1, 1)
    alpha, sigma = alpha_sigma(torch.tensor(1e-3), diffusion.noise_schedule)
    variance = STD**2 + (sigma / alpha).item() ** 2
    squares = (images - means).square().mean().item() + BIN**2 / 12
    nats = 0.5 * (squares / variance + math.log(2 * math.pi * variance))
    assert found == pytest.approx(nats / math.log(2) - math.log2(BIN), abs=0.01)


@pytest.mark.parametrize("diffusion", [FLOW, LINEAR], ids=["flow", "linear"])
def test_the_bound_lies_above_the_entropy(
    inputs: dict[str, Artifact], tmp_path: Path, diffusion: DiffusionConfig
) -> None:
    """Of the flow just above; DDPM's first steps have more noise than a bin is wide, which costs it nearly a bit."""
    cfg = LikelihoodConfig(estimates=("vlb",), vlb_terms=48)
    found = found_by(cfg, inputs, tmp_path, eight_bit, diffusion)["likelihood/bits_per_dim_vlb"]
    images = evaluation(inputs).originals(np.arange(PICTURES), size=SIDE)
    index = ((images + 1.0) * 127.5).round().long().flatten(1)
    log_p = log_chances(of_labels([number % 2 for number in range(PICTURES)])).gather(1, index)
    entropy = -log_p.mean().item() / math.log(2)
    assert entropy - 0.05 < found < entropy + (0.05 if diffusion is FLOW else 1.0)


def test_a_trained_system_is_measured(pixel_tiny: TinyPipeline) -> None:
    """By the stage, in the pipeline of a folder of folders; 8 bits would be those of uniform noise."""
    metrics = "{likelihood: {pictures: 4, ode_steps: 4, vlb_terms: 16}}"
    scores = pixel_tiny.run("evaluate", f"stages.evaluate.metrics={metrics}")
    manifest = read_manifest(scores.uri)
    assert manifest is not None
    values = read_values(scores, ["likelihood/bits_per_dim_ode", "likelihood/bits_per_dim_vlb"])
    assert len(values) == 2
    for name, of in values.items():
        assert len(of.keys) == 4 and of.values.mean() == pytest.approx(manifest.metrics[name])
        assert 0 < manifest.metrics[name] < 12


def test_systems_of_latents_are_refused_before_anything_runs(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.likelihood: a system of kind unclip draws latents"):
        tiny.plan("stages.evaluate.metrics={likelihood: {}}")


def test_what_does_not_fit_is_refused(inputs: dict[str, Artifact]) -> None:
    cfg = LikelihoodConfig()
    for wrong, says in (
        (system(classes=["1", "0"]), "does not have the classes of the system"),
        (system(size=32), "the system's size 32 is larger than the shards' 16 px"),
    ):
        with pytest.raises(ValueError, match=says):
            cfg.check_inputs({**inputs, "system": wrong})
    cfg.check_inputs({**inputs, "system": system(size=32, parts={"decoder": "d", "upsamplers.0": "u"})})
    with pytest.raises(ValueError, match=r"likelihood\.split: .* has no train split"):
        LikelihoodConfig(split="train").parts(evaluation(inputs))
