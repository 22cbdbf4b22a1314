"""Train an upsampler: a small image to a large one, on crops, with noise augmentation (Ho et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.data.degradations import Clean, DegradationConfig, degrade, shrink
from genpipe.data.image_batches import to_float, to_uint8
from genpipe.data.loader import Data, SampleSet, sample_batches
from genpipe.data.train_sets import check_image_size, image_data
from genpipe.diffusion.process import (
    DiffusionConfig,
    UpsamplerSamplerConfig,
    check_sampler,
    fixed_time_losses,
    training_loss,
)
from genpipe.evaluation.fidelity import psnr
from genpipe.evaluation.grids import hwc, tile
from genpipe.evaluation.validation import mean_losses
from genpipe.generation.conditions import latent_statistics
from genpipe.generation.upsampling import (
    LatentSpace,
    PixelSpace,
    Space,
    augment,
    enlarge,
    in_pieces,
    upsample,
    upsampler_model,
)
from genpipe.lineage import content_digest
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.precision import fp32
from genpipe.models.upsampler import ConvolutionalConfig, UpsamplerConfig, build_upsampler
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.weights import InitialWeights, load_initial_weights, load_weights, save_weights

VERSION = 2
MAKES = "upsampler"
HEADLINES = ("psnr", "psnr_bicubic")

LEAST_RESIDUAL = 1 / 127.5
"""Floor under the residual's deviation: one of the 256 levels of a pixel, below which is rounding."""


class ObserveUpsampler(ObserveTraining):
    """How an upsampler is watched: the pictures that validation draws, and with which sampler."""

    sampler: UpsamplerSamplerConfig = Field(UpsamplerSamplerConfig(), description="how a validation draws pictures")
    pictures: int = Field(6, ge=1, description="pictures that a validation draws")


class Config(StageConfig):
    """What is enlarged to what, and how it is trained.

    Noise augmentation is that of cascaded diffusion (Ho et al. 2022); unCLIP has none: set `noise_aug` to 0 for its
    upsamplers, here and in their system.
    """

    low_size: int = Field(64, ge=8, description="side of the images that it is given")
    image_size: int = Field(128, ge=16, description="side of the images that it makes")
    crop: int = Field(64, ge=8, description="side of the training crops, in large pixels")
    target: Literal["residual", "image", "latents"] = Field(
        "residual", description="what is drawn: what enlarging loses, the image, or the autoencoder's latents of it"
    )
    model: UpsamplerConfig = Field(ConvolutionalConfig(), description="the network")
    diffusion: DiffusionConfig = DiffusionConfig(schedule="cosine", predict="x0", time_sampling="uniform")
    degradation: DegradationConfig = Field(Clean(), description="of the small images in training")
    noise_aug: float = Field(0.3, ge=0, lt=1, description="training noise levels on low_res are uniform up to this")
    statistics_samples: int = Field(512, ge=1, description="images over which the residual's scale is measured")
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObserveUpsampler = ObserveUpsampler()


def roles(cfg: Config) -> dict[str, Role]:
    """The images to train on, and the autoencoder whose latents are drawn, if they are."""
    autoencoder = {"autoencoder": Role("autoencoder")} if cfg.target == "latents" else {}
    return {"shard": Role("shards", "samples"), **autoencoder}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The sides of what goes in and comes out. Raises ValueError for sizes that do not fit one another."""
    check_image_size(inputs["shard"], cfg.image_size, setting="image_size")
    check_sampler(cfg.observe.sampler, cfg.diffusion)
    if cfg.image_size <= cfg.low_size:
        raise ValueError(f"image_size {cfg.image_size} is not larger than low_size {cfg.low_size}")
    multiple = cfg.model.grid_multiple
    meta: dict[str, Any] = {
        "low_size": cfg.low_size,
        "image_size": cfg.image_size,
        "diffusion": cfg.diffusion.model_dump(mode="json"),
    }
    if cfg.target == "latents":
        autoencoder = inputs["autoencoder"]
        multiple *= _factor(autoencoder)
        meta["autoencoder"] = autoencoder.fingerprint
    if cfg.image_size % multiple:
        raise ValueError(f"image_size {cfg.image_size} is not a multiple of the {multiple} px of the model's coarsest "
                         "cells; change one")  # fmt: skip
    if cfg.crop % multiple or cfg.crop > cfg.image_size:
        raise ValueError(f"crop {cfg.crop} must be a multiple of the {multiple} px of the model's coarsest cells, and "
                         f"at most image_size {cfg.image_size}")  # fmt: skip
    return meta


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    """Images at the size that is made."""
    return image_data(inputs["shard"], size=cfg.image_size)


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """A batch of zeros as `data` collates them."""
    return {"images": torch.zeros(batch_size, 3, cfg.image_size, cfg.image_size, dtype=torch.uint8)}


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train; on the meta device nothing is read."""
    return Objective(cfg, _space(cfg, inputs, device), device)


