"""What training would cost, against counts by hand and against what a real step keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.config import Resources
from genpipe.models.convolutions import ResBlock
from genpipe.models.layers import recomputed
from genpipe.pipeline.costs import Cost, cost_of, training_flops
from genpipe.training.objective import Batch, Metrics, Step, Validation
from genpipe.training.optim import build_optimizers, optimizer_bytes
from genpipe.training.settings import TrainConfig
from genpipe.training.stream import seeded

BATCH, WIDTH, HIDDEN, HEADS, TOKENS = 6, 32, 48, 4, 10


class Blocks(nn.Module):
    """A convolution, attention and an MLP: one of each kind of product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.up(attended)


class Objective:
    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model or Blocks()
        self.frozen = nn.Linear(7, 11)
        self.trainable: dict[str, nn.Module] = {"model": self.model}

    def active(self, samples_seen: int) -> tuple[str, ...]:
        return ("model",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        noise = torch.randn(batch["images"].shape, generator=step.generator, device=batch["images"].device)
        return self.model(batch["images"] + noise).square().mean(), {}

    def after_step(self) -> None: ...

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        return Validation({})


def stage(side: int) -> ModuleType:
    """A stage of such an objective on images [3, side, side]."""
    module = ModuleType("toy")
    module.objective = lambda cfg, inputs, device: Objective()  # type: ignore[attr-defined]
    module.example_batch = lambda cfg, inputs, *, batch_size: {  # type: ignore[attr-defined]
        "images": torch.zeros(batch_size, 3, side, side)
    }
    return module


def config(precision: str = "fp32", **train: Any) -> Any:
    settings = {"samples": 600, "global_batch_size": 2 * BATCH, "precision": precision, **train}
    return SimpleNamespace(train=TrainConfig.model_validate(settings), resources=Resources(workers=2))


def cost(side: int = 5, **train: Any) -> Cost:
    return cost_of(stage(side), config(**train), {})


def test_arithmetic_by_hand() -> None:
    """Forward and backward: each product once, then once for its input and once for its weight."""
    cells = 5 * 5
    conv = 2 * cells * 3 * 9 * WIDTH
    linear = 2 * cells * WIDTH * 3 * WIDTH + 2 * cells * WIDTH * HIDDEN
    attention = 2 * 2 * cells * cells * WIDTH  # q k and scores v
    # Images need no gradient. Attention in blocks computes the scores once more on its way back: five products.
    flops = 2 * conv + 3 * linear + attention + 2.5 * attention
    assert cost().flops == pytest.approx(flops)
    assert training_flops(stage(5), config(), {}) == pytest.approx(600 * flops)
    assert cost(sam_rho=0.1).flops == pytest.approx(2 * flops), "once to find where, once there"
    third = {"model": {"every": 3}}
    assert cost(trainable=third).flops == pytest.approx(flops / 3), "a module that is updated at every third step"
    with pytest.raises(ValueError, match=r"train\.trainable\.other: .*it trains model"):
        cost(trainable={"other": {"every": 3}})


def test_parameters_and_what_follows_from_them() -> None:
    found = cost()
    count = 3 * 9 * WIDTH + WIDTH * 3 * WIDTH + WIDTH * HIDDEN
    assert found.parameters == {"model": count} and found.frozen == 7 * 11 + 11
    fixed = {"weights": count + found.frozen, "gradients": count, "optimizer": 2 * count, "averages": count}
    assert {name: found.memory[name] for name in fixed} == {name: 4 * numbers for name, numbers in fixed.items()}
    assert found.peak == sum(found.memory.values())
    assert cost(sam_rho=0.1).memory["weights"] == 4 * (2 * count + found.frozen)


class Exponentials(nn.Module):
    """exp of exp of ... of a parameter: each result is kept for the backward pass, unless a few are computed again."""

    def __init__(self, *, again: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(NUMBERS))
        self.again = again

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.x
        for _ in range(STEPS // max(1, self.again)):
            x = recomputed(self.some, x) if self.again else x.exp()
        return x

    def some(self, x: Tensor) -> Tensor:
        for _ in range(self.again):
            x = x.exp()
        return x


STEPS, NUMBERS = 40, 10_000


@pytest.mark.parametrize("again, least, most", [(0, 40, 40 + 5), (5, 8 + 5, 8 + 5 + 5)])
def test_what_is_alive_at_the_peak(again: int, least: int, most: int) -> None:
    """By hand: all results, or each fifth and those of five steps; the loss, and few gradients on their way."""
    toy = stage(1)
    toy.objective = lambda cfg, inputs, device: Objective(Exponentials(again=again))  # type: ignore[attr-defined]
    alive = cost_of(toy, config(), {}).memory["activations"] / (4 * NUMBERS)
    assert least <= alive <= most + 0.01


def test_bf16_halves_what_products_read_and_give() -> None:
    assert cost(precision="bf16").memory["activations"] < 0.75 * cost().memory["activations"]
    assert cost(precision="auto") == cost(precision="bf16"), "which is what a GPU is fast at"


def test_hours() -> None:
    found = cost(side=16)
    seconds = found.flops * 600 / (0.5 * 2e12)
    assert found.gpu_hours(mfu=0.5, peak_tflops=2) == pytest.approx(seconds / 3600)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_bytes_of_an_optimizer_are_what_it_keeps(kind: str) -> None:
    cfg: Mapping[str, Any] = {"kind": kind, "lr": 1e-3}
    optim = TrainConfig.model_validate({"samples": 1, "global_batch_size": 1, "optim": cfg}).optim
    module = nn.Sequential(nn.Conv2d(3, 8, 3), ResBlock(8, 8, groups=2), nn.Conv2d(8, 5, 3))
    optimizers = build_optimizers(module, optim)
    images = torch.randn(2, 3, 8, 8, generator=seeded(torch.device("cpu"), 0))
    module(images).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    tensors = [x for o in optimizers for state in o.state.values() for x in state.values() if isinstance(x, Tensor)]
    assert optimizer_bytes(module, optim) == sum(x.numel() * 4 for x in tensors if x.ndim)
