"""The loop: one for every training stage, on one process or many.

Randomness of a step derives from (seed, name of the trainable module, position in the stream), gradients are averaged
by `training.parallel`, metrics leave the device every `log_every` steps. Nothing between forward and optimizer step
waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from genpipe.data.loader import Data
from genpipe.models.precision import DTYPES, Products, autocast, gflops, products_of
from genpipe.stage_config import Resources
from genpipe.training.agreement import Agreement
from genpipe.training.compile import compile_if_right, run_eagerly
from genpipe.training.deferred import Deferred
from genpipe.training.guard import HeldBuffers, spread_if_bad
from genpipe.training.interval import checkpoint_interval
from genpipe.training.meter import Meter
from genpipe.training.objective import Batch, Metrics, Objective, ObserveTraining, Step, Validation
from genpipe.training.optim import clip_gradients, step_all
from genpipe.training.parallel import Parallel, spread
from genpipe.training.rollback import facts, roll_back
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig, lr_scale
from genpipe.training.sharpness import sharpened
from genpipe.training.state import TrainState
from genpipe.training.stream import open_stream, seeded, to_device
from genpipe.training.trial import step_flops
from genpipe.training.validation import keep_if_best, validate


def train(
    objective: Objective, data: Data, cfg: TrainConfig, rt: Runtime, resources: Resources, observe: ObserveTraining
) -> Validation:
    """Train `objective` to `cfg.samples` and return its last validation; the EMA weights are left in place.

    With `cfg.best` they are those that validated best, and the validation is theirs; training may end before.

    Starts from the runtime's newest checkpoint if there is one: N steps and k + resume + (N - k) steps give the
    same weights, bitwise on CPU. Every rank returns; metrics and pictures of the validation are rank 0's.

    A step whose loss or gradient is not finite is skipped; see `cfg.guard` for what a run of them leads to.

    Raises ValueError where `cfg.trainable` names a module that the objective does not train; FloatingPointError when
    numbers stop being finite for good, before such weights are saved; OSError when checkpoints could not be written for
    long; Interrupted when the runtime asked for a stop, after a checkpoint.
    """
    parallel = spread(objective, rt, resources)
    cfg.check_trainable(objective.trainable, sharded=parallel.together)
    state = TrainState.fresh(objective.trainable, cfg, offload=resources.offload_averages)
    resumed = state.resume(rt)
    if not resumed:
        state.products = _agreed_products(cfg, rt)
    if resources.compile:
        compile_if_right(objective, parallel, data, cfg, rt, state)
    if cfg.steps and not resumed:
        state.save(rt)  # what to go back to
    if rt.rank == 0:
        rt.log_environment({"precision_used": state.products, **facts(state)})
    peak_flops = 1e9 * gflops(rt.device, DTYPES[state.products])
    meter = Meter(rt, global_batch_size=cfg.global_batch_size, peak_flops=peak_flops)
    held = HeldBuffers(objective.trainable.values())
    agreement = Agreement(rt, flags=3)
    check = partial(validate, objective, parallel, data, cfg, rt, state, heldout_samples=observe.heldout_samples)
    deferred = Deferred.resumed(rt, state, check)
    saved_at, validated, due = time.monotonic(), False, False  # since the last checkpoint
    ended = False
    with state.checkpoints_finished(rt), ExitStack() as stream:
        batches, damage = open_stream(stream, data, cfg, rt, resources, state)
        while state.step < cfg.steps and not ended:
            before = state.samples_seen
            _step(objective, parallel, state, batches, cfg, rt, meter, held)
            interval = checkpoint_interval(
                resources, stall_seconds=state.stall_seconds, write_seconds=state.write_seconds
            )
            late = time.monotonic() - saved_at > interval or bool(validated and observe.keep_best)
            asks = rt.rank == 0 and late and not (due or state.saving)  # clocks differ: rank 0's counts
            stop, agreed, hopeless = agreement.ask(rt.should_stop(), asks, rt.rank == 0 and state.hopeless)
            if hopeless and not stop:
                state.give_up(rt)
            due = due or agreed
            last, again = state.step == cfg.steps, state.samples_seen <= state.guard.judged
            quiet = last or stop or again
            compare_due = cfg.best is not None and not last and _due(cfg.best.every, before, state.samples_seen)
            validation_due = not (quiet or compare_due) and _due(observe.validate_every, before, state.samples_seen)
            report_due = last or stop or state.step % observe.log_every == 0
            if (compare_due or validation_due or report_due) and (verdict := state.guard.look()):
                roll_back(state, verdict, rt)
                batches, damage = open_stream(stream, data, cfg, rt, resources, state)
                meter.restart()
                continue
            if compare_due:
                with meter.aside():
                    ended = keep_if_best(objective, parallel, data, cfg, rt, state, log=not again)
                validated, last, report_due = True, ended, report_due or ended
            if cfg.ema_snapshots and (last or _due(cfg.ema_snapshots.every, before, state.samples_seen)):
                with meter.aside():
                    state.keep_averages(rt)
            if validation_due:
                with meter.aside():
                    deferred.validate()
                validated = True
            if not report_due:
                continue
            deferred.poll()
            # This raises where too much data is damaged, so it comes before a checkpoint.
            meter.report(
                state,
                waited=batches.wait_seconds,
                log=not again,
                bad_samples=damage.report(),
                checkpoint_interval_seconds=interval,
                checkpoint_stall_seconds=state.stall_seconds,
            )
            if not last and (stop or (due and not state.guard.in_a_run)):
                with meter.aside():
                    state.save(rt)
                saved_at, validated, due = time.monotonic(), False, False
            if not last and stop:
                raise Interrupted(state.samples_seen, *state.newest_of_all(rt))
        agreement.close()
    run_eagerly(objective)
    if state.best and not ended:
        keep_if_best(objective, parallel, data, cfg, rt, state, log=True)
    result = deferred.finish(samples_seen=state.take_best(objective.trainable))
    if rt.rank == 0:
        rt.log_environment(facts(state))
    for ema in state.emas.values():
        ema.swap()
    return result


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop at `at` samples and did: no error, and no result.

    The newest checkpoint is that of `samples_seen`: of the same moment, unless it could not be written (`fault`).
    """

    def __init__(self, at: int, samples_seen: int, fault: str = "") -> None:
        there = f"{samples_seen:,} samples, as the checkpoint could not be written: {fault}" if fault else "there"
        super().__init__(f"stopped at {at:,} samples; a new run goes on from {there}")
        self.samples_seen = samples_seen


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
    active, flops = objective.active(state.samples_seen), 0
    for name in active:
        if state.step % cfg.every(name):
            continue
        key = (name, *active)
        if key not in meter.flops_of:
            with meter.aside():
                step = Step(state.samples_seen, torch.Generator(rt.device).manual_seed(0))
                flops_of = step_flops(objective, parallel, name, micro[0][1], step, products=state.products)
                meter.flops_of[key] = flops_of
        flops += meter.flops_of[key] * accumulate * (1 if cfg.sam_rho is None else 2)
        held.hold()
        measured: list[Metrics] = []
        for other, module in objective.trainable.items():
            module.requires_grad_(other == name)
        scale = state.scales[name].value.clone() if state.products == "fp16" else 1.0
        rho, loss_of = cfg.sam_rho, partial(_loss, name=name, state=state, cfg=cfg, rt=rt)
        for i, (position, batch) in enumerate(micro):
            alone = partial(loss_of, partial(objective.loss, name), batch, position)
            rt.enter("forward")
            with (
                parallel.accumulating(name, last=i == len(micro) - 1),
                sharpened(objective.trainable[name], alone, rho=rho, scale=scale) if rho else nullcontext(),
            ):
                loss, metrics = loss_of(partial(parallel.loss, name), batch, position)
                rt.enter("backward")
                loss.backward(spread_if_bad(loss, scale=scale / accumulate))
            measured.append({"loss": loss.detach(), **metrics})
        rt.enter("optimizer")
        norm = clip_gradients(objective.trainable[name], cfg.grad_clip, scale=scale)
        skip = bad = 1.0 - norm.isfinite().float()
        if state.products == "fp16":
            bad = state.scales[name].update(skip)
        share = lr_scale(cfg.of(name), samples_seen=state.samples_seen)
        step_all(state.optimizers[name], share=share, skip=skip, products=DTYPES[state.products])
        parallel.zero_grad(name)
        objective.after_step()
        held.put_back(skip=skip)
        state.update_averages(name)
        means = {key: torch.stack([some[key].float() for some in measured]).mean() for key in measured[0]}
        state.guard.note(name, active=active, samples_seen=state.samples_seen, loss=means["loss"], skip=bad)
        means |= {"grad_norm": norm} | ({"loss_scale": scale} if isinstance(scale, Tensor) else {})
        meter.add({f"{name}/{key}": value for key, value in means.items()}, skip=skip)
        meter.rates[name] = cfg.of(name).optim.lr * share
    meter.count(flops=flops)
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


def _agreed_products(cfg: TrainConfig, rt: Runtime) -> Products:
    """The precision of products that rank 0 finds: ranks on unlike machines must not differ."""
    found: list[Products] = [products_of(cfg.precision, rt.device) if rt.rank == 0 else "fp32"]
    if rt.world_size > 1:
        dist.broadcast_object_list(found, src=0, device=rt.device)
    return found[0]
