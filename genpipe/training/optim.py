"""Optimizers and their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, Tag
from torch import Tensor, nn

from genpipe.config import Config, by_kind
from genpipe.models.layers import Modulation, ResidualBlock
from genpipe.training import muon
from genpipe.training.sharding import by_sharding, local, whole

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weights are matrices that multiply activations."""


class AdamW(Config):
    """AdamW (Loshchilov & Hutter 2019), with weight decay on the matrices alone: the weights of `LAYERS`.

    Embeddings, positions, tokens, gains, biases and scalars are not decayed.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of the averages of gradient and square")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(0.01, ge=0, description="times the learning rate, each step")


class Muon(Config):
    """Muon (Jordan et al. 2024) for the hidden matrices, those of residual blocks, and AdamW for everything else.

    AdamW keeps what enters a network and what leaves it (patches, embeddings, positions, times, heads), modulation
    layers, resampling between blocks, convolutions in groups, gains and biases. `lr` is Muon's, on updates scaled to
    AdamW's RMS (Liu et al. 2025, section 2.2), so that one scale serves both; `adamw_lr` is AdamW's. Both decay
    matrices, as `AdamW` does.
    """

    kind: Literal["muon"]
    lr: float = Field(2e-3, gt=0, description="peak learning rate of Muon")
    momentum: float = Field(0.95, ge=0, lt=1, description="of the gradients")
    weight_decay: float = Field(0.01, ge=0, description="times the learning rate, each step")
    adamw_lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field(
        (0.9, 0.99), description="of AdamW: decay of the averages of gradient and square"
    )


OptimConfig = Annotated[Annotated[AdamW, Tag("adamw")] | Annotated[Muon, Tag("muon")], by_kind("adamw")]


def build_optimizers(module: nn.Module, cfg: AdamW | Muon) -> list[torch.optim.Optimizer]:
    """The optimizers of a module, with every parameter in one group of one of them.

    Each group remembers its peak learning rate in `peak_lr`. A module without residual blocks has AdamW alone. No group
    mixes parameters that are sharded with others, as torch's fused kernels take one kind at a time.
    """
    by_muon, matrices = _by_muon(module, cfg), _matrices(module)
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for p in module.parameters():
        (hidden if id(p) in by_muon else decayed if id(p) in matrices else undecayed).append(p)
    groups = [
        {"params": alike, "weight_decay": decay}
        for params, decay in ((decayed, cfg.weight_decay), (undecayed, 0.0))
        for alike in by_sharding(params)
    ]
    optimizers: list[torch.optim.Optimizer] = []
    lr = cfg.adamw_lr if cfg.kind == "muon" else cfg.lr
    if groups:
        eps = AdamW().eps if cfg.kind == "muon" else cfg.eps
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=cfg.betas, eps=eps, fused=True))
    if cfg.kind == "muon" and hidden:
        alike = [{"params": params} for params in by_sharding(hidden)]
        optimizers.append(muon.Muon(alike, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def step_all(optimizers: Iterable[torch.optim.Optimizer], *, share: float, skip: Tensor, products: torch.dtype) -> None:
    """Apply the gradients with a share of each peak learning rate, or change nothing where the scalar `skip` is 1.

    Muon orthogonalizes in `products`, the dtype of the network's products.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch's fused optimizers take it
        if isinstance(optimizer, muon.Muon):
            optimizer.products = products
        optimizer.step()


def clip_gradients(module: nn.Module, most: float | None, *, scale: Tensor | float = 1.0) -> Tensor:
    """The norm of a module's gradients over all ranks, a scalar; they are scaled down where it is more than `most`.

    Gradients of a loss that was multiplied by the tensor `scale` are divided by it first.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    if isinstance(scale, Tensor):  # a power of two, so that nothing is rounded
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], 1 / scale)
    alike = by_sharding(parameters)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])) for some in alike]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if most is not None:
        for some in alike:
            nn.utils.clip_grads_with_norm_(some, most, norm)
    return norm.detach()


def optimizer_bytes(module: nn.Module, cfg: AdamW | Muon, *, held: Callable[[Tensor], int] = Tensor.numel) -> int:
    """Bytes that the optimizers of a module keep: two averages of AdamW's parameters, one momentum of Muon's.

    `held` says how many elements of a parameter a rank has.
    """
    by_muon = _by_muon(module, cfg)
    return sum(held(p) * p.element_size() * (1 if id(p) in by_muon else 2) for p in module.parameters())


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
