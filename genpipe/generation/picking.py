"""Some pictures of a batch by themselves: the same ones, at their own cost. K are drawn of a batch of B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from genpipe.diffusion.noise import RowGenerator
from genpipe.generation.conditions import Conditions


class Draw(Protocol):
    """Draws a system's pictures [B, 3, S, S] in [-1, 1] of a batch of conditions."""

    def __call__(self, conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        """As the system's own `sample`."""
        ...


def pick(draw: Draw, conditions: Conditions, rows: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """The pictures [K, 3, S, S] at the places `rows` of those that `draw` makes of the conditions; it makes no others.

    They begin with the noise that they have in the whole batch, and are told the same. What is left of a difference is
    rounding: a network may add up the terms of a product in another order for K pictures than for B, where the kernel
    that multiplies them is chosen by their number.
    """
    own = RowGenerator.of(generator, count=conditions.count, rows=rows)
    return draw(conditions.at(rows), generator=own)
