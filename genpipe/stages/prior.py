"""Train the diffusion prior: caption to image embedding (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact
from genpipe.config import StageConfig
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, fixed_time_losses, training_loss
from genpipe.evaluation.metrics import cosine, mean_losses, unrelated
from genpipe.generation import Text, embed_statistics, prior_model, sample_image_embeds
from genpipe.models.prior import Prior, PriorConfig
from genpipe.stages.features import cached_data
from genpipe.training.objective import Batch, Data, Metrics, Step, Validation
from genpipe.training.optim import TrainConfig
from genpipe.weights import save_weights

VERSION = 1
CONSUMES: tuple[str, ...] = ("features",)


class Config(StageConfig):
    model: PriorConfig = PriorConfig()
    diffusion: DiffusionConfig = DiffusionConfig(schedule="cosine", predict="x0", time_sampling="uniform")
    drop_text: float = Field(0.1, ge=0, lt=1, description="share of captions given up for the learned null")
    sampler: SamplerConfig = Field(SamplerConfig(), description="of the validation's samples")
    candidates: int = Field(2, ge=1)
    train: TrainConfig


def agree(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    meta = inputs["features"].meta
    return {name: meta[name] for name in ("embed_dim", "text_width", "clip")}


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    return cached_data(inputs, arrays=("image_embeds",), seed=cfg.train.seed)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    return Objective(cfg, inputs["features"].meta, device)


class Objective:
    """Mean squared error of the predicted embedding, in standardised units."""

    def __init__(self, cfg: Config, meta: Mapping[str, Any], device: torch.device) -> None:
        self.cfg = cfg
        self.statistics = embed_statistics(meta, device)
        self.sizes = {"embed_dim": meta["embed_dim"], "text_width": meta["text_width"]}
        self.model = Prior(cfg.model, **self.sizes).to(device)
        self.trainable: dict[str, nn.Module] = {"prior": self.model}

    def parts(self, samples_seen: int) -> Sequence[str]:
        return ("prior",)

    def loss(self, part: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        x0 = self.statistics.standardise(batch["image_embeds"])
        drop = torch.rand(len(x0), generator=step.generator, device=x0.device) < self.cfg.drop_text
        model = prior_model(self.model, Text.from_cache(batch), drop_text=drop)
        return training_loss(model, x0, self.cfg.diffusion, generator=step.generator).mean(), {}

    def after_step(self) -> None:
        pass

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        losses: list[dict[str, Tensor]] = []
        samples, truths, texts = [], [], []
        for batch in batches:
            text, truth = Text.from_cache(batch), batch["image_embeds"].float()
            keep = torch.zeros(len(truth), dtype=torch.bool, device=truth.device)
            model = prior_model(self.model, text, drop_text=keep)
            x0 = self.statistics.standardise(truth)
            losses.append(fixed_time_losses(model, x0, self.cfg.diffusion, generator=generator))
            samples.append(
                sample_image_embeds(
                    self.model,
                    text,
                    statistics=self.statistics,
                    diffusion=self.cfg.diffusion,
                    sampler=self.cfg.sampler,
                    candidates=self.cfg.candidates,
                    generator=generator,
                )
            )
            truths.append(truth)
            texts.append(text.embed)
        sampled, truth, text_embed = torch.cat(samples), torch.cat(truths), torch.cat(texts)
        metrics = mean_losses(losses)
        metrics["cosine"] = cosine(sampled, truth).mean().item()
        metrics["cosine_unrelated"] = cosine(sampled, unrelated(truth)).mean().item()
        metrics["cosine_text"] = cosine(text_embed, truth).mean().item()
        return Validation(metrics)


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    extra = {"diffusion": cfg.diffusion.model_dump(mode="json")}
    save_weights(objective.model, folder, kind="prior", config=cfg.model, sizes=objective.sizes, extra=extra)
    return {}
