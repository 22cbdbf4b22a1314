"""Validation of the averaged weights, while training and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
import torch.distributed as dist

from genpipe.data.loader import Data, sample_batches
from genpipe.models.precision import Products, autocast
from genpipe.training.compile import eagerly
from genpipe.training.objective import Batch, Objective, Validation
from genpipe.training.parallel import Parallel
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState, agreed
from genpipe.training.stream import seeded, to_device


def validate(
    objective: Objective,
    parallel: Parallel,
    data: Data,
    cfg: TrainConfig,
    rt: Runtime,
    state: TrainState,
    *,
    heldout_samples: int,
    samples_seen: int,
) -> Validation:
    """Validate the EMA weights, which have seen `samples_seen` samples.

    Rank 0 does all of it; the others wait, or take part where weights are sharded, and get nothing. Raises
    FloatingPointError for a metric that is not finite.
    """
    result = Validation({})
    rt.enter("validation")
    if rt.rank == 0 or parallel.together:
        with ExitStack() as swapped:
            for ema in state.emas.values():
                swapped.enter_context(ema.swapped())
            result = measure(
                objective,
                parallel.validate,
                data,
                cfg,
                device=rt.device,
                products=state.products,
                heldout_samples=heldout_samples,
            )
        check_finite(result, samples_seen=samples_seen)
    if rt.world_size > 1:
        dist.barrier()
    return result if rt.rank == 0 else Validation({})


@torch.no_grad()
def measure(
    objective: Objective,
    run: Callable[[Iterable[Batch], torch.Generator], Validation],
    data: Data,
    cfg: TrainConfig,
    *,
    device: torch.device,
    products: Products,
    heldout_samples: int,
) -> Validation:
    """What `run`, which is `objective.validate` or goes there, finds with the weights as they are.

    It is given `heldout_samples` held-out samples and noise, always the same.
    """
    with ExitStack() as stack:
        stack.enter_context(eagerly(objective))  # batches of other sizes are not worth compiling for
        for module in objective.trainable.values():
            module.eval()
            stack.callback(module.train)
        stack.enter_context(autocast(device, products))
        batches = sample_batches(
            data.heldout,
            count=heldout_samples,
            batch_size=cfg.validation_batch,
            weights=cfg.source_weights,
        )
        moved = (to_device(batch, device) for batch in batches)
        return run(moved, seeded(device, cfg.seed, "validate"))


def check_finite(found: Validation, *, samples_seen: int) -> None:
    """Raise FloatingPointError for a metric that is not finite."""
    if bad := [name for name, value in found.metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"held-out {', '.join(bad)} is not finite after {samples_seen} samples")


def record(found: Validation, rt: Runtime, *, samples_seen: int) -> None:
    """Log what was found, on rank 0."""
    if rt.rank == 0:
        rt.log({f"heldout/{k}": v for k, v in found.metrics.items()}, samples_seen=samples_seen)
        rt.log_images(found.images, samples_seen=samples_seen)


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
    at, heldout_samples = state.samples_seen, best.cfg.heldout_samples
    validation = validate(objective, parallel, data, cfg, rt, state, heldout_samples=heldout_samples, samples_seen=at)
    if log:
        record(validation, rt, samples_seen=at)
    found = validation.metrics
    value, known = agreed(rt, (found.get(best.cfg.metric), sorted(found)))
    if value is None:
        raise ValueError(f"train.best.metric: validation gives no {best.cfg.metric!r}; it gives {', '.join(known)}")
    if rt.rank == 0:
        state.heldout = found
    if best.better(value):
        best.take(value, objective.trainable, state.emas, at=at)
    return best.exhausted(at)
