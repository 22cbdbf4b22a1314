"""Whether a loss has reached its plateau: decided alike by every rank, and again after a resume."""

from __future__ import annotations

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from genpipe.config import Config


class PlateauConfig(Config):
    """When a loss has reached its plateau: no longer better by much from one window of training to the next."""

    window: int = Field(20_000, ge=1, description="samples over which the loss is averaged")
    improvement: float = Field(0.02, ge=0, lt=1, description="share by which a window's mean must fall to go on")


class Plateau(nn.Module):
    """Decides that a loss has reached its plateau, by its mean over one window of steps against the next.

    The sums are taken over all ranks and kept in a buffer, so that every rank decides alike and a resumed run goes on
    where it was. The host looks at the answer, `reached`, once a window.
    """

    state: Tensor

    def __init__(self, cfg: PlateauConfig, *, batch_size: int) -> None:
        super().__init__()
        self.improvement = cfg.improvement
        self.batch_size = batch_size
        self.steps = -(-cfg.window // batch_size)
        self.reached = False
        self._looked = False
        self._pending: Tensor | None = None
        # The window's sum of losses and its steps so far, the mean of the window before, and the answer.
        self.register_buffer("state", torch.tensor([0.0, 0.0, torch.inf, 0.0]))

    def look(self, samples_seen: int) -> None:
        """Bring the answer to the host where it may have changed: at the end of a window, and after a resume."""
        if not self._looked or (not self.reached and samples_seen // self.batch_size % self.steps == 0):
            # On the meta device, where the cost of everything is planned, it has.
            self.reached, self._looked = self.state.is_meta or bool(self.state[3].item()), True

    def add(self, loss_sum: Tensor) -> None:
        """Note the summed loss of one micro-batch's samples."""
        self._pending = loss_sum if self._pending is None else self._pending + loss_sum

    @torch.no_grad()
    def update(self) -> None:
        """Take what was noted as the loss of one step; does nothing where nothing was noted."""
        if self._pending is None:
            return
        loss, self._pending = self._pending / self.batch_size, None
        if self.reached:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(loss)
        total, steps, before, reached = self.state.unbind()
        total, steps = total + loss, steps + 1
        full = steps >= self.steps
        mean = total / steps
        enough = (full & (mean >= (1 - self.improvement) * before)).float()
        zero = torch.zeros_like(total)
        kept = torch.where(full, zero, total), torch.where(full, zero, steps), torch.where(full, mean, before)
        self.state.copy_(torch.stack([*kept, torch.maximum(reached, enough)]))
