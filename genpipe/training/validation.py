"""Validation of the averaged weights, while training and at its end."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
import torch.distributed as dist

from genpipe.data.loader import Data, sample_batches
from genpipe.models.precision import autocast
from genpipe.training.compile import eagerly
from genpipe.training.objective import Objective, Validation
from genpipe.training.parallel import Parallel
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState, agreed
from genpipe.training.stream import seeded, to_device


@torch.no_grad()
def validate(
    objective: Objective,
    parallel: Parallel,
    data: Data,
    cfg: TrainConfig,
    rt: Runtime,
    state: TrainState,
    *,
    heldout_samples: int,
    log_at: int | None,
) -> Validation:
    """Validate the EMA weights on `heldout_samples` held-out samples, always the same.

    What was found is logged at `log_at` samples, if that is not None. Rank 0 does all of it; the others wait, or take
    part where weights are sharded, and get nothing. Raises FloatingPointError for a metric that is not finite.
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
                count=heldout_samples,
                batch_size=cfg.validation_batch,
                weights=cfg.source_weights,
            )
            moved = (to_device(batch, rt.device) for batch in batches)
            result = parallel.validate(moved, seeded(rt.device, cfg.seed, "validate"))
        if bad := [name for name, value in result.metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"held-out {', '.join(bad)} is not finite after {state.samples_seen} samples")
    if rt.rank == 0 and log_at is not None:
        rt.log({f"heldout/{k}": v for k, v in result.metrics.items()}, samples_seen=log_at)
        rt.log_images(result.images, samples_seen=log_at)
    if rt.world_size > 1:
        dist.barrier()
    return result if rt.rank == 0 else Validation({})


def keep_if_best(
    objective: Objective,
    parallel: Parallel,
    data: Data,
    cfg: TrainConfig,
    rt: Runtime,
    state: TrainState,
    *,
    log: bool,
) -> bool:
    """Validate the EMA weights and keep them if they are the best so far; whether training has lasted long enough.

    All ranks come to the same answer, which follows from the weights alone. Raises ValueError, naming those that there
    are, if there is no metric `train.best.metric`.
    """
    best = state.best
    assert best is not None, "train.best is set"
    log_at = state.samples_seen if log else None
    found = validate(
        objective, parallel, data, cfg, rt, state, heldout_samples=best.cfg.heldout_samples, log_at=log_at
    ).metrics
    value, known = agreed(rt, (found.get(best.cfg.metric), sorted(found)))
    if value is None:
        raise ValueError(f"train.best.metric: validation gives no {best.cfg.metric!r}; it gives {', '.join(known)}")
    if rt.rank == 0:
        state.heldout = found
    if best.better(value):
        best.take(value, objective.trainable, state.emas, at=state.samples_seen)
    return best.exhausted(state.samples_seen)
