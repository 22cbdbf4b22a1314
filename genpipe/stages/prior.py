"""Train a prior: caption to image embedding (Ramesh et al. 2022, section 2.2), by diffusion or code by code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role
from genpipe.data.features import FeatureDataset, open_features
from genpipe.data.loader import Data
from genpipe.data.order import spread
from genpipe.data.train_sets import cached_data, example_features
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, check_sampler, fixed_time_losses, training_loss
from genpipe.evaluation.validation import cosine, mean_losses, unrelated
from genpipe.generation.conditions import Text, embed_statistics
from genpipe.generation.embeds import (
    code_losses,
    in_unit_variance,
    prior_model,
    sample_image_embeds,
    unconditional_image_embeds,
)
from genpipe.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from genpipe.models.pca_quantizer import principal_components
from genpipe.models.prior import DiffusionPriorConfig, Prior, PriorConfig, build_prior
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.weights import InitialWeights, load_initial_weights, save_weights

VERSION = 2
MAKES = "prior"
HEADLINES = ("cosine", "cosine_unrelated")

FIT_CHUNK = 4096


class ObservePrior(ObserveTraining):
    """How a prior is watched: with which sampler validation draws, and the best of how many."""

    sampler: SamplerConfig = Field(SamplerConfig(), description="autoregressive: its guidance_scale alone")
    candidates: int = Field(2, ge=1, description="samples a caption, of which the best match with the text is kept")


class Config(StageConfig):
    """The prior, of either kind, and how it is trained."""

    model: PriorConfig = Field(DiffusionPriorConfig(), description="the network")
    diffusion: DiffusionConfig = Field(
        DiffusionConfig(schedule="cosine", predict="x0", time_sampling="uniform"), description="of the diffusion prior"
    )
    embed_scale: float | None = Field(
        None,
        gt=0,
        description="what the diffusion prior multiplies unit vectors by; none: they are standardized by dimension",
    )
    drop_text: float = Field(0.1, ge=0, lt=1, description="share of captions given up for the null caption")
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObservePrior = ObservePrior()


def roles(cfg: Config) -> dict[str, Role]:
    """The features to train on."""
    return {"features": Role("features")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The widths of what the prior reads and draws, and the fingerprints of the encoders that it was trained with.

    Raises ValueError for features without CLIP's embeddings, and for a network or sampler that does not fit.
    """
    meta = inputs["features"].meta
    if "embed_dim" not in meta:
        raise ValueError("the features have no image embeddings, which a prior draws; give features a clip")
    if cfg.model.kind == "diffusion" and 0 < cfg.model.text_positions < meta["context_length"]:
        raise ValueError(
            f"model.text_positions {cfg.model.text_positions} is less than CLIP's context_length "
            f"{meta['context_length']}; raise it to that"
        )
    if cfg.diffusion.variance == "learned":
        raise ValueError("diffusion.variance 'learned': a prior predicts embeddings alone; set it to 'fixed'")
    if cfg.embed_scale is not None and cfg.model.kind != "diffusion":
        raise ValueError(f"embed_scale has no effect on a prior of kind {cfg.model.kind}; remove it")
    diffusion = diffusion_of(cfg, embed_dim=meta["embed_dim"])
    check_sampler(cfg.observe.sampler, diffusion)
    return {
        "diffusion": diffusion.model_dump(mode="json"),
        **({} if cfg.embed_scale is None else {"embed_scale": cfg.embed_scale}),
        **{name: meta[name] for name in ("embed_dim", "text_width", "clip", "text_encoder") if name in meta},
    }


