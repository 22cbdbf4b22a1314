"""The scale of a loss in fp16, so that gradients neither vanish nor overflow (Micikevicius et al. 2018, sec. 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, LEAST = 2.0**16, 1.0
GROWTH_STEPS = 2000
"""Steps without an overflow after which the scale is doubled, as in torch.amp.GradScaler."""


class LossScale:
    """A power of two, fp32, that gradients are multiplied with: halved where they overflowed, else doubled in time.

    It lives on the device, and nothing waits for it. Each module has its own, as each has its own loss.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST, device=device)
        self.steps = torch.zeros((), device=device)
        """Since the scale last changed."""

    @torch.no_grad()
    def update(self, skip: Tensor) -> Tensor:
        """Take note of a step whose scaled gradients were not finite (1) or were (0).

        Returns 1 where that was not for the scale's sake, as it is at its least: they would not be finite without it.
        """
        bad = skip * (self.value <= LEAST)
        steps = torch.where(skip.bool(), 0.0, self.steps + 1)
        grown = torch.where(steps >= GROWTH_STEPS, 2 * self.value, self.value)
        self.value.copy_(torch.where(skip.bool(), self.value / 2, grown).clamp(min=LEAST))
        self.steps.copy_(torch.where(steps >= GROWTH_STEPS, 0.0, steps))
        return bad

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; writing to them writes to the scale."""
        return {"value": self.value, "steps": self.steps}
