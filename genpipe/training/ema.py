"""Averages of weights over a training, updated step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from genpipe.training.sharding import in_host_memory, local, whole, whole_from_host

WIDEST = 12**-0.5
"""The width of the average of all steps alike, which that of a power function approaches."""


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power-function average of width `sigma_rel` (Karras et al. 2024, EDM2, section 3.1).

    Its profile over the steps s of a training so far is proportional to s^gamma; its width is the profile's standard
    deviation, sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), as a share of the steps. So the average grows with the
    training, as one of fixed decay does not.
    """
    assert 0 < sigma_rel < WIDEST, "checked in TrainConfig"
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class Ema:
    """A running average of a module's parameters, updated once an optimizer step.

    The decay of step k is min(decay, (1 + k) / (10 + k)), so that the first weights do not linger; with `sigma_rel` it
    is that of a power-function average of this width. Buffers are the module's own. Shadows are kept in the parameters'
    own dtype, sharded as they are, and on their device, or if they are to be `offloaded` in host memory: each then
    passes through the device in an update, which gives the same bits.
    """

    def __init__(
        self, module: nn.Module, *, decay: float, sigma_rel: float | None = None, offloaded: bool = False
    ) -> None:
        self.module = module
        self.decay = decay
        self.sigma_rel = sigma_rel
        self.gamma = None if sigma_rel is None else gamma_of(sigma_rel)
        self.updates = 0
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.offloaded = offloaded
        copy = in_host_memory if self.offloaded else torch.clone
        self.shadow = {name: copy(p.detach()) for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.gamma is not None:
            decay = (1 - 1 / (self.updates + 1)) ** (self.gamma + 1)
        weights = dict(self.module.named_parameters())
        live = [local(weights[name].detach()) for name in self.shadow]
        shadow = [local(shadow) for shadow in self.shadow.values()]
        if self.offloaded:
            for host, weight in zip(shadow, live, strict=True):
                host.copy_(host.to(self.device, non_blocking=True).lerp_(weight, 1 - decay), non_blocking=True)
        else:
            torch._foreach_lerp_(shadow, live, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module with the averaged weights, inside the block; its own come back after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the averaged ones."""
        self._settle()
        for name, p in self.module.named_parameters():
            weights, shadow = local(p.detach()), local(self.shadow[name])
            live = weights.clone()
            weights.copy_(shadow)
            shadow.copy_(live)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by name, as they are kept."""
        self._settle()
        return self.shadow

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by name, and the number of updates."""
        return {**self.weights(), "__updates__": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.updates = int(state["__updates__"])
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])

    def gathered(self, *, keep: bool) -> dict[str, Tensor]:
        """Copies of the averaged weights by name, whole and in host memory, which all ranks must call.

        Those who do not `keep` them get none.
        """
        self._settle()
        found: dict[str, Tensor] = {}
        for name, shadow in self.shadow.items():
            tensor = whole_from_host(shadow, self.device) if self.offloaded else whole(shadow)
            if keep:
                found[name] = tensor.to("cpu", copy=True)
        return found

    def _settle(self) -> None:
        """Wait for what is on its way to host memory."""
        if self.offloaded and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
