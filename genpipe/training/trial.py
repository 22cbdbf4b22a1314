"""Passes through an objective that leave no trace: to count what a step does, and to compare ways of doing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genpipe.models.precision import Products, autocast
from genpipe.training.guard import HeldBuffers
from genpipe.training.objective import Batch, Objective, Step
from genpipe.training.parallel import Parallel
from genpipe.training.sharding import whole


@contextmanager
def unobserved(objective: Objective) -> Iterator[None]:
    """What happens inside leaves buffers and attributes of the objective and its modules as they were.

    Attributes may be replaced inside, but not changed in place.
    """
    held = HeldBuffers(objective.trainable.values())
    held.hold()
    modules = [module for trained in objective.trainable.values() for module in trained.modules()]
    attributes = [(thing, dict(vars(thing))) for thing in (objective, *modules)]
    try:
        yield
    finally:
        for thing, values in attributes:
            vars(thing).clear()
            vars(thing).update(values)
        held.put_back(skip=torch.ones(()))


def gradients(
    objective: Objective, parallel: Parallel, name: str, batch: Batch, step: Step, *, products: Products
) -> dict[str, Tensor]:
    """The gradients of a micro-batch's loss by the parameters of the module `name`, whole ones on the CPU.

    As a step computes them: means over ranks, and the other modules' parameters get none. None are left behind.
    """
    module = objective.trainable[name]
    for other, trained in objective.trainable.items():
        trained.requires_grad_(other == name)
    with parallel.accumulating(name, last=True):
        with autocast(step.generator.device, products):
            loss, _ = parallel.loss(name, batch, step)
        loss.backward()
    found = {key: whole(p.grad).to("cpu", copy=True) for key, p in module.named_parameters() if p.grad is not None}
    parallel.zero_grad(name)
    return found


def step_flops(
    objective: Objective, parallel: Parallel, name: str, batch: Batch, step: Step, *, products: Products
) -> int:
    """Floating-point operations of a micro-batch, forward and backward, as `torch.utils.flop_counter` counts them."""
    with unobserved(objective), FlopCounterMode(display=False) as counter:
        for module in (module for trained in objective.trainable.values() for module in trained.modules()):
            module._compiled_call_impl = None  # what is compiled cannot be counted
        gradients(objective, parallel, name, batch, step, products=products)
    return counter.get_total_flops()
