"""Validation of the averaged weights, while training and at its end."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
import torch.distributed as dist

from genpipe.data.loader import Data, sample_batches
from genpipe.models.precision import autocast
from genpipe.training.compile import eagerly
from genpipe.training.objective import Objective, ObserveTraining, Validation
from genpipe.training.parallel import Parallel
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState
from genpipe.training.stream import seeded, to_device


@torch.no_grad()
def validate(
    objective: Objective,
    parallel: Parallel,
    data: Data,
    cfg: TrainConfig,
    rt: Runtime,
    state: TrainState,
    observe: ObserveTraining,
) -> Validation:
    """Validate the EMA weights on `heldout_samples` held-out samples, always the same, and log what was found.

    Rank 0 does; the others wait, or take part where weights are sharded, and get nothing. Raises FloatingPointError
    for a metric that is not finite.
    """
    result = Validation({})
    rt.enter("validation")
    if rt.rank == 0 or parallel.together:
        with ExitStack() as stack:
            stack.enter_context(eagerly(objective))  # batches of other sizes are not worth compiling for
            for name, module in objective.trainable.items():
                stack.enter_context(state.emas[name].swapped())
                module.eval()
                stack.callback(module.train)
            stack.enter_context(autocast(rt.device, state.products))
            batches = sample_batches(
                data.heldout,
                count=observe.heldout_samples,
                batch_size=cfg.validation_batch,
                weights=cfg.source_weights,
            )
            moved = (to_device(batch, rt.device) for batch in batches)
            result = parallel.validate(moved, seeded(rt.device, cfg.seed, "validate"))
        if bad := [name for name, value in result.metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"held-out {', '.join(bad)} is not finite after {state.samples_seen} samples")
    if rt.rank == 0:
        rt.log({f"heldout/{k}": v for k, v in result.metrics.items()}, samples_seen=state.samples_seen)
        rt.log_images(result.images, samples_seen=state.samples_seen)
    if rt.world_size > 1:
        dist.barrier()
    return result if rt.rank == 0 else Validation({})
