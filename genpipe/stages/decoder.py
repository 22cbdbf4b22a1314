"""Train a decoder: from any of image embedding, caption and class label, or nothing, to latents.

With image embedding and caption it is unCLIP's (Ramesh et al. 2022, section 2.1), with the caption alone latent
diffusion's (Rombach et al. 2022). Latents of an identity autoencoder are pixels.
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
from genpipe.data.features import open_features
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
from genpipe.evaluation.validation import mean_losses
from genpipe.generation.conditions import Given, Text, embed_statistics, latent_statistics
from genpipe.generation.latents import Dropped, decoder_model, sample_latents
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.decoder import Decoder, DecoderConfig, check_conditions
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.weights import InitialWeights, load_initial_weights, load_weights, save_weights

VERSION = 2
MAKES = "decoder"
HEADLINES = ("loss",)

UNKNOWN_CLASSES = 1000
"""What costs are computed for until the shards say how many classes there are: ImageNet's."""


class ObserveDecoder(ObserveTraining):
    """How a decoder is watched: the pictures that validation draws, and with which sampler."""

    sampler: SamplerConfig = Field(SamplerConfig(guidance_scale=2.0), description="how a validation draws pictures")
    pictures: int = Field(8, ge=1, description="pictures that a validation draws")


class Config(StageConfig):
    """What the decoder is conditioned on (`model.image_embed`, `text`, `label`), and how it is trained."""

    model: DecoderConfig = DecoderConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    text: bool = Field(True, description="condition on captions")
    label: bool = Field(False, description="condition on class labels")
    drop_image: float = Field(0.1, ge=0, lt=1, description="share of image embeddings given up for the learned null")
    drop_text: float = Field(0.5, ge=0, lt=1, description="share of captions given up, independently")
    drop_label: float = Field(0.1, ge=0, lt=1, description="share of labels given up, independently")
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObserveDecoder = ObserveDecoder()


