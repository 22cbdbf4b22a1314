"""What a training step measured: summed on the device, and brought to the host when metrics are due."""

from __future__ import annotations

import math
import time
from itertools import islice

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
        self._sums: dict[tuple[str, ...], Tensor] = {}
        """By the names of metrics that are added together: their sums, and the number of steps."""
        self.last = (time.monotonic(), step, 0.0)

    def add(self, metrics: Metrics, *, skip: Tensor) -> None:
        """Take the detached scalars of one step, or nothing of it where `skip` is 1."""
        names = tuple(metrics)
        values = torch.stack([*(value.float() for value in metrics.values()), torch.ones_like(skip)])
        values = torch.where(skip.bool(), 0.0, values)
        self._sums[names] = self._sums[names] + values if names in self._sums else values

    def restart(self, state: TrainState) -> None:
        """Begin anew where training went back to, with another stream of data."""
        self._sums, self.last = {}, (time.monotonic(), state.step, 0.0)

    def report(self, state: TrainState, *, waited: float, bad_samples: int, log: bool) -> None:
        """Log the means since the last report, but for those that are not finite, unless not to `log`.

        `waited` is the seconds so far that steps have waited for data.
        """
        values = self._means()
        now = (time.monotonic(), state.step, waited)
        seconds, steps, waiting = (a - b for a, b in zip(now, self.last, strict=True))
        values |= {f"{name}/lr": rate for name, rate in self.rates.items()}
        values["samples_per_second"] = steps * self.global_batch_size / seconds
        values["step_seconds"] = seconds / steps
        values["data_wait_share"] = waiting / seconds
        values["bad_samples"] = float(bad_samples)
        values["skipped_steps"] = float(state.guard.skipped_steps)
        values["rollbacks"] = float(len(state.guard.windows))
        if log and self.rt.rank == 0:
            self.rt.log(values, samples_seen=state.samples_seen)
        self._sums, self.last = {}, now

    def _means(self) -> dict[str, float]:
        """Over the steps of all ranks; empty where no module was updated."""
        if not self._sums:
            return {}
        sums = torch.cat(list(self._sums.values()))
        if self.rt.world_size > 1:
            dist.all_reduce(sums)
        found: dict[str, list[float]] = {}
        left = iter(sums.tolist())
        for names in self._sums:
            *values, steps = islice(left, len(names) + 1)
            for name, value in zip(names, values, strict=True):
                total, count = found.get(name, (0.0, 0.0))
                found[name] = [total + value, count + steps]
        means = {name: total / steps for name, (total, steps) in found.items() if steps}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}
