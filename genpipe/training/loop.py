"""The loop: one for every training stage, on one process or many.

Randomness of a step derives from (seed, name of the trainable module, position in the stream), gradients are averaged
by `training.parallel`, metrics leave the device every `log_every` steps. Nothing between forward and optimizer step
waits for it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from genpipe.config import Resources
from genpipe.data.loader import Data, sample_batches
from genpipe.models.precision import Products, autocast, products_of
from genpipe.training.agreement import Agreement
from genpipe.training.guard import HeldBuffers, spread_if_bad
from genpipe.training.meter import Meter
from genpipe.training.objective import Batch, Metrics, Objective, ObserveTraining, Step, Validation
from genpipe.training.optim import clip_gradients
from genpipe.training.parallel import Parallel, spread
from genpipe.training.rollback import facts, roll_back
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig, lr_scale
from genpipe.training.sharpness import sharpened
from genpipe.training.state import TrainState
from genpipe.training.stream import open_stream


def train(
    objective: Objective, data: Data, cfg: TrainConfig, rt: Runtime, resources: Resources, observe: ObserveTraining
) -> Validation:
    """Train `objective` to `cfg.samples` and return its last validation; the EMA weights are left in place.

    Starts from the runtime's newest checkpoint if there is one: N steps and k + resume + (N - k) steps give the
    same weights, bitwise on CPU. Every rank returns; metrics and pictures of the validation are rank 0's.

    A step whose loss or gradient is not finite is skipped; see `cfg.guard` for what a run of them leads to.

    Raises ValueError where `cfg.trainable` names a module that the objective does not train; FloatingPointError when
    numbers stop being finite for good, before such weights are saved; Interrupted when the runtime asked for a stop,
    after a checkpoint.
    """
    cfg.check_trainable(objective.trainable)
    parallel = spread(objective, rt, resources)
    if cfg.sam_rho and parallel.together:
        raise ValueError(
            "train.sam_rho moves a rank's weights by its own micro-batch, which sharded ones cannot; set "
            "resources.shard_over to 1"
        )
    state = TrainState.fresh(objective.trainable, cfg)
    if not state.resume(rt):
        state.products = _agreed_products(cfg, rt)
        if cfg.steps:
            state.save(rt)  # what to go back to
    if rt.rank == 0:
        rt.log_environment({"precision_used": state.products, **facts(state)})
    meter = Meter(rt, global_batch_size=cfg.global_batch_size, step=state.step)
    held = HeldBuffers(objective.trainable.values())
    agreement = Agreement(rt, flags=2)
    saved_at, validated = time.monotonic(), False  # since the last checkpoint
    with state.checkpoints_finished(), ExitStack() as stream:
        batches, damage = open_stream(stream, data, cfg, rt, resources, state)
        while state.step < cfg.steps:
            before = state.samples_seen
            _step(objective, parallel, state, batches, cfg, rt, meter, held)
            late = time.monotonic() - saved_at > resources.checkpoint_seconds or bool(validated and observe.keep_best)
            stop, due = agreement.ask(rt.should_stop(), rt.rank == 0 and late and not state.saving)  # clocks differ
            last, again = state.step == cfg.steps, state.samples_seen <= state.guard.judged
            quiet = last or stop or again
            validation_due = not quiet and _due(observe.validate_every, before, state.samples_seen)
            report_due = last or stop or state.step % observe.log_every == 0
            if (validation_due or report_due) and (verdict := state.guard.look()):
                roll_back(state, verdict, rt)
                batches, damage = open_stream(stream, data, cfg, rt, resources, state)
                meter.restart(state)
                continue
            if validation_due:
                validation = validate(objective, parallel, data, cfg, rt, state, observe)
                _log_validation(validation, rt, state)
                state.heldout, validated = validation.metrics, True
            if not report_due:
                continue
            # This raises where too much data is damaged, so it comes before a checkpoint.
            meter.report(state, waited=batches.wait_seconds, bad_samples=damage.report(), log=not again)
            if not last and (stop or (due and not state.guard.in_a_run)):
                rt.enter("checkpoint")
                state.save(rt)
                saved_at, validated = time.monotonic(), False
            if not last and stop:
                state.wait()
                raise Interrupted(state.samples_seen)
        agreement.close()
    result = validate(objective, parallel, data, cfg, rt, state, observe)
    _log_validation(result, rt, state)
    if rt.rank == 0:
        rt.log_environment(facts(state))
    for ema in state.emas.values():
        ema.swap()
    return result


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and did, with its checkpoint at `samples_seen` written: no error, and no result."""

    def __init__(self, samples_seen: int) -> None:
        super().__init__(f"stopped at {samples_seen:,} samples; a new run goes on from there")
        self.samples_seen = samples_seen


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
    rt.enter("validation")
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
    held: HeldBuffers,
) -> None:
    """One optimizer step of every module whose turn it is, all on the same global batch."""
    accumulate = cfg.global_batch_size // (cfg.micro_batch(rt.world_size) * rt.world_size)
    rt.enter("data")
    micro = [(position, to_device(batch, rt.device)) for position, batch in _take(stream, accumulate)]
    active = objective.active(state.samples_seen)
    for name in active:
        if state.step % cfg.every(name):
            continue
        held.hold()
        measured: list[Metrics] = []
        for other, module in objective.trainable.items():
            module.requires_grad_(other == name)
        rho, loss_of = cfg.sam_rho, partial(_loss, name=name, state=state, cfg=cfg, rt=rt)
        for i, (position, batch) in enumerate(micro):
            alone = partial(loss_of, partial(objective.loss, name), batch, position)
            rt.enter("forward")
            with (
                parallel.accumulating(name, last=i == len(micro) - 1),
                sharpened(objective.trainable[name], alone, rho=rho) if rho else nullcontext(),
            ):
                loss, metrics = loss_of(partial(parallel.loss, name), batch, position)
                rt.enter("backward")
                loss.backward(spread_if_bad(loss, scale=1 / accumulate))
            measured.append({"loss": loss.detach(), **metrics})
        rt.enter("optimizer")
        norm = clip_gradients(objective.trainable[name], cfg.grad_clip)
        skip = 1.0 - norm.isfinite().float()
        scale = lr_scale(cfg.of(name), samples_seen=state.samples_seen)
        for optimizer in state.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch's fused optimizers take it
            optimizer.step()
        parallel.zero_grad(name)
        objective.after_step()
        held.put_back(skip=skip)
        state.emas[name].update()
        means = {key: torch.stack([some[key].float() for some in measured]).mean() for key in measured[0]}
        state.guard.note(name, active=active, samples_seen=state.samples_seen, loss=means["loss"], skip=skip)
        meter.add({f"{name}/{key}": value for key, value in (means | {"grad_norm": norm}).items()}, skip=skip)
        meter.rates[name] = cfg.of(name).optim.lr * scale
    state.advance()


def _loss(
    network: Callable[[Batch, Step], tuple[Tensor, Metrics]],
    batch: Batch,
    position: int,
    *,
    name: str,
    state: TrainState,
    cfg: TrainConfig,
    rt: Runtime,
) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch, with the randomness of its place in the stream, however often it is computed."""
    step = Step(state.samples_seen, seeded(rt.device, cfg.seed, name, position))
    with autocast(rt.device, state.products):
        return network(batch, step)


def _take(stream: Iterator[tuple[int, Batch]], n: int) -> Iterable[tuple[int, Batch]]:
    return [next(stream) for _ in range(n)]


def _due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` was crossed between two counts of samples."""
    return every > 0 and now // every > before // every


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