def roles(cfg: Config) -> dict[str, Role]:
    """The features to train on, and the autoencoder, for the pictures of validation."""
    return {"features": Role("features"), "autoencoder": Role("autoencoder")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the decoder is conditioned on and draws, and the fingerprints of the encoders whose language it speaks.

    Raises ValueError where the features lack a condition, and for a network or sampler that does not fit.
    """
    meta = inputs["features"].meta
    if "latent_size" not in meta:
        raise ValueError("the features have no latents, which the decoder draws; give features an autoencoder")
    check_sampler(cfg.observe.sampler, cfg.diffusion)
    multiple = cfg.model.denoiser.grid_multiple
    if meta["latent_size"] % multiple:
        setting = "patch_size" if cfg.model.denoiser.kind == "dit" else "multipliers"
        raise ValueError(
            f"model.denoiser.{setting} makes cells of {multiple}, which do not divide the latents' "
            f"{meta['latent_size']}; change it"
        )
    wanted = {"model.image_embed": cfg.model.image_embed, "text": cfg.text, "label": cfg.label}
    held = {
        "model.image_embed": "embed_dim" in meta,
        "text": "text_width" in meta,
        "label": "classes" not in meta or bool(meta["classes"]),  # absent until the shards are made
    }
    remedy = {"model.image_embed": "a clip", "text": "a clip or text_encoder", "label": "shards with class labels"}
    for setting, wants in wanted.items():
        if wants and not held[setting]:
            raise ValueError(f"{setting}: the features have none; set it to false, or give features {remedy[setting]}")
    check_conditions(cfg.model, **{name: sizes(cfg, meta).get(name, 0) for name in ("embed_dim", "text_width")})
    encoder = "text_encoder" if "text_encoder" in meta else "clip"
    made_with = {"autoencoder", *(["clip"] if cfg.model.image_embed else []), *([encoder] if cfg.text else [])}
    promised = ("latent_channels", "embed_dim", "text_width", *(["classes"] if cfg.label else []), *sorted(made_with))
    return {
        "conditions": [setting.removeprefix("model.") for setting, wants in wanted.items() if wants],
        "diffusion": cfg.diffusion.model_dump(mode="json"),
        **{name: meta[name] for name in promised if name in meta},
    }


def sizes(cfg: Config, meta: Mapping[str, Any]) -> dict[str, int]:
    """What the features decide of the network's sizes: `latent_channels`, and those of the conditions that it takes."""
    found = {"latent_channels": meta["latent_channels"]}
    if cfg.model.image_embed:
        found["embed_dim"] = meta["embed_dim"]
    if cfg.text:
        found["text_width"] = meta["text_width"]
    if cfg.label:
        found["classes"] = len(meta["classes"]) if "classes" in meta else UNKNOWN_CLASSES
    return found


def _arrays(cfg: Config) -> tuple[str, ...]:
    return ("latents", "image_embeds") if cfg.model.image_embed else ("latents",)


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    """Cached features: latents and the conditions."""
    return cached_data(inputs, arrays=_arrays(cfg), seed=cfg.train.seed)


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """Zeros in the shapes and dtypes of a batch whose longest caption fills the context."""
    batch = example_features(inputs, arrays=_arrays(cfg), batch_size=batch_size)
    return {"labels": torch.zeros(batch_size, dtype=torch.int64), **batch} if cfg.label else batch


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train, with the encoder's null text in place; on the meta device nothing is read."""
    meta = inputs["features"].meta
    network = {**sizes(cfg, meta), "out_channels": cfg.diffusion.channels(meta["latent_channels"])}
    if device.type == "meta":
        with device:
            return Objective(cfg, meta, Decoder(cfg.model, **network), network, None)
    null_encodings = None
    if cfg.text and cfg.model.null_text == "encoder":
        empty = Text.from_cache(open_features(inputs["features"], split="train").null_text())
        null_encodings = empty.encodings[empty.text_mask]
        network["null_tokens"] = len(null_encodings)
    model = Decoder(cfg.model, **network)
    if null_encodings is not None:
        with torch.no_grad():
            model.null_encoding_W.copy_(null_encodings)
    load_initial_weights(model, cfg.initial, kind="decoder")
    autoencoder = load_weights(fetch(inputs["autoencoder"]), kind="autoencoder", device=device).module
    return Objective(cfg, meta, model.to(device), network, cast(Autoencoder, autoencoder))


class Objective:
    """The diffusion loss on latents, each condition dropped independently; the autoencoder for pictures."""

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
        self.embed_statistics = embed_statistics(meta, device) if model.embed_dim else None
        self.latent_statistics = latent_statistics(meta, device)

    def active(self, samples_seen: int) -> Sequence[str]:
        """The decoder, always."""
        return ("decoder",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The diffusion loss of a batch of cached latents with some of its conditions dropped."""
        cfg, latents = self.cfg, batch["latents"].float()
        draws = torch.rand(
            3 if self.model.classes else 2, len(latents), generator=step.generator, device=latents.device
        )
        dropped = Dropped(draws[0] < cfg.drop_image, draws[1] < cfg.drop_text, draws[-1] < cfg.drop_label)
        model = decoder_model(self.model, self._given(batch), dropped, generator=step.generator)
        return training_loss(model, latents, cfg.diffusion, generator=step.generator).mean(), {}

    def _given(self, batch: Batch) -> Given:
        statistics = self.embed_statistics
        return Given(
            image_embed=None if statistics is None else statistics.standardize(batch["image_embeds"]),
            text=Text.from_cache(batch) if self.model.text_width else None,
            labels=batch["labels"] if self.model.classes else None,
        )

    def after_step(self) -> None:
        """Nothing: no parameter is constrained."""

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """Losses at fixed times, and pictures of the first samples beside the real ones."""
        losses: list[dict[str, Tensor]] = []
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            latents, given = batch["latents"].float(), self._given(batch)
            keep = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
            model = decoder_model(self.model, given, Dropped.everywhere(keep))
            losses.append(fixed_time_losses(model, latents, self.cfg.diffusion, generator=generator))
            if not pictures:
                pictures["samples"] = self._picture(latents, given, generator)
        return Validation(mean_losses(losses), pictures)

    def _picture(self, latents: Tensor, given: Given, generator: torch.Generator) -> np.ndarray:
        """Held-out images as the autoencoder has them, over what the decoder makes of their conditions."""
        real = latents[: self.cfg.observe.pictures]
        sampled = sample_latents(
            self.model,
            given.first(len(real)),
            shape=(len(real), latents.shape[1], latents.shape[2], latents.shape[3]),
            diffusion=self.cfg.diffusion,
            sampler=self.cfg.observe.sampler,
            generator=generator,
        )
        assert self.autoencoder is not None, "on the meta device nothing is drawn"
        rows = [
            to_uint8(self.autoencoder.decode(self.latent_statistics.restore(z), fp32=True)) for z in (real, sampled)
        ]
        return tile([hwc(row) for row in rows], cell=2 * rows[0].shape[-1])


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Write the weights; the meta gets the statistics of the latents, and by content what they were trained for."""
    extra = {"diffusion": cfg.diffusion.model_dump(mode="json")}
    save_weights(objective.model, folder, kind="decoder", config=cfg.model, sizes=objective.sizes, extra=extra)
    made = inputs["features"].meta
    return {**check_inputs(cfg, inputs), **{name: made[name] for name in ("latent_mean", "latent_std", "made_from")}}
