"""Train the decoder: image embedding and caption to latents (Ramesh et al. 2022, section 2.1; latent diffusion).

Latents of an identity autoencoder are pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.config import StageConfig
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import to_uint8
from genpipe.data.loader import Data
from genpipe.data.train_sets import cached_data, example_features
from genpipe.diffusion.process import (
    DiffusionConfig,
    SamplerConfig,
    check_sampler,
    fixed_time_losses,
    training_loss,
)
from genpipe.evaluation.grids import hwc, tile
from genpipe.evaluation.metrics import mean_losses
from genpipe.generation.conditions import Text, embed_statistics, latent_statistics
from genpipe.generation.latents import decoder_model, sample_latents
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.decoder import Decoder, DecoderConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.weights import InitialWeights, load_initial_weights, load_weights, save_weights

VERSION = 1
MAKES = "decoder"
HEADLINES = ("loss",)


class ObserveDecoder(ObserveTraining):
    """How a decoder is watched: the pictures that validation draws, and with which sampler."""

    sampler: SamplerConfig = SamplerConfig(guidance_scale=2.0)
    pictures: int = Field(8, ge=1)


class Config(StageConfig):
    model: DecoderConfig = DecoderConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    drop_image: float = Field(0.1, ge=0, lt=1, description="share of image embeddings given up for the learned null")
    drop_text: float = Field(0.5, ge=0, lt=1, description="share of captions given up, independently")
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObserveDecoder = ObserveDecoder()


def roles(cfg: Config) -> dict[str, Role]:
    return {"features": Role("features"), "autoencoder": Role("autoencoder")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    meta = inputs["features"].meta
    check_sampler(cfg.observe.sampler, cfg.diffusion)
    multiple = cfg.model.denoiser.grid_multiple
    if meta["latent_size"] % multiple:
        setting = "patch_size" if cfg.model.denoiser.kind == "dit" else "multipliers"
        raise ValueError(
            f"model.denoiser.{setting} makes cells of {multiple}, which do not divide the latents' "
            f"{meta['latent_size']}; change it"
        )
    return {name: meta[name] for name in ("embed_dim", "text_width", "latent_channels", "clip", "autoencoder")}


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    return cached_data(inputs, arrays=("latents", "image_embeds"), seed=cfg.train.seed)


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """Zeros in the shapes and dtypes of a batch whose longest caption fills the context."""
    return example_features(inputs, arrays=("latents", "image_embeds"), batch_size=batch_size)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train, with the encoder's null text in place; on the meta device nothing is read."""
    meta = inputs["features"].meta
    sizes: dict[str, int] = {name: meta[name] for name in ("latent_channels", "embed_dim", "text_width")}
    sizes["out_channels"] = cfg.diffusion.channels(sizes["latent_channels"])
    if device.type == "meta":
        with device:
            return Objective(cfg, meta, Decoder(cfg.model, **sizes), sizes, None)
    null_encodings = None
    if cfg.model.null_text == "encoder":
        empty = Text.from_cache(FeatureDataset(fetch(inputs["features"]), split="train").null_text())
        null_encodings = empty.encodings[empty.mask]
        sizes["null_tokens"] = len(null_encodings)
    model = Decoder(cfg.model, **sizes)
    if null_encodings is not None:
        with torch.no_grad():
            model.null_encoding_W.copy_(null_encodings)
    load_initial_weights(model, cfg.initial, kind="decoder")
    autoencoder = load_weights(fetch(inputs["autoencoder"]), kind="autoencoder", device=device).module
    return Objective(cfg, meta, model.to(device), sizes, cast(Autoencoder, autoencoder))


class Objective:
    """The diffusion loss on latents, with the two conditions dropped independently; the autoencoder for pictures."""

    def __init__(
        self,
        cfg: Config,
        meta: Mapping[str, Any],
        model: Decoder,
        sizes: Mapping[str, int],
        autoencoder: Autoencoder | None,
    ) -> None:
        self.cfg = cfg
        self.model, self.sizes, self.autoencoder = model, dict(sizes), autoencoder
        self.trainable: dict[str, nn.Module] = {"decoder": model}
        device = next(model.parameters()).device
        self.embed_statistics = embed_statistics(meta, device)
        self.latent_statistics = latent_statistics(meta, device)

    def active(self, samples_seen: int) -> Sequence[str]:
        return ("decoder",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        latents = batch["latents"].float()
        draws = torch.rand(2, len(latents), generator=step.generator, device=latents.device)
        model = decoder_model(
            self.model,
            self.embed_statistics.standardize(batch["image_embeds"]),
            Text.from_cache(batch),
            drop_image=draws[0] < self.cfg.drop_image,
            drop_text=draws[1] < self.cfg.drop_text,
            generator=step.generator,
        )
        return training_loss(model, latents, self.cfg.diffusion, generator=step.generator).mean(), {}

    def after_step(self) -> None:
        pass

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        losses: list[dict[str, Tensor]] = []
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            latents, text = batch["latents"].float(), Text.from_cache(batch)
            embed = self.embed_statistics.standardize(batch["image_embeds"])
            keep = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
            model = decoder_model(self.model, embed, text, drop_image=keep, drop_text=keep)
            losses.append(fixed_time_losses(model, latents, self.cfg.diffusion, generator=generator))
            if not pictures:
                pictures["samples"] = self._picture(latents, batch["image_embeds"], text, generator)
        return Validation(mean_losses(losses), pictures)

    def _picture(self, latents: Tensor, image_embeds: Tensor, text: Text, generator: torch.Generator) -> np.ndarray:
        """Held-out images as the autoencoder has them, over what the decoder makes of their embeddings."""
        few = slice(0, self.cfg.observe.pictures)
        sampled = sample_latents(
            self.model,
            image_embeds[few].float(),
            Text(*(part[few] for part in text)),
            shape=(latents.shape[1], latents.shape[2], latents.shape[3]),
            statistics=self.embed_statistics,
            diffusion=self.cfg.diffusion,
            sampler=self.cfg.observe.sampler,
            generator=generator,
        )
        assert self.autoencoder is not None, "on the meta device nothing is drawn"
        rows = [
            to_uint8(self.autoencoder.decode(self.latent_statistics.restore(z), fp32=True))
            for z in (latents[few], sampled)
        ]
        return tile([hwc(row) for row in rows], cell=2 * rows[0].shape[-1])


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    extra = {"diffusion": cfg.diffusion.model_dump(mode="json")}
    save_weights(objective.model, folder, kind="decoder", config=cfg.model, sizes=objective.sizes, extra=extra)
    return {}
