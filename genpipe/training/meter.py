"""What a training step measured: summed on the device, and brought to the host when metrics are due."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from genpipe.training.objective import Metrics
from genpipe.training.runtime import Runtime
from genpipe.training.state import TrainState


class Meter:
    """Sums metrics on the device and logs their means when asked, with the learning rates and the clock's rates."""

    def __init__(self, rt: Runtime, *, global_batch_size: int, step: int) -> None:
        self.rt = rt
        self.global_batch_size = global_batch_size
        self.rates: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.last = (time.monotonic(), step, 0.0)

    def add(self, metrics: Metrics) -> None:
        """Take detached scalars of one micro-batch, or of one step."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value.float() if name in self.sums else value.float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def report(self, state: TrainState, *, waited: float, bad_samples: int) -> None:
        """Log the means since the last report; `waited` is the seconds so far that steps have waited for data.

        Raises FloatingPointError if a mean is not finite.
        """
        values = self._means()
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{', '.join(bad)} is not finite after {state.samples_seen} samples; lower train.optim.lr or "
                "train.grad_clip, or set train.precision=fp32 (the last checkpoint is from before this)"
            )
        now = (time.monotonic(), state.step, waited)
        seconds, steps, waiting = (a - b for a, b in zip(now, self.last, strict=True))
        values |= {f"{name}/lr": rate for name, rate in self.rates.items()}
        values["samples_per_second"] = steps * self.global_batch_size / seconds
        values["step_seconds"] = seconds / steps
        values["data_wait_share"] = waiting / seconds
        values["bad_samples"] = float(bad_samples)
        if self.rt.rank == 0:
            self.rt.log(values, samples_seen=state.samples_seen)
        self.sums, self.counts, self.last = {}, {}, now

    def _means(self) -> dict[str, float]:
        """Over the micro-batches of all ranks; empty where no module was updated."""
        if not self.sums:
            return {}
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        if self.rt.world_size > 1:
            dist.all_reduce(means)
            means /= self.rt.world_size
        return dict(zip(self.sums, means.tolist(), strict=True))
