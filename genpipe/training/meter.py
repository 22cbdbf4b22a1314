"""What a training step measured: summed on the device, and brought to the host when metrics are due."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from genpipe.training.objective import Metrics
from genpipe.training.runtime import Runtime
from genpipe.training.state import TrainState


class Meter:
    """Sums metrics on the device and logs their means when asked, with the learning rates and the clock's rates.

    `peak_flops` are those of one rank's device in a second.
    """

    def __init__(self, rt: Runtime, *, global_batch_size: int, peak_flops: float) -> None:
        self.rt = rt
        self.global_batch_size, self.peak_flops = global_batch_size, peak_flops
        self.rates: dict[str, float] = {}
        self.flops_of: dict[tuple[str, ...], int] = {}
        """Of a micro-batch, by its module and those that are trained: known when it is first computed."""
        self.restart()

    def restart(self) -> None:
        """Begin anew, as training went back and reads another stream of data."""
        self._sums: dict[tuple[str, ...], Tensor] = {}
        """By the names of metrics that are added together: their sums, and the number of steps."""
        self._waited = 0.0
        self._next()

    def _next(self) -> None:
        self._sums, self._steps, self._flops, self._aside, self._since = {}, 0, 0, 0.0, time.monotonic()

    def count(self, *, flops: int) -> None:
        """Take note of a step, with the operations of this rank."""
        self._steps += 1
        self._flops += flops

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the time inside for no part of a step."""
        begun = time.monotonic()
        yield
        self._aside += time.monotonic() - begun

    def add(self, metrics: Metrics, *, skip: Tensor) -> None:
        """Take the detached scalars of one step, or nothing of it where `skip` is 1."""
        names = tuple(metrics)
        values = torch.stack([*(value.float() for value in metrics.values()), torch.ones_like(skip)])
        values = torch.where(skip.bool(), 0.0, values)
        self._sums[names] = self._sums[names] + values if names in self._sums else values

    def report(self, state: TrainState, *, waited: float, log: bool, **others: float) -> None:
        """Log the means since the last report, but for those that are not finite, and `others`, unless not to `log`.

        `waited` is the seconds so far that steps have waited for data.
        """
        values = self._means()
        seconds, waiting = time.monotonic() - self._since, waited - self._waited
        values |= {f"{name}/lr": rate for name, rate in self.rates.items()}
        values["samples_per_second"] = self._steps * self.global_batch_size / seconds
        values["step_seconds"] = seconds / self._steps
        values["data_wait_share"], values["other_share"] = waiting / seconds, self._aside / seconds
        values["compute_share"] = 1 - values["data_wait_share"] - values["other_share"]
        values["mfu"] = self._flops / seconds / self.peak_flops
        values["peak_memory_gib"] = peak_memory(self.rt.device) / 2**30
        values["skipped_steps"] = float(state.guard.skipped_steps)
        values["rollbacks"] = float(len(state.guard.windows))
        self._waited = waited
        self._next()
        if log and self.rt.rank == 0:
            with self.aside():
                self.rt.log(values | others, samples_seen=state.samples_seen)

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


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors held at once on a GPU, or that this process held, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
