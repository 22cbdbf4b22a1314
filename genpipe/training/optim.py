"""Optimizers and their settings."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, Tag
from torch import nn

from genpipe.config import Config, by_kind
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


def build_optimizers(module: nn.Module, cfg: AdamW | Muon) -> list[torch.optim.Optimizer]:
    """The optimizers of one trainable module. Each group remembers its peak learning rate in `peak_lr`."""
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
    """Bytes that the optimizers of a trainable module keep: AdamW two averages of each parameter, Muon its momentum."""
    by_muon = _by_muon(module, cfg)
    return sum(p.numel() * p.element_size() * (1 if id(p) in by_muon else 2) for p in module.parameters())


def _by_muon(module: nn.Module, cfg: AdamW | Muon) -> set[int]:
    """The ids of the parameters that Muon optimizes."""
    return {id(m.weight) for m in module.modules() if isinstance(m, MATRICES)} if cfg.kind == "muon" else set()