def _space(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Space:
    """Where the diffusion runs; on the meta device with a residual of any scale, as nothing is read."""
    if cfg.target == "latents":
        made, autoencoder = inputs["autoencoder"], None
        if device.type != "meta":
            autoencoder = cast(Autoencoder, load_weights(fetch(made), kind="autoencoder", device=device).module)
        return LatentSpace(autoencoder, latent_statistics(made.meta, device), _factor(made))
    if cfg.target == "image":
        return PixelSpace(None)
    return PixelSpace(1.0 if device.type == "meta" else residual_std(data(cfg, inputs).train, cfg))


def _factor(autoencoder: Artifact) -> int:
    """Pixels of a cell of the latents, along each axis."""
    factor: int = autoencoder.meta["image_size"] // autoencoder.meta["latent_size"]
    return factor


def residual_std(samples: SampleSet, cfg: Config) -> float:
    """Standard deviation of what enlarging loses, over training images that stand for all; no less than the floor."""
    squares, count = 0.0, 0
    weights = cfg.train.source_weights
    for batch in sample_batches(samples, count=cfg.statistics_samples, batch_size=64, weights=weights, repeat=True):
        images = to_float(batch["images"])
        residual = images - enlarge(shrink(images, size=cfg.low_size), size=cfg.image_size)
        squares, count = squares + residual.double().square().sum().item(), count + residual.numel()
    return max(LEAST_RESIDUAL, (squares / count) ** 0.5)


class Objective:
    """The diffusion loss of what is drawn on crops, given the degraded small image with noise on it."""

    def __init__(self, cfg: Config, space: Space, device: torch.device) -> None:
        self.cfg = cfg
        self.space = space
        channels = space.channels(cfg.model.image_channels)
        self.sizes = {"channels": channels, "out_channels": cfg.diffusion.channels(channels)}
        self.model = build_upsampler(cfg.model, **self.sizes).to(device)
        load_initial_weights(self.model, cfg.initial, kind="upsampler")
        self.trainable: dict[str, nn.Module] = {"upsampler": self.model}

    def active(self, samples_seen: int) -> Sequence[str]:
        """The upsampler, always."""
        return ("upsampler",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The loss of random crops of a batch of images."""
        cfg, images = self.cfg, to_float(batch["images"])
        with fp32(images.device):
            low = degrade(images, cfg.degradation, size=cfg.low_size, generator=step.generator)
        large = enlarge(low, size=self.space.grid(cfg.image_size))
        images, large = random_crops([images, large], side=self.space.grid(cfg.crop), generator=step.generator)
        level = cfg.noise_aug * torch.rand(len(images), generator=step.generator, device=images.device)
        x0 = self.space.encode(images, low_res=large)
        noisy = augment(large, level=level, generator=step.generator)
        model = upsampler_model(self.model, noisy, level=level, generator=step.generator)
        return training_loss(model, x0, cfg.diffusion, generator=step.generator).mean(), {}

    def after_step(self) -> None:
        """Nothing: no parameter is constrained."""

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """Losses at fixed times without noise on low_res; PSNR and pictures of the first samples."""
        losses: list[dict[str, Tensor]] = []
        sampled, baseline = [], []
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            images = to_float(batch["images"])
            low = shrink(images, size=self.cfg.low_size)
            losses.append(self._heldout_losses(images, low, generator))
            if not pictures:
                few = low[: 4 * self.cfg.observe.pictures]
                up, enlarged = self._upsample(few, generator), enlarge(few, size=self.cfg.image_size)
                sampled.append(psnr(up, images[: len(few)]))
                baseline.append(psnr(enlarged, images[: len(few)]))
                rows = [to_uint8(row[: self.cfg.observe.pictures]) for row in (enlarged, up, images)]
                pictures["enlarged_upsampled_true"] = tile([hwc(row) for row in rows], cell=images.shape[-1])
        metrics = mean_losses(losses)
        metrics["psnr"] = torch.cat(sampled).mean().item()
        metrics["psnr_bicubic"] = torch.cat(baseline).mean().item()
        return Validation(metrics, pictures)

    def _heldout_losses(self, images: Tensor, low: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        large = enlarge(low, size=self.space.grid(self.cfg.image_size))
        level = images.new_zeros(len(images))
        model = in_pieces(self.model, augment(large, level=level, generator=generator), level=level)
        x0 = self.space.encode(images, low_res=large)
        return fixed_time_losses(model, x0, self.cfg.diffusion, generator=generator)

    def _upsample(self, low: Tensor, generator: torch.Generator) -> Tensor:
        return upsample(
            self.model,
            low,
            size=self.cfg.image_size,
            space=self.space,
            noise_aug=0.0,
            diffusion=self.cfg.diffusion,
            sampler=self.cfg.observe.sampler,
            generator=generator,
        )


def random_crops(images: Sequence[Tensor], *, side: int, generator: torch.Generator) -> list[Tensor]:
    """The same random square of each sample from every tensor [B, C, H, W].

    `side` counts cells of the coarsest; the others have whole multiples of its cells, and of the squares' places.
    """
    coarsest = min(images, key=lambda image: image.shape[-1])
    batch, _, height, width = coarsest.shape
    device = coarsest.device
    top = torch.randint(height - side + 1, (batch,), generator=generator, device=device)
    left = torch.randint(width - side + 1, (batch,), generator=generator, device=device)
    here = torch.arange(batch, device=device)[:, None, None]
    crops = []
    for image in images:
        scale = image.shape[-1] // width
        span = torch.arange(scale * side, device=device)
        rows, columns = (scale * top[:, None] + span)[:, :, None], (scale * left[:, None] + span)[:, None, :]
        crops.append(image[here, :, rows, columns].permute(0, 3, 1, 2))
    return crops


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Write the weights, with where they draw; one that draws latents names its autoencoder by content."""
    extra = {
        "diffusion": cfg.diffusion.model_dump(mode="json"),
        "target": cfg.target,
        "residual_std": objective.space.residual_std if isinstance(objective.space, PixelSpace) else None,
    }
    save_weights(objective.model, folder, kind="upsampler", config=cfg.model, sizes=objective.sizes, extra=extra)
    return {"made_from": {"autoencoder": content_digest(inputs["autoencoder"])}} if cfg.target == "latents" else {}
