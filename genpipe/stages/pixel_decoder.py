"""Train a decoder of pixels on the shards themselves: class-conditional (Dhariwal & Nichol 2021) or unconditional.

The default diffusion is EDM's (Karras et al. 2022, table 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role
from genpipe.data.image_batches import to_float, to_uint8
from genpipe.data.loader import Data
from genpipe.data.train_sets import check_image_size, image_data
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, check_sampler, fixed_time_losses, training_loss
from genpipe.evaluation.grids import hwc, tile
from genpipe.evaluation.validation import mean_losses
from genpipe.generation.conditions import Given
from genpipe.generation.latents import Dropped, decoder_model, sample_latents
from genpipe.models.decoder import Decoder, DecoderConfig, check_conditions
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.weights import InitialWeights, load_initial_weights, save_weights

VERSION = 2
MAKES = "decoder"
HEADLINES = ("loss",)

CHANNELS = 3
UNKNOWN_CLASSES = 1000
"""What costs are computed for until the shards say how many classes there are: ImageNet's."""


class ObservePixels(ObserveTraining):
    """How a decoder of pixels is watched: the pictures that validation draws, and with which sampler."""

    sampler: SamplerConfig = Field(SamplerConfig(kind="heun", steps=18), description="how a validation draws pictures")
    pictures: int = Field(8, ge=1, description="pictures that a validation draws")


class Config(StageConfig):
    """What is drawn, on which condition, and how it is trained. `model` takes neither text nor image embeddings."""

    image_size: int = Field(64, ge=8, description="side of the pictures, in pixels")
    condition: Literal["none", "label"] = Field("none", description="label: on the class labels of the shards")
    drop_label: float = Field(0.1, ge=0, lt=1, description="share of labels given up for the learned null")
    model: DecoderConfig = DecoderConfig()
    diffusion: DiffusionConfig = DiffusionConfig(
        schedule="edm", predict="edm", sigma_data=0.5, time_sampling="log_normal", weighting="edm"
    )
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObservePixels = ObservePixels()


def roles(cfg: Config) -> dict[str, Role]:
    """The images to train on."""
    return {"shard": Role("shards", "samples")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The side of what is drawn, the condition, and the classes if they are known yet.

    Raises ValueError for shards without labels where the condition asks for them, and for sizes that do not fit.
    """
    shard = inputs["shard"]
    check_image_size(shard, cfg.image_size, setting="image_size")
    check_sampler(cfg.observe.sampler, cfg.diffusion)
    check_conditions(cfg.model, embed_dim=0, text_width=0)
    if cfg.image_size % (multiple := cfg.model.denoiser.grid_multiple):
        setting = "patch_size" if cfg.model.denoiser.kind == "dit" else "multipliers"
        raise ValueError(
            f"model.denoiser.{setting} makes cells of {multiple} px, which do not divide image_size "
            f"{cfg.image_size}; change one"
        )
    promised = {
        "image_size": cfg.image_size,
        "conditions": ["label"] if cfg.condition == "label" else [],
        "diffusion": cfg.diffusion.model_dump(mode="json"),
    }
    if cfg.condition == "none" or "classes" not in shard.meta:  # absent until the shards are made
        return promised
    if not shard.meta["classes"]:
        raise ValueError("condition label: the shards have no class labels; give the source some, or set it to none")
    return {**promised, "classes": shard.meta["classes"]}


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    """Images, with their labels if they are the condition."""
    return image_data(inputs["shard"], size=cfg.image_size, labels=cfg.condition == "label")


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """A batch of zeros as `data` collates them."""
    images = torch.zeros(batch_size, CHANNELS, cfg.image_size, cfg.image_size, dtype=torch.uint8)
    return {"images": images, "labels": torch.zeros(batch_size, dtype=torch.int64)}


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train; on the meta device nothing is read, and the classes may be unknown yet."""
    sizes = {"latent_channels": CHANNELS, "out_channels": cfg.diffusion.channels(CHANNELS)}
    if cfg.condition == "label":
        known = inputs["shard"].meta.get("classes")
        sizes["classes"] = UNKNOWN_CLASSES if known is None else len(known)
    model = Decoder(cfg.model, **sizes)
    load_initial_weights(model, cfg.initial, kind="decoder")
    return Objective(cfg, model.to(device), sizes)


class Objective:
    """The diffusion loss on pixels, with some of the labels dropped."""

    def __init__(self, cfg: Config, model: Decoder, sizes: Mapping[str, int]) -> None:
        self.cfg, self.model, self.sizes = cfg, model, dict(sizes)
        self.trainable: dict[str, nn.Module] = {"decoder": model}

    def active(self, samples_seen: int) -> Sequence[str]:
        """The decoder, always."""
        return ("decoder",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The diffusion loss of a batch of images."""
        images = to_float(batch["images"])
        dropped = torch.rand(len(images), generator=step.generator, device=images.device) < self.cfg.drop_label
        given, dropped_all = self._given(batch), Dropped.everywhere(dropped)
        model = decoder_model(self.model, given, dropped_all, generator=step.generator)
        return training_loss(model, images, self.cfg.diffusion, generator=step.generator).mean(), {}

    def _given(self, batch: Batch) -> Given:
        return Given(labels=batch["labels"] if self.model.classes else None)

    def after_step(self) -> None:
        """Nothing: no parameter is constrained."""

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """Losses at fixed times, and pictures of the first samples' classes beside the real ones."""
        losses: list[dict[str, Tensor]] = []
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            images, given = to_float(batch["images"]), self._given(batch)
            keep = torch.zeros(len(images), dtype=torch.bool, device=images.device)
            model = decoder_model(self.model, given, Dropped.everywhere(keep))
            losses.append(fixed_time_losses(model, images, self.cfg.diffusion, generator=generator))
            if not pictures:
                pictures["samples"] = self._picture(images[: self.cfg.observe.pictures], given, generator)
        return Validation(mean_losses(losses), pictures)

    def _picture(self, real: Tensor, given: Given, generator: torch.Generator) -> np.ndarray:
        """Held-out images over what the decoder draws of their classes."""
        count, size = len(real), self.cfg.image_size
        sampled = sample_latents(
            self.model,
            given.first(count),
            shape=(count, CHANNELS, size, size),
            diffusion=self.cfg.diffusion,
            sampler=self.cfg.observe.sampler,
            generator=generator,
        )
        return tile([hwc(to_uint8(row)) for row in (real, sampled)], cell=2 * size)


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Write the weights."""
    extra = {"diffusion": cfg.diffusion.model_dump(mode="json")}
    save_weights(objective.model, folder, kind="decoder", config=cfg.model, sizes=objective.sizes, extra=extra)
    return check_inputs(cfg, inputs)
