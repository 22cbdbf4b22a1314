"""The blocks that a network consists of, and what is done by block: sharding, and recomputing of activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from genpipe.models.layers import ResidualBlock, recomputed


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network in their order: elements of an `nn.ModuleList` and residual blocks, the outermost ones.

    A block computes when it is called, by `block(...)`, and has parameters.
    """
    return list(_outermost(module, listed=False))


def recompute_blocks(module: nn.Module) -> None:
    """Have the blocks of a network compute their activations again in the backward pass, instead of keeping them.

    Outputs and gradients are the same to the last bit. A block returns one tensor.
    """
    for block in blocks_of(module):
        block.forward = partial(recomputed, block.forward)


def _outermost(module: nn.Module, *, listed: bool) -> Iterator[nn.Module]:
    is_list = isinstance(module, nn.ModuleList)
    if (listed and not is_list) or isinstance(module, ResidualBlock):
        if any(True for _ in module.parameters()):
            yield module
        return
    for child in module.children():
        yield from _outermost(child, listed=is_list)