def diffusion_of(cfg: Config, *, embed_dim: int) -> DiffusionConfig:
    """The diffusion of the prior, which knows the deviation of what it draws: with `embed_scale` not 1.

    The mean square of a unit vector's numbers is 1 / `embed_dim`.
    """
    if cfg.embed_scale is None:
        return cfg.diffusion
    return cfg.diffusion.model_copy(update={"sigma_data": cfg.embed_scale / embed_dim**0.5})


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    """Cached features: image embeddings and captions."""
    return cached_data(inputs, arrays=("image_embeds",), seed=cfg.train.seed)


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """Zeros in the shapes and dtypes of a batch whose longest caption fills the context."""
    return example_features(inputs, arrays=("image_embeds",), batch_size=batch_size)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train, with all that it takes from the training features in place: the same on every rank and resume.

    On the meta device nothing is read, codes are as many as they can be, and the statistics may be unknown yet.
    """
    meta = inputs["features"].meta
    sizes: dict[str, int] = {name: meta[name] for name in ("embed_dim", "text_width")}
    if device.type == "meta":
        dim = sizes["embed_dim"]
        if cfg.model.kind == "autoregressive":
            sizes["components"] = min(dim, cfg.model.max_components or dim)
        with device:
            model = build_prior(cfg.model, **sizes)
        return Objective(cfg, {"image_embed_mean": [0.0] * dim, "image_embed_std": [1.0] * dim}, model, sizes)
    empty = None
    if cfg.model.null_text == "encoder":
        empty = Text.from_cache(_training_features(inputs).null_text())
        sizes["null_tokens"] = int(empty.text_mask.sum())
    prior: Prior
    if isinstance(cfg.model, AutoregressivePriorConfig):
        sources = {source: range(*span) for source, span in meta["sources"]["train"].items()}
        chosen = spread(sources, count=cfg.model.fit_samples, weights=cfg.train.source_weights, repeat=True)
        fitted = fitted_prior(cfg.model, _training_features(inputs), sizes, samples=chosen)
        sizes["components"], prior = fitted.components, fitted
    else:
        prior = build_prior(cfg.model, **sizes)
    if empty is not None:
        fill_null_text(prior, empty)
    load_initial_weights(prior, cfg.initial, kind="prior")
    return Objective(cfg, meta, prior.to(device), sizes)


def _training_features(inputs: Mapping[str, Artifact]) -> FeatureDataset:
    return open_features(inputs["features"], split="train")


def fitted_prior(
    cfg: AutoregressivePriorConfig, features: FeatureDataset, sizes: Mapping[str, int], *, samples: np.ndarray
) -> AutoregressivePrior:
    """An untrained autoregressive prior whose codes are fitted on these of the features' samples, int64 [N].

    Raises ValueError if there are fewer of them than buckets.
    """
    if len(samples) < cfg.buckets:
        raise ValueError(
            f"model.buckets {cfg.buckets} cannot be filled from {len(samples)} training samples; lower it, best to a "
            "tenth of them, or raise model.fit_samples"
        )
    chunks = np.array_split(np.sort(samples), -(-len(samples) // FIT_CHUNK))
    mean, basis = principal_components(
        map(features.image_embeds, chunks), variance=cfg.variance, at_most=cfg.max_components
    )
    prior = AutoregressivePrior(cfg, **sizes, components=len(basis))
    pairs = ((features.image_embeds(chunk), features.text_embeds(chunk)) for chunk in chunks)
    dots = [(image.float() * text.float()).sum(-1) for image, text in pairs]
    prior.codes.fit(mean, basis, embeds=map(features.image_embeds, chunks), dot_F=torch.cat(dots))
    return prior


@torch.no_grad()
def fill_null_text(prior: Prior, empty: Text) -> None:
    """Give a prior with `null_text: encoder` what the encoder says of the empty caption, B = 1."""
    if len(prior.null_encoding_W):  # it reads tokens
        prior.null_encoding_W.copy_(empty.encodings[empty.text_mask])
    prior.null_text_D.copy_(in_unit_variance(empty.embed)[0])


class Objective:
    """Diffusion: mean squared error of the predicted embedding, in standardized units. Autoregressive: nats a code."""

    def __init__(self, cfg: Config, meta: Mapping[str, Any], model: Prior, sizes: Mapping[str, int]) -> None:
        self.cfg = cfg
        self.model, self.sizes = model, dict(sizes)
        self.statistics = embed_statistics(meta, model.null_text_D.device, scale=cfg.embed_scale)
        self.diffusion = diffusion_of(cfg, embed_dim=sizes["embed_dim"])
        self.trainable: dict[str, nn.Module] = {"prior": self.model}

    def active(self, samples_seen: int) -> Sequence[str]:
        """The prior, always."""
        return ("prior",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The loss of a batch of cached features with some of its captions dropped."""
        text, embeds = Text.from_cache(batch), batch["image_embeds"].float()
        drop = torch.rand(len(embeds), generator=step.generator, device=embeds.device) < self.cfg.drop_text
        if isinstance(self.model, AutoregressivePrior):
            return code_losses(self.model, embeds, text, drop_text=drop).mean(), {}
        model, x0 = prior_model(self.model, text, drop_text=drop), self.statistics.standardize(embeds)
        return training_loss(model, x0, self.diffusion, generator=step.generator).mean(), {}

    def after_step(self) -> None:
        """Nothing: no parameter is constrained."""

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """The scoreboard, on which both kinds compare; `loss` compares within a kind."""
        cfg = self.cfg
        sampling: dict[str, Any] = {
            "statistics": self.statistics,
            "diffusion": self.diffusion,
            "sampler": cfg.observe.sampler,
            "generator": generator,
        }
        losses, samples, truths, texts = [], [], [], []
        for batch in batches:
            text, truth = Text.from_cache(batch), batch["image_embeds"].float()
            losses.append(self._heldout_losses(truth, text, generator))
            samples.append(sample_image_embeds(self.model, text, candidates=cfg.observe.candidates, **sampling))
            truths.append(truth)
            texts.append(text)
        without = torch.cat([unconditional_image_embeds(self.model, text, **sampling) for text in texts])
        sampled, truth, text_embed = torch.cat(samples), torch.cat(truths), torch.cat([text.embed for text in texts])
        found = {
            "cosine": cosine(sampled, truth),
            "cosine_unrelated": cosine(sampled, unrelated(truth)),
            "cosine_unconditional": cosine(without, truth),
            "cosine_text": cosine(text_embed, truth),
            "cosine_text_sampled": cosine(text_embed, sampled),
        }
        return Validation(mean_losses(losses) | mean_losses([found]))

    def _heldout_losses(self, truth: Tensor, text: Text, generator: torch.Generator) -> dict[str, Tensor]:
        keep = torch.zeros(len(truth), dtype=torch.bool, device=truth.device)
        if isinstance(self.model, AutoregressivePrior):
            codes = self.model.codes
            return {
                "loss": code_losses(self.model, truth, text, drop_text=keep),
                "cosine_codes": cosine(codes.decode(codes.encode(truth)), truth),
            }
        model, x0 = prior_model(self.model, text, drop_text=keep), self.statistics.standardize(truth)
        return fixed_time_losses(model, x0, self.diffusion, generator=generator)


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Write the weights; what they were trained for goes into the meta, by content and not by name alone."""
    extra = {"diffusion": objective.diffusion.model_dump(mode="json")}
    save_weights(objective.model, folder, kind="prior", config=cfg.model, sizes=objective.sizes, extra=extra)
    return {"made_from": inputs["features"].meta["made_from"]}
