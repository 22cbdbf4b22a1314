"""Passes through an objective that leave no trace: to count what a step does, and to compare ways of doing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genpipe.models.precision import Products, autocast
from genpipe.training.guard import HeldBuffers
from genpipe.training.objective import Batch, Objective, Step


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


def gradients(objective: Objective, name: str, batch: Batch, step: Step, *, products: Products) -> dict[str, Tensor]:
    """The gradients of a micro-batch's loss by the parameters of the module `name`, on the host.

    As a step computes them: the other modules' parameters get none, and the module's own are left without.
    """
    with _no_gradients_left(objective.trainable[name]) as parameters:
        _backward(objective, name, batch, step, products=products)
        return {key: p.grad.detach().cpu().clone() for key, p in parameters.items() if p.grad is not None}


def step_flops(objective: Objective, name: str, batch: Batch, step: Step, *, products: Products) -> int:
    """Floating-point operations of a micro-batch, forward and backward, as `torch.utils.flop_counter` counts them."""
    with unobserved(objective), FlopCounterMode(display=False) as counter:
        for module in (module for trained in objective.trainable.values() for module in trained.modules()):
            module._compiled_call_impl = None  # what is compiled cannot be counted
        with _no_gradients_left(objective.trainable[name]):
            _backward(objective, name, batch, step, products=products)
    return counter.get_total_flops()


@contextmanager
def _no_gradients_left(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters by name. They end without gradients, or with zeros, in DDP's buckets, where those must stay."""
    parameters = dict(module.named_parameters())
    given = [p.grad is not None for p in parameters.values()]
    yield parameters
    for p, kept in zip(parameters.values(), given, strict=True):
        p.grad = p.grad.zero_() if kept and p.grad is not None else None


def _backward(objective: Objective, name: str, batch: Batch, step: Step, *, products: Products) -> None:
    for other, trained in objective.trainable.items():
        trained.requires_grad_(other == name)
    with autocast(step.generator.device, products):
        loss, _ = objective.loss(name, batch, step)
    loss.backward()
