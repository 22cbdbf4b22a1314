"""Compiled blocks are used where their gradients are right, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runtime import CPU, FolderRuntime
from rank_processes import COMPILED, Plain, compile_small_ranks
from ranks import run_ranks
from small_objective import G, Small, stream, train_small
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from torch.nn import functional as F

from genpipe.models.layers import ResidualBlock
from genpipe.stage_config import Resources
from genpipe.training import compile as compiling
from genpipe.training.compile import compile_if_right, disagreement
from genpipe.training.loop import Interrupted
from genpipe.training.objective import Batch, Metrics, Step
from genpipe.training.parallel import Replicated
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState


def as_is(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    return graph.forward


def with_gradients_of_zero(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    def backward(*args: Any) -> Any:
        return [torch.zeros_like(x) if isinstance(x, Tensor) else x for x in graph.forward(*args)]

    backward._boxed_call = False  # type: ignore[attr-defined]
    return backward


def failing(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    raise OSError("no compiler here\nand more that nobody wants to read")


BROKEN = "no: the compiler failed: OSError: no compiler here"
RIGHT: Any = aot_autograd(fw_compiler=as_is, bw_compiler=as_is)
WRONG: Any = aot_autograd(fw_compiler=as_is, bw_compiler=with_gradients_of_zero)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_blocks_whose_gradients_are_right_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and executed as traced: the same weights, in training as a whole and after a resume."""
    calls = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls.append(graph)
        return RIGHT(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", counting)
    rt = FolderRuntime(tmp_path / "compiled")
    found = train_small(stream(), rt, steps=8, compile=True)
    assert rt.environment["compiled"] == "yes"
    assert len(calls) == 1, "what was compiled for the check is what trains"
    expected = train_small(stream(), FolderRuntime(tmp_path / "eager"), steps=8)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    with pytest.raises(Interrupted):
        train_small(stream(), FolderRuntime(tmp_path / "cut", stop_at=5 * G), steps=8, compile=True)
    assert same(found, train_small(stream(), FolderRuntime(tmp_path / "cut"), steps=8, compile=True))


class Halving(ResidualBlock):
    """Every other one of a row of vectors, [B, L, 2] -> [B, L / 2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x[:, ::2]).tanh()


class OfManySizes(Small):
    """As in a U-Net: blocks are given grids of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Halving() for _ in range(3)]
        self.model = nn.Sequential(nn.Linear(2, 32), nn.Unflatten(1, (16, 2)), *blocks, nn.Flatten(), nn.Linear(4, 1))
        self.trainable = {"small": self.model}


def test_blocks_of_several_sizes_are_compiled_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for any, as the compiler would from the second on."""
    inputs_of: list[list[Any]] = []

    def watching(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        inputs_of.append(list(inputs))
        return RIGHT(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", watching)
    rt = FolderRuntime(tmp_path)
    train_small(stream(), rt, steps=2, build=OfManySizes, compile=True)
    assert rt.environment["compiled"] == "yes"
    sizes = [size for inputs in inputs_of for x in inputs for size in getattr(x, "shape", [x])]
    assert len(inputs_of) == 3 and not any(isinstance(size, torch.SymInt) for size in sizes)


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        (WRONG, "no: small: compiled code gives 0.weight a gradient of zero, where its norm is "),
        (failing, BROKEN),
    ],
)
def test_wrong_gradients_and_missing_compilers_leave_training_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, told: str
) -> None:
    """As torch 2.13's compiler for CPUs, which gave gradients of zero before conv -> nearest x2 -> conv in bf16."""
    monkeypatch.setattr(compiling, "BACKEND", backend)
    rt = FolderRuntime(tmp_path / "tried", stop_at=5 * G)
    with pytest.raises(Interrupted):
        train_small(stream(), rt, steps=8, compile=True)
    assert rt.environment["compiled"].startswith(told)
    (event,) = rt.events
    assert event.startswith("training without compiled blocks: " + told[4:])

    monkeypatch.setattr(compiling, "BACKEND", RIGHT)  # another machine goes on as it was begun
    resumed = FolderRuntime(tmp_path / "tried")
    found = train_small(stream(), resumed, steps=8, compile=True)
    assert resumed.environment["compiled"] == "no: not when this training began"
    assert same(found, train_small(stream(), FolderRuntime(tmp_path / "eager"), steps=8))


