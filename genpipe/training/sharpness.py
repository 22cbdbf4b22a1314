"""Sharpness-aware minimization: gradients are taken where the loss is worst nearby (Foret et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def sharpened(
    module: nn.Module, loss: Callable[[], tuple[Tensor, object]], *, rho: float, scale: Tensor | float = 1.0
) -> Iterator[None]:
    """Within the context, the weights are moved by `rho` along the gradient of `loss` (Foret et al. 2021, eq. 2).

    `loss` returns the loss and its metrics, which are ignored; `scale` keeps its gradients within the range of fp16.
    The weights are restored on exit, bit for bit. The gradient is that of this rank's micro-batch and is not averaged
    over ranks: every replica climbs by itself, as in the paper (sec. 4.1, m-sharpness: smaller batches generalize
    better) and in unCLIP (Ramesh et al. 2022, appendix C). With `micro_batch_size` set, the step is therefore the same
    for any number of ranks.
    """
    weights: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss()[0] * scale, weights, materialize_grads=True)
    with torch.no_grad():
        torch._foreach_mul_(gradients, rho / nn.utils.get_total_norm(gradients).clamp(min=1e-12))
        kept = [p.clone() for p in weights]
        torch._foreach_add_(weights, gradients)
    del gradients
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
