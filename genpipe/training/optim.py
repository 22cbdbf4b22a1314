"""Optimizers, learning-rate schedules and what a training run is configured with."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, Tag, model_validator
from torch import nn

from genpipe.config import Config, by_kind
from genpipe.data.loader import check_batch_sizes
from genpipe.models.layers import Modulation, ResidualBlock
from genpipe.training import muon

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weights are matrices that multiply activations."""


class AdamW(Config):
    """AdamW (Loshchilov & Hutter 2019), with weight decay on the matrices alone: the weights of `LAYERS`.

    Embeddings, positions, tokens, gains, biases and scalars are not decayed.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class Muon(Config):
    """Muon (Jordan et al. 2024) for the hidden matrices, those of residual blocks, and AdamW for everything else.

    AdamW keeps what enters a network and what leaves it (patches, embeddings, positions, times, heads), modulation
    layers, resampling between blocks, convolutions in groups, gains and biases. `lr` is Muon's, on updates scaled to
    AdamW's RMS (Liu et al. 2025, section 2.2), so that one scale serves both; `adamw_lr` is AdamW's. Both decay
    matrices, as `AdamW` does.
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
    """The optimizers of a module, with every parameter in one group of one of them.

    Each group remembers its peak learning rate in `peak_lr`. A module without residual blocks has AdamW alone.
    """
    by_muon, matrices = _by_muon(module, cfg), _matrices(module)
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for p in module.parameters():
        (hidden if id(p) in by_muon else decayed if id(p) in matrices else undecayed).append(p)
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
    """Bytes that the optimizers of a module keep: two averages of AdamW's parameters, one momentum of Muon's."""
    by_muon = _by_muon(module, cfg)
    return sum(p.numel() * p.element_size() * (1 if id(p) in by_muon else 2) for p in module.parameters())


def _by_muon(module: nn.Module, cfg: AdamW | Muon) -> set[int]:
    """The ids of the parameters that Muon optimizes: matrices of residual blocks that modulate nothing.

    The kernels of a convolution in groups are many small matrices, not one.
    """
    if cfg.kind != "muon":
        return set()
    blocks = (block for block in module.modules() if isinstance(block, ResidualBlock))
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, LAYERS))
    return {
        id(layer.weight) for layer in layers if not isinstance(layer, Modulation) and getattr(layer, "groups", 1) == 1
    }


def _matrices(module: nn.Module) -> set[int]:
    """The ids of the weights of `LAYERS`."""
    return {id(layer.weight) for layer in module.modules() if isinstance(layer, LAYERS)}