COMPILERS = {
    "both right": ((RIGHT, RIGHT), "yes"),
    "rank 1 fails": ((RIGHT, failing), BROKEN),
    "rank 0 fails": ((failing, RIGHT), BROKEN),
    "rank 1 is wrong": ((RIGHT, WRONG), "no: small: compiled code gives "),
}


@pytest.mark.slow
def test_ranks_compile_or_do_not_alike(tmp_path: Path) -> None:
    """Whatever the compiler of one of them does, none waits for ever, and they learn what one rank learns."""
    cases = {
        f"{name}, {shard_over}": (backends, shard_over)
        for name, (backends, _) in COMPILERS.items()
        for shard_over in (1, "all")
    }
    run_ranks(compile_small_ranks, str(tmp_path), cases, ranks=2)
    alone = train_small(stream(), FolderRuntime(tmp_path / "alone"), build=Plain, **COMPILED)
    for case in cases:
        told = COMPILERS[case.partition(",")[0]][1]
        first, second = (torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True) for rank in range(2))
        assert first["told"].startswith(told) and len(first["events"]) == (told != "yes"), case
        assert same(first["weights"], second["weights"]), case
        for name, tensor in alone.items():
            torch.testing.assert_close(first["weights"][name], tensor, atol=1e-5, rtol=1e-5, msg=f"{case}: {name}")


class Upsampling(ResidualBlock):
    """What torch 2.13's compiler for CPUs gave gradients of zero, under bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.interpolate(self.before(x), scale_factor=2.0, mode="nearest"))


class Pictures(Small):
    """Enlarges the same noise each time."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Upsampling())
        self.trainable = {"small": self.model}

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        x = torch.randn(len(batch["x"]), 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return self.model(x).float().square().mean(), {}


@pytest.mark.slow
def test_without_a_compiler_for_this_machine_training_is_eager(tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    with config.patch({"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}):
        train_small(stream(), rt, steps=2, compile=True)
    said = rt.environment["compiled"]
    assert "no: the compiler failed: " in said and "InvalidCxxCompiler" in said


@pytest.mark.slow
def test_the_real_compiler_is_used_exactly_where_it_is_right(tmp_path: Path) -> None:
    """Conv -> nearest x2 -> conv under bf16, in a class of its own: compiled, if at all, with gradients as in fp32."""
    objective, rt = Pictures(), FolderRuntime(tmp_path)
    cfg = TrainConfig(samples=8, global_batch_size=G)
    state = TrainState.fresh(objective.trainable, cfg)
    state.products = "bf16"
    compile_if_right(objective, Replicated(objective, rt), stream(), cfg, rt, state)
    expected, found = (gradients_of(objective, half=half) for half in (False, True))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), rt.environment["compiled"]


def gradients_of(objective: Small, *, half: bool) -> dict[str, Tensor]:
    if not half:
        compiling.run_eagerly(twin := Pictures())
        objective = twin
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss, _ = objective.loss("small", {"x": torch.zeros(G)}, Step(0, torch.Generator(CPU)))
    loss.backward()
    return {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}


def test_disagreements_by_hand() -> None:
    eager = {"large": torch.ones(100), "small": torch.full((4,), 0.02), "rounding": torch.full((4,), 1e-6)}
    told = {}
    for name, factor in (("large", 1.05), ("large", 1.2), ("large", torch.nan), ("small", 1.05), ("small", 0.0)):
        told[name, factor] = disagreement(eager, {**eager, name: factor * eager[name]}, tolerance=0.1)
    assert told["large", 1.05] is None and told["small", 1.05] is None
    assert told["large", 1.2] == "compiled code gives large a gradient that is off by 20% of its norm"
    assert "nan%" in str(told["large", torch.nan])
    assert told["small", 0.0] == "compiled code gives small a gradient of zero, where its norm is 0.04"
    assert disagreement(eager, {**eager, "rounding": torch.zeros(4)}, tolerance=0.1) is None
    assert "other parameters" in str(disagreement(eager, {"large": eager["large"]}, tolerance=0.1))


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    train_small(stream(), rt, steps=2)
    assert not Resources().compile and "compiled" not in rt.environment
