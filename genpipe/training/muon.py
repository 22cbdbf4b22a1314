"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalized before they are applied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genpipe.training.sharding import is_sharded, local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration; they push singular values into about [0.7, 1.2] in five steps."""

STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for weights of two or more axes.

    A convolution's weight is the matrix [channels out, everything else]. Updates are scaled by 0.2 sqrt(larger side),
    which gives them the root mean square of AdamW's (Liu et al. 2025, eq. 4), so that one learning rate serves both.
    Matrices of one shape are orthogonalized together; the result equals torch.optim.Muon's on each. Of those that are
    sharded every rank orthogonalizes its share. A group holds parameters of one sharding.

    A step for which `found_inf` is 1 changes nothing, as with torch's fused optimizers.
    """

    found_inf: Tensor | None = None

    products: torch.dtype = torch.bfloat16
    """Of the orthogonalization. Training sets that of its own products: a CPU without bf16 instructions takes many
    times as long for those."""

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update."""
        assert closure is None, "the loop computes gradients itself"
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[torch.Size((len(p), p.numel() // len(p)))].append(p)
            for shape, params in alike.items():
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                updates = _orthogonalize_like(params[0], momenta, self.products)
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    mine = local(p)
                    new = mine.mul(1 - group["lr"] * group["weight_decay"])
                    self._replace(mine, new.add_(update.view_as(mine), alpha=-group["lr"] * scale))

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        assert p.grad is not None, "only parameters with gradients have updates"
        gradient, buffer = local(p.grad), local(state["momentum_buffer"])
        self._replace(buffer, buffer.lerp(gradient, 1 - momentum))
        return gradient.lerp(buffer, momentum).flatten(1)

    def _replace(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))


def orthogonalize(matrices: Tensor, products: torch.dtype) -> Tensor:
    """Matrices [N, A, B] with their singular values brought near 1, by Newton-Schulz in `products`; in their dtype."""
    a, b, c = COEFFICIENTS
    x = matrices.to(products)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _orthogonalize_like(like: Tensor, shards: Tensor, products: torch.dtype) -> Tensor:
    """This rank's rows of N orthogonalized matrices, from its rows of them [N, rows, B], sharded as the weight `like`.

    Each of the R ranks that share sharded matrices gets N / R of them whole, orthogonalizes those, and gives the others
    their rows back: twice what a rank holds goes over the network, and no product is computed twice.
    """
    if not is_sharded(like):
        return orthogonalize(shards, products)
    (axis,) = (axis for axis, placement in enumerate(like.placements) if placement.is_shard())
    group, ranks = like.device_mesh.get_group(axis), like.device_mesh.size(axis)
    n, rows, columns = shards.shape
    height = -(-len(like) // ranks)  # rows of every shard but the last ones
    each = -(-n // ranks)
    padded = shards.new_zeros(ranks * each, height, columns)
    padded[:n, :rows] = shards
    mine = torch.empty_like(padded)
    dist.all_to_all_single(mine, padded, group=group)
    whole = mine.view(ranks, each, height, columns).transpose(0, 1).reshape(each, ranks * height, columns)
    whole[:, : len(like)] = orthogonalize(whole[:, : len(like)], products)
    back = whole.view(each, ranks, height, columns).transpose(0, 1).reshape_as(padded).contiguous()
    dist.all_to_all_single(padded, back, group=group)
    return padded[:n, :rows]
