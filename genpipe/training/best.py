"""The weights of the best held-out validation, kept aside while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genpipe.training.ema import Ema
from genpipe.training.settings import BestConfig
from genpipe.training.sharding import local


class Best:
    """A copy of the averaged weights, and the buffers, of each trainable module as the best validation found them.

    `value` is what it found (None before the first) at `samples_seen`. It is part of a training's state, so a resumed
    run compares with what the first one found.
    """

    def __init__(self, cfg: BestConfig, trainable: Mapping[str, nn.Module]) -> None:
        self.cfg = cfg
        self.value: float | None = None
        self.samples_seen = 0
        self.kept = {
            f"{name}/{key}": tensor.detach().clone()
            for name, module in trainable.items()
            for key, tensor in module.state_dict().items()
        }

    def better(self, value: float) -> bool:
        """Whether a value is better than the best so far; an equal one is not."""
        if self.value is None:
            return True
        return value < self.value if self.cfg.goal == "min" else value > self.value

    @torch.no_grad()
    def take(self, value: float, trainable: Mapping[str, nn.Module], emas: Mapping[str, Ema], *, at: int) -> None:
        """Keep the weights as they are, whose `value` is the best."""
        self.value, self.samples_seen = value, at
        for name, module in trainable.items():
            with emas[name].swapped():
                for key, tensor in module.state_dict().items():
                    local(self.kept[f"{name}/{key}"]).copy_(local(tensor))

    @torch.no_grad()
    def put_back(self, trainable: Mapping[str, nn.Module], emas: Mapping[str, Ema]) -> None:
        """Make the averages, and the buffers, what was kept."""
        for name, module in trainable.items():
            with emas[name].swapped():
                for key, tensor in module.state_dict().items():
                    local(tensor).copy_(local(self.kept[f"{name}/{key}"]))

    def exhausted(self, samples_seen: int) -> bool:
        """Whether the patience is over: nothing better for so many samples."""
        patience = self.cfg.patience
        return patience is not None and samples_seen - self.samples_seen >= patience

    def tensors(self) -> dict[str, Tensor]:
        """The kept weights by MODULE/WEIGHT."""
        return self.kept

    def state_dict(self) -> dict[str, Any]:
        """All but the tensors, as JSON values."""
        return {"value": self.value, "samples_seen": self.samples_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.value, self.samples_seen = state["value"], state["samples_seen"]
