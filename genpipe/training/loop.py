"""The loop: one for every training stage, on one process or many.

Randomness of a step derives from (seed, name of the trainable module, position in the stream), gradients are averaged
by `training.parallel`, metrics leave the device every `log_every` steps. Nothing between forward and optimizer step
waits for it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
import torch.distributed as dist

from genpipe.config import Resources
from genpipe.data.loader import Batches, Data, sample_batches, training_order
from genpipe.models.precision import Products, autocast, products_of
from genpipe.training.bad_samples import Damage
from genpipe.training.meter import Meter
from genpipe.training.objective import Batch, Objective, ObserveTraining, Step, Validation
from genpipe.training.optim import clip_gradients
from genpipe.training.parallel import Parallel, spread
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig, lr_scale
from genpipe.training.state import TrainState


def train(
    objective: Objective, data: Data, cfg: TrainConfig, rt: Runtime, resources: Resources, observe: ObserveTraining
) -> Validation:
    """Train `objective` to `cfg.samples` and return its last validation; the EMA weights are left in place.

    Starts from the runtime's newest checkpoint if there is one: N steps and k + resume + (N - k) steps give the
    same weights, bitwise on CPU. Every rank returns; metrics and pictures of the validation are rank 0's.

    Raises ValueError where `cfg.trainable` names a module that the objective does not train; FloatingPointError when a
    loss or gradient stops being finite, before such weights are saved; Interrupted when the runtime asked for a stop,
    after a checkpoint.
    """
    cfg.check_trainable(objective.trainable)
    parallel = spread(objective, rt, resources)
    state = TrainState.fresh(objective.trainable, cfg)
    if not state.resume(rt):
        state.products = _agreed_products(cfg, rt)
    if rt.rank == 0:
        rt.log_environment({"precision_used": state.products})
    meter = Meter(rt, global_batch_size=cfg.global_batch_size, step=state.step)
    micro_batch = cfg.micro_batch(rt.world_size)
    saved_at = time.monotonic()
    loaders = resources.loader_processes or resources.loader_threads
    batches = Batches(
        data.train.collate,
        order=training_order(
            data,
            weights=cfg.source_weights,
            seed=cfg.seed,
            run=cfg.micro_batch_size or cfg.global_batch_size,
        ),
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=micro_batch,
        rank=rt.rank,
        world_size=rt.world_size,
        start=state.samples_seen,
        prefetch=max(2 * cfg.global_batch_size // (micro_batch * rt.world_size), loaders + 1),
        threads=resources.loader_threads,
        processes=resources.loader_processes,
        pin=rt.device.type == "cuda",
    )
    damage = Damage(batches, rt, length=data.train.length, max_share=cfg.max_bad_share, start=state.samples_seen)
    with ExitStack() as stack:
        stack.callback(batches.close)
        stream = iter(batches)
        while state.step < cfg.steps:
            _step(objective, parallel, state, stream, cfg, rt, meter)
            last = state.step == cfg.steps
            if not last and _due(observe.validate_every, state.samples_seen, cfg.global_batch_size):
                _log_validation(validate(objective, parallel, data, cfg, rt, state, observe), rt, state)
            if not last and state.step % observe.log_every:
                continue
            meter.report(state, waited=batches.wait_seconds, bad_samples=damage.report())  # raises, so before a save
            stop, due = _agreed(rt, rt.should_stop(), time.monotonic() - saved_at > resources.checkpoint_seconds)
            if not last and (stop or due):
                if rt.rank == 0:
                    state.save(rt)
                saved_at = time.monotonic()
            if not last and stop:
                raise Interrupted(f"stopped at {state.samples_seen} samples; a new run goes on from there")
    result = validate(objective, parallel, data, cfg, rt, state, observe)
    _log_validation(result, rt, state)
    for ema in state.emas.values():
        ema.swap()
    return result


class Interrupted(Exception):
    """Training was asked to stop and did, with its checkpoint written."""


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
    """Validate the EMA weights on `heldout_samples` held-out samples, always the same.

    What is found is rank 0's. The others wait for it, or compute the same where weights are sharded.
    """
    result = Validation({})
    if rt.rank == 0 or parallel.together:
        with ExitStack() as stack:
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
    if rt.world_size > 1:
        dist.barrier()
    return result if rt.rank == 0 else Validation({})


def seeded(device: torch.device, *identity: object) -> torch.Generator:
    """A generator whose seed is a hash of `identity`."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied behind the host's back where its memory is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _step(
    objective: Objective,
    parallel: Parallel,
    state: TrainState,
    stream: Iterator[tuple[int, Batch]],
    cfg: TrainConfig,
    rt: Runtime,
    meter: Meter,
) -> None:
    """One optimizer step of every module whose turn it is, all on the same global batch."""
    accumulate = cfg.global_batch_size // (cfg.micro_batch(rt.world_size) * rt.world_size)
    micro = [(position, to_device(batch, rt.device)) for position, batch in _take(stream, accumulate)]
    for name in objective.active(state.samples_seen):
        if state.step % cfg.every(name):
            continue
        for other, module in objective.trainable.items():
            module.requires_grad_(other == name)
        for i, (position, batch) in enumerate(micro):
            step = Step(state.samples_seen, seeded(rt.device, cfg.seed, name, position))
            with parallel.accumulating(name, last=i == len(micro) - 1):
                with autocast(rt.device, state.products):
                    loss, metrics = parallel.loss(name, batch, step)
                (loss / accumulate).backward()
            meter.add({f"{name}/loss": loss.detach(), **{f"{name}/{k}": v for k, v in metrics.items()}})
        meter.add({f"{name}/grad_norm": clip_gradients(objective.trainable[name], cfg.grad_clip)})
        scale = lr_scale(cfg.of(name), samples_seen=state.samples_seen)
        for optimizer in state.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
        parallel.zero_grad(name)
        meter.rates[name] = cfg.of(name).optim.lr * scale
        objective.after_step()
        state.emas[name].update()
    state.samples_seen += cfg.global_batch_size
    state.step += 1


def _take(stream: Iterator[tuple[int, Batch]], n: int) -> Iterable[tuple[int, Batch]]:
    return [next(stream) for _ in range(n)]


def _due(every: int, samples_seen: int, step: int) -> bool:
    """Whether this step crossed a multiple of `every`."""
    return every > 0 and samples_seen // every > (samples_seen - step) // every


def _agreed(rt: Runtime, *flags: bool) -> list[bool]:
    """Rank 0's flags: all ranks must take the same turn, and their clocks differ."""
    if rt.world_size == 1:
        return list(flags)
    answer = torch.tensor(flags, dtype=torch.uint8, device=rt.device)
    dist.broadcast(answer, src=0)
    return [bool(flag) for flag in answer.tolist()]


def _agreed_products(cfg: TrainConfig, rt: Runtime) -> Products:
    """The precision of products that rank 0 finds: ranks on unlike machines must not differ."""
    [bf16] = _agreed(rt, rt.rank == 0 and products_of(cfg.precision, rt.device) == "bf16")
    return "bf16" if bf16 else "fp32"


def _log_validation(result: Validation, rt: Runtime, state: TrainState) -> None:
    if rt.rank == 0:
        rt.log({f"heldout/{k}": v for k, v in result.metrics.items()}, samples_seen=state.samples_seen)
        rt.log_images(result.images, samples_seen=state.samples_seen)
