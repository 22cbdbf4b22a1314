"""The loop: one for every training stage, on one process or many.

Randomness of a step derives from (seed, part, position in the stream), gradients are averaged by DDP, metrics
leave the device every `log_every` steps. Nothing between forward and optimizer step waits for the device.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genpipe.config import Resources
from genpipe.data.loader import Batches, Data, sample_batches, training_order
from genpipe.training.bad_samples import Damage
from genpipe.training.objective import Batch, Metrics, Objective, ObserveTraining, Step, Validation
from genpipe.training.optim import TrainConfig, lr_scale
from genpipe.training.runtime import Runtime
from genpipe.training.state import TrainState


def train(
    objective: Objective, data: Data, cfg: TrainConfig, rt: Runtime, resources: Resources, observe: ObserveTraining
) -> Validation:
    """Train `objective` to `cfg.samples` and return its last validation; the EMA weights are left in place.

    Starts from the runtime's newest checkpoint if there is one: N steps and k + resume + (N - k) steps give the
    same weights, bitwise on CPU. Every rank returns; metrics and pictures of the validation are rank 0's.

    Raises FloatingPointError when a loss or gradient stops being finite, before such weights are saved;
    Interrupted when the runtime asked for a stop, after a checkpoint.
    """
    state = TrainState.fresh(objective.trainable, cfg)
    state.resume(rt)
    forward = {part: _wrap(objective, part, module) for part, module in objective.trainable.items()}
    meter = _Meter(rt, cfg, state.step)
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
            _step(objective, forward, state, stream, cfg, rt, meter)
            last = state.step == cfg.steps
            if not last and _due(observe.validate_every, state.samples_seen, cfg.global_batch_size):
                _log_validation(validate(objective, data, cfg, rt, state, observe), rt, state)
            if not last and state.step % observe.log_every:
                continue
            meter.report(state, batches.wait_seconds, damage.report())  # before a save, as it raises on bad values
            stop, due = _agreed(rt, rt.should_stop(), time.monotonic() - saved_at > resources.checkpoint_seconds)
            if not last and (stop or due):
                if rt.rank == 0:
                    state.save(rt)
                saved_at = time.monotonic()
            if not last and stop:
                raise Interrupted(f"stopped at {state.samples_seen} samples; a new run goes on from there")
    result = validate(objective, data, cfg, rt, state, observe)
    _log_validation(result, rt, state)
    for ema in state.emas.values():
        ema.swap()
    return result


class Interrupted(Exception):
    """Training was asked to stop and did, with its checkpoint written."""


@torch.no_grad()
def validate(
    objective: Objective, data: Data, cfg: TrainConfig, rt: Runtime, state: TrainState, observe: ObserveTraining
) -> Validation:
    """Validate the EMA weights on `heldout_samples` held-out samples, always the same, on rank 0; the others wait."""
    result = Validation({})
    if rt.rank == 0:
        with ExitStack() as stack:
            for part, module in objective.trainable.items():
                stack.enter_context(state.emas[part].swapped())
                module.eval()
                stack.callback(module.train)
            stack.enter_context(autocast(cfg, rt))
            batches = sample_batches(
                data.heldout,
                count=observe.heldout_samples,
                batch_size=cfg.validation_batch,
                weights=cfg.source_weights,
            )
            moved = (to_device(batch, rt.device) for batch in batches)
            result = objective.validate(moved, seeded(rt.device, cfg.seed, "validate"))
        if bad := [name for name, value in result.metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"held-out {', '.join(bad)} is not finite after {state.samples_seen} samples")
    if rt.world_size > 1:
        dist.barrier()
    return result


def autocast(cfg: TrainConfig, rt: Runtime) -> torch.autocast:
    """bf16 matrix products where the configuration asks for them."""
    return torch.autocast(rt.device.type, dtype=torch.bfloat16, enabled=cfg.precision == "bf16")


def seeded(device: torch.device, *identity: object) -> torch.Generator:
    """A generator whose seed is a hash of `identity`."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class _PartLoss(nn.Module):
    """One part's loss as a module, which is what DDP wraps."""

    def __init__(self, objective: Objective, part: str, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.objective = objective
        self.part = part

    def forward(self, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        return self.objective.loss(self.part, batch, step)


def _wrap(objective: Objective, part: str, module: nn.Module) -> nn.Module:
    loss = _PartLoss(objective, part, module)
    trained = any(p.requires_grad for p in module.parameters())  # DDP takes no other
    if trained and dist.is_initialized() and dist.get_world_size() > 1:
        return DistributedDataParallel(loss, forward_sync_buffers=False)
    return loss


def _step(
    objective: Objective,
    forward: dict[str, nn.Module],
    state: TrainState,
    stream: Iterator[tuple[int, Batch]],
    cfg: TrainConfig,
    rt: Runtime,
    meter: _Meter,
) -> None:
    """One optimizer step of every active part on the same global batch."""
    accumulate = cfg.global_batch_size // (cfg.micro_batch(rt.world_size) * rt.world_size)
    micro = [(position, to_device(batch, rt.device)) for position, batch in _take(stream, accumulate)]
    scale = lr_scale(cfg, samples_seen=state.samples_seen)
    for part in objective.active(state.samples_seen):
        for name, module in objective.trainable.items():
            module.requires_grad_(name == part)
        for i, (position, batch) in enumerate(micro):
            step = Step(state.samples_seen, seeded(rt.device, cfg.seed, part, position))
            partial = rt.world_size > 1 and i < len(micro) - 1
            with forward[part].no_sync() if partial else nullcontext():  # type: ignore[operator]
                with autocast(cfg, rt):
                    loss, metrics = forward[part](batch, step)
                (loss / accumulate).backward()
            meter.add({f"{part}/loss": loss.detach(), **{f"{part}/{k}": v for k, v in metrics.items()}})
        norm = nn.utils.clip_grad_norm_(objective.trainable[part].parameters(), cfg.grad_clip)
        meter.add({f"{part}/grad_norm": norm.detach()})
        for optimizer in state.optimizers[part]:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        objective.after_step()
        state.emas[part].update()
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


def _log_validation(result: Validation, rt: Runtime, state: TrainState) -> None:
    if rt.rank == 0:
        rt.log({f"heldout/{k}": v for k, v in result.metrics.items()}, samples_seen=state.samples_seen)
        rt.log_images(result.images, samples_seen=state.samples_seen)


class _Meter:
    """Sums metrics on the device and brings their means to the host when asked."""

    def __init__(self, rt: Runtime, cfg: TrainConfig, step: int) -> None:
        self.rt = rt
        self.cfg = cfg
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.last = (time.monotonic(), step, 0.0)

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value.float() if name in self.sums else value.float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def report(self, state: TrainState, waited: float, bad_samples: int) -> None:
        """Log the means since the last report. Raises FloatingPointError if one is not finite."""
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        if self.rt.world_size > 1:
            dist.all_reduce(means)
            means /= self.rt.world_size
        values = dict(zip(self.sums, means.tolist(), strict=True))
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{', '.join(bad)} is not finite after {state.samples_seen} samples; lower train.optim.lr or "
                "train.grad_clip, or set train.precision=fp32 (the last checkpoint is from before this)"
            )
        now = (time.monotonic(), state.step, waited)
        seconds, steps, waiting = (a - b for a, b in zip(now, self.last, strict=True))
        values["samples_per_second"] = steps * self.cfg.global_batch_size / seconds
        values["step_seconds"] = seconds / steps
        values["data_wait_share"] = waiting / seconds
        values["bad_samples"] = float(bad_samples)
        values["lr_scale"] = lr_scale(self.cfg, samples_seen=state.samples_seen)
        if self.rt.rank == 0:
            self.rt.log(values, samples_seen=state.samples_seen)
        self.sums, self.counts, self.last = {}, {}, now
