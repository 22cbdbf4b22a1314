"""Optimizers, learning-rate schedules and what a training run is configured with."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, Tag, model_validator
from torch import nn

from genpipe.config import Config, by_kind
from genpipe.data.loader import check_batch_sizes
from genpipe.training import muon

MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers whose weights multiply activations: what Muon is for."""


class AdamW(Config):
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices only, never on gains, biases or scalars."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class Muon(Config):
    """Muon (Jordan et al. 2024) for the matrices of the transformer blocks, AdamW for everything else.

    `lr` is Muon's, on updates scaled to AdamW's RMS (Liu et al. 2025, section 2.2), so that both optimizers
    share one scale; `adamw_lr` is for what goes in and out: embeddings, positions,
    heads; and for gains and biases.
    """

    kind: Literal["muon"]
    lr: float = Field(2e-3, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    adamw_lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)


OptimConfig = Annotated[Annotated[AdamW, Tag("adamw")] | Annotated[Muon, Tag("muon")], by_kind("adamw")]


class TrainConfig(Config):
    """One training run. Progress is counted in samples, so that batch size and ranks may change."""

    samples: int = Field(ge=0, description="samples to train on, repeats included; 0: weights stay as they begin")
    global_batch_size: int = Field(gt=0, description="samples of one optimizer step, over all ranks")
    micro_batch_size: int | None = Field(None, gt=0, description="samples of a forward pass; default: a rank's share")
    optim: OptimConfig = AdamW()
    warmup_samples: int = Field(0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr: float = Field(0.0, ge=0, le=1, description="share of the learning rate that is left at the end")
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm of a part")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    source_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="share of the training samples from each source of a mix; default: by size"
    )
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of damaged samples beyond which training stops")

    @model_validator(mode="after")
    def _batches_fit(self) -> TrainConfig:
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        return self

    def micro_batch(self, world_size: int) -> int:
        """Samples of one forward pass on one rank."""
        return self.micro_batch_size or max(1, self.global_batch_size // world_size)

    def check_ranks(self, world_size: int) -> None:
        """Raise ValueError, with values that work, unless a step divides evenly over this many ranks."""
        check_batch_sizes(self.global_batch_size, micro_batch_size=self.micro_batch(world_size), world_size=world_size)

    @property
    def validation_batch(self) -> int:
        """Samples of one forward pass of validation: not a matter of ranks, as its noise is drawn by batch."""
        return self.micro_batch_size or min(self.global_batch_size, 64)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.samples / self.global_batch_size)


def lr_scale(cfg: TrainConfig, *, samples_seen: int) -> float:
    """The learning rate at `samples_seen` as a share of its peak: linear warm-up, then decay to `final_lr`."""
    warm = min(1.0, (samples_seen + cfg.global_batch_size) / cfg.warmup_samples) if cfg.warmup_samples else 1.0
    span = max(1, cfg.samples - cfg.warmup_samples)
    done = min(1.0, max(0.0, (samples_seen - cfg.warmup_samples) / span))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.decay]
    return warm * (cfg.final_lr + (1 - cfg.final_lr) * shape)


def build_optimizers(module: nn.Module, cfg: AdamW | Muon) -> list[torch.optim.Optimizer]:
    """The optimizers of one part. Each group remembers its peak learning rate in `peak_lr`."""
    by_muon, parameters = _by_muon(module, cfg), list(module.parameters())
    hidden = [p for p in parameters if id(p) in by_muon]
    decayed = [p for p in parameters if id(p) not in by_muon and p.ndim >= 2]
    undecayed = [p for p in parameters if id(p) not in by_muon and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    lr = cfg.adamw_lr if cfg.kind == "muon" else cfg.lr
    if groups:
        eps = AdamW().eps if cfg.kind == "muon" else cfg.eps
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=cfg.betas, eps=eps, fused=True))
    if cfg.kind == "muon" and hidden:
        optimizers.append(muon.Muon(hidden, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def optimizer_bytes(module: nn.Module, cfg: AdamW | Muon) -> int:
    """What the optimizers of a part keep: two averages of each of AdamW's parameters, Muon's momentum of the others."""
    by_muon = _by_muon(module, cfg)
    return sum(p.numel() * p.element_size() * (1 if id(p) in by_muon else 2) for p in module.parameters())


def _by_muon(module: nn.Module, cfg: AdamW | Muon) -> set[int]:
    """The ids of the parameters that Muon optimizes."""
    return {id(m.weight) for m in module.modules() if isinstance(m, MATRICES)} if cfg.kind == "muon" else set()
