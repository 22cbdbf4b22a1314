"""Train the upsampler: a small image to a large one, on crops, with noise augmentation (Ho et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.artifacts import Artifact
from genpipe.config import StageConfig
from genpipe.data.loader import sequential
from genpipe.data.pixels import to_float, to_uint8
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, fixed_time_losses, training_loss
from genpipe.evaluation.grids import tile
from genpipe.evaluation.metrics import mean_losses, psnr
from genpipe.generation import augment, enlarge, upsample
from genpipe.models.upsampler import Upsampler, UpsamplerConfig
from genpipe.stages.autoencoder import hwc
from genpipe.stages.shard import check_image_size, image_data
from genpipe.training.objective import Batch, Data, Metrics, Split, Step, Validation
from genpipe.training.optim import TrainConfig
from genpipe.weights import save_weights

VERSION = 1
CONSUMES: tuple[str, ...] = ("shard",)

PICTURES = 6


class Config(StageConfig):
    low_size: int = Field(64, ge=8, description="side of the images that it is given")
    image_size: int = Field(128, ge=16, description="side of the images that it makes")
    crop: int = Field(64, ge=8, description="side of the training crops, in large pixels")
    model: UpsamplerConfig = UpsamplerConfig()
    diffusion: DiffusionConfig = DiffusionConfig(schedule="cosine", predict="x0", time_sampling="uniform")
    noise_aug: float = Field(0.3, ge=0, lt=1, description="training noise levels on low_res are uniform up to this")
    sampler: SamplerConfig = Field(SamplerConfig(steps=8), description="of the validation's pictures")
    statistics_samples: int = Field(512, ge=1, description="images over which the residual's scale is measured")
    train: TrainConfig


def agree(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    check_image_size(inputs["shard"], cfg.image_size, setting="image_size")
    if cfg.image_size % cfg.low_size or cfg.image_size == cfg.low_size:
        raise ValueError(f"image_size {cfg.image_size} is not a multiple of low_size {cfg.low_size}")
    patch = cfg.model.patch_size
    if cfg.image_size % patch:
        raise ValueError(f"image_size {cfg.image_size} is not a multiple of model.patch_size {patch}; change one")
    if cfg.crop % patch or cfg.crop > cfg.image_size:
        raise ValueError(f"crop {cfg.crop} must be a multiple of model.patch_size {patch} and at most image_size "
                         f"{cfg.image_size}")  # fmt: skip
    return {"low_size": cfg.low_size, "image_size": cfg.image_size}


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    return image_data(inputs["shard"], size=cfg.image_size)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    return Objective(cfg, residual_std(data(cfg, inputs).train, cfg), device)


def residual_std(split: Split, cfg: Config) -> float:
    """Standard deviation of what enlarging loses, over the first training images."""
    squares, count = 0.0, 0
    for _, batch in sequential(split.length, batch_size=64, collate=split.collate, limit=cfg.statistics_samples):
        images = to_float(batch["images"])
        residual = images - enlarge(shrink(images, size=cfg.low_size), size=cfg.image_size)
        squares, count = squares + residual.double().square().sum().item(), count + residual.numel()
    return max(1e-3, (squares / count) ** 0.5)


def shrink(images: Tensor, *, size: int) -> Tensor:
    """Images [B, C, H, W] as [B, C, size, size], averaged over boxes, on the 8-bit grid that a stored image has."""
    small = F.avg_pool2d(images, images.shape[-1] // size)
    return to_float(to_uint8(small))


class Objective:
    """The diffusion loss on the residual of enlarging, in units of its standard deviation."""

    def __init__(self, cfg: Config, residual_std: float, device: torch.device) -> None:
        self.cfg = cfg
        self.residual_std = residual_std
        self.model = Upsampler(cfg.model).to(device)
        self.trainable: dict[str, nn.Module] = {"upsampler": self.model}

    def parts(self, samples_seen: int) -> Sequence[str]:
        return ("upsampler",)

    def loss(self, part: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        images = to_float(batch["images"])
        large = enlarge(shrink(images, size=self.cfg.low_size), size=self.cfg.image_size)
        images, large = random_crops([images, large], side=self.cfg.crop, generator=step.generator)
        level = self.cfg.noise_aug * torch.rand(len(images), generator=step.generator, device=images.device)
        x0 = (images - large) / self.residual_std
        model = self._model(large, level, step.generator)
        return training_loss(model, x0, self.cfg.diffusion, generator=step.generator).mean(), {}

    def _model(self, large: Tensor, level: Tensor, generator: torch.Generator) -> Model:
        noisy = augment(large, level=level, generator=generator)
        return lambda x, t: self.model(x, t, low_res=noisy, noise_aug=level)

    def after_step(self) -> None:
        pass

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        losses: list[dict[str, Tensor]] = []
        sampled, baseline = [], []
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            images = to_float(batch["images"])
            low = shrink(images, size=self.cfg.low_size)
            large = enlarge(low, size=self.cfg.image_size)
            level = images.new_zeros(len(images))
            x0 = (images - large) / self.residual_std
            model = self._model(large, level, generator)
            losses.append(fixed_time_losses(model, x0, self.cfg.diffusion, generator=generator))
            if not pictures:
                few = low[: 4 * PICTURES]
                up = self._upsample(few, generator)
                sampled.append(psnr(up, images[: len(few)]))
                baseline.append(psnr(large[: len(few)], images[: len(few)]))
                rows = [to_uint8(row[:PICTURES]) for row in (large, up, images)]
                pictures["enlarged_upsampled_true"] = tile([hwc(row) for row in rows], cell=images.shape[-1])
        metrics = mean_losses(losses)
        metrics["psnr"] = torch.cat(sampled).mean().item()
        metrics["psnr_bicubic"] = torch.cat(baseline).mean().item()
        return Validation(metrics, pictures)

    def _upsample(self, low: Tensor, generator: torch.Generator) -> Tensor:
        return upsample(
            self.model,
            low,
            size=self.cfg.image_size,
            residual_std=self.residual_std,
            noise_aug=0.0,
            diffusion=self.cfg.diffusion,
            sampler=self.cfg.sampler,
            generator=generator,
        )


def random_crops(images: Sequence[Tensor], *, side: int, generator: torch.Generator) -> list[Tensor]:
    """The same random square of each sample from every tensor [B, C, H, W]."""
    batch, _, height, width = images[0].shape
    device = images[0].device
    top = torch.randint(height - side + 1, (batch,), generator=generator, device=device)
    left = torch.randint(width - side + 1, (batch,), generator=generator, device=device)
    span = torch.arange(side, device=device)
    rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    here = torch.arange(batch, device=device)[:, None, None]
    return [image[here, :, rows, columns].permute(0, 3, 1, 2) for image in images]


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    extra = {"diffusion": cfg.diffusion.model_dump(mode="json"), "residual_std": objective.residual_std}
    save_weights(objective.model, folder, kind="upsampler", config=cfg.model, sizes={}, extra=extra)
    return {}
