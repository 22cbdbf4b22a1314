"""What training would cost, against counts by hand and against what a real step keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import memory_ranks
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.models.convolutions import ResBlock
from genpipe.models.layers import recomputed
from genpipe.pipeline.costs import Cost, cost_of, training_flops
from genpipe.stage_config import Resources
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
    assert cost(ema_snapshots={"every": 100}).memory["averages"] == 4 * 3 * count, "one, and those of two widths"
    offloaded = config()
    offloaded.resources = Resources(workers=2, offload_averages=True)
    assert cost_of(stage(5), offloaded, {}).memory == found.memory | {"averages": 0}
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


SPREADS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, recomputed": {"recompute_blocks": True},
    "fsdp": {"shard_over": "all"},
    "fsdp, recomputed": {"shard_over": "all", "recompute_blocks": True},
}


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_what_torch_allocates(tmp_path: Path) -> None:
    """Two gloo processes under torch's profiler.

    gloo copies what it sends, which a GPU would not; how many copies of a sharded run are there at once is luck.
    """
    run_ranks(memory_ranks.measure_peaks, 2, str(tmp_path), SPREADS, ranks=2)
    for rank in range(2):
        peaks = json.loads((tmp_path / f"peaks-{rank}.json").read_text())
        for name, resources in SPREADS.items():
            planned = cost_of(memory_ranks.stage(), memory_ranks.config(workers=2, **resources), {}).peak
            close = 0.01 if name.startswith("ddp") else 0.15
            assert peaks[name] == pytest.approx(planned, rel=close), name


def test_shards_by_hand() -> None:
    """Weights of blocks by the rows of the rank with the most; what is around them, and each scalar, whole."""
    whole, half, all_four = (
        cost_of(memory_ranks.stage(), memory_ranks.config(workers=4, shard_over=over), {}) for over in (1, 2, "all")
    )
    width, hidden, depth = memory_ranks.WIDTH, memory_ranks.HIDDEN, memory_ranks.DEPTH
    block, around = 2 * width * hidden + width + hidden, 32 * width + width + width + 1
    for cost, ranks in ((whole, 1), (half, 2), (all_four, 4)):
        held = depth * block // ranks + around
        parts = {"weights": held, "gradients": held, "optimizer": 2 * held, "averages": held}
        parts["gathered"] = 4 * block if ranks > 1 else 0
        assert {name: cost.memory[name] for name in parts} == {name: 4 * size for name, size in parts.items()}
        assert cost.memory["activations"] == whole.memory["activations"]
    with pytest.raises(ValueError, match=r"resources\.shard_over 3 does not divide the 4 training ranks"):
        cost_of(memory_ranks.stage(), memory_ranks.config(workers=4, shard_over=3), {})


def test_recomputed_blocks_cost_arithmetic_and_save_memory() -> None:
    plain, again = (
        cost_of(memory_ranks.stage(), memory_ranks.config(workers=1, recompute_blocks=on), {}) for on in (False, True)
    )
    product = 2 * memory_ranks.WIDTH * memory_ranks.HIDDEN
    assert again.flops - plain.flops == memory_ranks.DEPTH * product, "but for the last of a block: nobody reads it"
    assert again.memory["activations"] < 0.7 * plain.memory["activations"]
