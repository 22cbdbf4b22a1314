"""Train the autoencoder: images to standardisable latents and back (Rombach et al. 2022, section 3.1)."""

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
from genpipe.config import Config as Block
from genpipe.config import StageConfig
from genpipe.data.loader import sequential
from genpipe.data.pixels import Crop, to_float, to_uint8
from genpipe.evaluation.grids import tile
from genpipe.evaluation.metrics import psnr
from genpipe.models.autoencoder import Autoencoder, AutoencoderConfig, kl_divergence
from genpipe.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from genpipe.stages.shard import check_image_size, image_data
from genpipe.training.objective import Batch, Data, Metrics, Split, Step, Validation
from genpipe.training.optim import TrainConfig
from genpipe.weights import save_weights

VERSION = 1
CONSUMES: tuple[str, ...] = ("shard",)

PICTURES = 8


class Adversarial(Block):
    """A patch discriminator, joined when the reconstruction has settled (VQGAN; Esser et al. 2021)."""

    start: int = Field(ge=0, description="samples before the discriminator is trained and used")
    weight: float = Field(0.5, gt=0, description="on top of the adaptive weight")
    model: DiscriminatorConfig = DiscriminatorConfig()


class Config(StageConfig):
    image_size: int = Field(64, ge=8)
    crop: Crop = Field("center", description="where squares are cut from images that are stored with another shape")
    model: AutoencoderConfig = AutoencoderConfig()
    kl_weight: float = Field(1e-6, ge=0, description="on the KL per image, against the L1 loss per pixel value")
    adversarial: Adversarial | None = None
    statistics_samples: int = Field(4096, ge=1, description="images over which the latents' statistics are measured")
    train: TrainConfig


def agree(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    check_image_size(inputs["shard"], cfg.image_size, setting="image_size")
    if cfg.image_size % cfg.model.factor:
        raise ValueError(f"image_size {cfg.image_size} is not a multiple of the model's factor {cfg.model.factor}")
    if cfg.adversarial and cfg.image_size >> cfg.adversarial.model.layers < 3:
        raise ValueError(f"adversarial.model.layers {cfg.adversarial.model.layers} is too many for images of "
                         f"{cfg.image_size} px; lower it")  # fmt: skip
    return {
        "image_size": cfg.image_size,
        "latent_channels": cfg.model.latent_channels,
        "latent_size": cfg.image_size // cfg.model.factor,
    }


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    return image_data(inputs["shard"], size=cfg.image_size, crop=cfg.crop, seed=cfg.train.seed)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    return Objective(cfg, device)


class Objective:
    """L1 + KL, and hinge GAN with adaptive weight once `adversarial.start` samples were seen."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg = cfg
        self.model = Autoencoder(cfg.model).to(device)
        self.trainable: dict[str, nn.Module] = {"autoencoder": self.model}
        if cfg.adversarial:
            self.discriminator = Discriminator(cfg.adversarial.model).to(device)
            self.trainable["discriminator"] = self.discriminator

    def parts(self, samples_seen: int) -> Sequence[str]:
        return tuple(self.trainable) if self._adversarial(samples_seen) else ("autoencoder",)

    def _adversarial(self, samples_seen: int) -> bool:
        return self.cfg.adversarial is not None and samples_seen >= self.cfg.adversarial.start

    def loss(self, part: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        images = to_float(batch["images"])
        if part == "discriminator":
            with torch.no_grad():
                recon, _, _ = self._reconstruct(images, step.generator)
            loss = discriminator_loss(self.discriminator(images), self.discriminator(recon))
            return loss, {}
        recon, mean, logvar = self._reconstruct(images, step.generator)
        l1 = F.l1_loss(recon, images)
        kl = kl_divergence(mean, logvar).mean()
        metrics = {"l1": l1.detach(), "kl": kl.detach()}
        loss = l1 + self.cfg.kl_weight * kl
        if self.cfg.adversarial and self._adversarial(step.samples_seen):
            adversarial = generator_loss(self.discriminator(recon))
            weight = adaptive_weight(l1, adversarial, last_layer=self.model.last_layer)
            loss = loss + self.cfg.adversarial.weight * weight * adversarial
            metrics |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        return loss, metrics

    def _reconstruct(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.model.encode(images)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.model.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def after_step(self) -> None:
        pass

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        values: list[Tensor] = []
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            images = to_float(batch["images"])
            recon = self.model.decode(self.model.encode(images)[0])
            values.append(psnr(recon, images))
            if not pictures:
                rows = [batch["images"][:PICTURES], to_uint8(recon[:PICTURES])]
                pictures["reconstructions"] = tile([hwc(row) for row in rows], cell=2 * images.shape[-1])
        return Validation({"psnr": torch.cat(values).mean().item()}, pictures)


def hwc(images: Tensor) -> list[np.ndarray]:
    """uint8 [B, C, H, W] as a list of HWC arrays."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    save_weights(objective.model, folder, kind="autoencoder", config=cfg.model, sizes={}, extra={})
    return latent_moments(objective.model, data(cfg, inputs).train, cfg)


def latent_moments(model: Autoencoder, split: Split, cfg: Config) -> dict[str, list[float]]:
    """`latent_mean` and `latent_std` by channel, over the posterior means of the first training images."""
    device = next(model.parameters()).device
    total: Tensor | None = None
    count = 0
    for _, batch in sequential(split.length, batch_size=64, collate=split.collate, limit=cfg.statistics_samples):
        mean, _ = model.encode(to_float(batch["images"].to(device)))
        moments = torch.stack([mean.double(), mean.double().square()]).sum((1, 3, 4))
        total = moments if total is None else total + moments
        count += mean[:, 0].numel()
    assert total is not None, "a training split holds at least one sample"
    mean, square = total / count
    return {"latent_mean": mean.tolist(), "latent_std": (square - mean.square()).sqrt().tolist()}
