"""Compiled blocks (`torch.compile`), used only where their gradients are those of eager execution."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from genpipe.data.loader import Data, sample_batches
from genpipe.models.blocks import blocks_of
from genpipe.models.precision import Products
from genpipe.training.objective import Batch, Objective, Step
from genpipe.training.parallel import Parallel
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState
from genpipe.training.stream import seeded, to_device
from genpipe.training.trial import gradients, unobserved

BACKEND: str | Callable[..., Any] = "inductor"

RECOMPILED = 64
"""How many forms of one block are compiled: those of a class differ in their widths."""

TOLERANCE: dict[Products, float] = {"bf16": 0.3, "fp16": 0.3, "fp32": 0.01}
"""How far a parameter's gradient may be from that of eager execution, as a share of its norm: fused code rounds less
often. Of CLIP's positions, whose gradient is a sum over 512 samples of either sign, 15 % is rounding in bf16."""

SMALL, NEGLIGIBLE = 1e-2, 1e-4
"""Shares of the root mean square of all gradients: below the first a difference may be rounding, below the second a
gradient is (of a bias before a norm, say)."""


class _OrEagerly:
    """The compiler, and eager execution of what it fails at: no rank leaves a pass in which others wait for it."""

    def __init__(self) -> None:
        self.fault = ""
        """What the last failure said."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = lookup_backend(BACKEND)(graph, inputs)
            return compiled
        except Exception as error:  # of a compiler, which may fail in any way: none of them stops training
            said = (str(error).strip() or "no reason").splitlines()[0]
            self.fault = f"the compiler failed: {type(error).__name__}: {said}"
            print(f"{self.fault}; what it failed at is executed eagerly", file=sys.stderr, flush=True)
            return graph.forward


def compile_blocks(objective: Objective, compiler: Callable[..., Any]) -> None:
    """Have every block of the trained networks (`models.blocks`) compiled when it is first called.

    Weights and their names stay as they are. Code is made for one size, as batches are of one; blocks of several sizes
    would lead the compiler to code for any. What this compiler has compiled in this process it does not compile again.
    """
    for module in objective.trainable.values():
        for block in blocks_of(module):
            block.compile(backend=compiler, dynamic=False)


def run_eagerly(objective: Objective) -> None:
    """Have nothing compiled called from now on."""
    for module in objective.trainable.values():
        for block in blocks_of(module):
            block._compiled_call_impl = None


@contextmanager
def eagerly(objective: Objective) -> Iterator[None]:
    """Nothing compiled is called inside."""
    blocks = [block for module in objective.trainable.values() for block in blocks_of(module)]
    compiled = [block._compiled_call_impl for block in blocks]
    run_eagerly(objective)
    try:
        yield
    finally:
        for block, call in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = call


def compile_if_right(
    objective: Objective, parallel: Parallel, data: Data, cfg: TrainConfig, rt: Runtime, state: TrainState
) -> None:
    """Compile the blocks of the trained networks if they then compute what they do in eager execution, on all ranks.

    Every parameter's gradient is compared, on a micro-batch of the size that training has. Otherwise, or without a
    compiler for this machine, all stays eager: an event of the run says why, and its environment (`compiled`). A run
    that has trained eagerly, because of this, goes on so when it is resumed.
    """
    rt.enter("compile")
    compiler = _OrEagerly()
    if state.compiled:
        size = cfg.micro_batch(rt.world_size)
        weights = cfg.source_weights
        batch = next(sample_batches(data.train, count=size, batch_size=size, weights=weights, repeat=True))
        fault = _fault(objective, parallel, to_device(batch, rt.device), cfg, rt, state, compiler)
        state.compiled = fault is None
        told = f"no: {fault}" if fault else "yes"
    else:
        fault, told = None, "no: not when this training began"
    if state.compiled:
        compile_blocks(objective, compiler)
    if rt.rank == 0:
        rt.log_environment({"compiled": told})
        if fault:
            rt.log_event(f"training without compiled blocks: {fault}", samples_seen=state.samples_seen)


def _fault(
    objective: Objective,
    parallel: Parallel,
    batch: Batch,
    cfg: TrainConfig,
    rt: Runtime,
    state: TrainState,
    compiler: _OrEagerly,
) -> str | None:
    """What is wrong with the gradients of compiled blocks, on any rank; None if nothing is."""
    if not any(blocks_of(module) for module in objective.trainable.values()):
        return "the networks of this stage have no blocks"
    torch._dynamo.config.recompile_limit = RECOMPILED
    with unobserved(objective):
        names = objective.active(cfg.samples)  # all that will ever be trained

    def found(name: str) -> dict[str, Tensor]:
        step = Step(cfg.samples, seeded(rt.device, cfg.seed, name, "compile"))
        with unobserved(objective):
            return gradients(objective, parallel, name, batch, step, products=state.products)

    for name in names:
        eager = found(name)
        with unobserved(objective):
            compile_blocks(objective, compiler)
            compiled = found(name)
        told = disagreement(eager, compiled, tolerance=TOLERANCE[state.products])
        if fault := _on_any_rank(compiler.fault or (f"{name}: {told}" if told else None), rt):
            return fault
    return None


def disagreement(eager: dict[str, Tensor], compiled: dict[str, Tensor], *, tolerance: float) -> str | None:
    """What is wrong with compiled gradients, by parameters' names; None if they are eager ones to rounding."""
    if others := sorted(eager.keys() ^ compiled.keys()):
        return f"compiled code gives gradients to other parameters: {', '.join(others)}"
    squares = sum(gradient.double().square().sum().item() for gradient in eager.values())
    typical = (squares / max(1, sum(gradient.numel() for gradient in eager.values()))) ** 0.5
    for name, expected in eager.items():
        norm, usual = expected.double().norm().item(), typical * expected.numel() ** 0.5
        if norm > NEGLIGIBLE * usual and not compiled[name].any():
            return f"compiled code gives {name} a gradient of zero, where its norm is {norm:.3g}"
        off = (compiled[name].double() - expected.double()).norm().item()
        if not off <= tolerance * max(norm, SMALL * usual):
            return f"compiled code gives {name} a gradient that is off by {off / norm:.0%} of its norm"
    return None


def _on_any_rank(fault: str | None, rt: Runtime) -> str | None:
    """The first rank's fault, on all ranks alike."""
    faults: list[str | None] = [fault]
    if rt.world_size > 1:
        faults = [None] * rt.world_size
        dist.all_gather_object(faults, fault)
    return next((fault for fault in faults if fault), None)
