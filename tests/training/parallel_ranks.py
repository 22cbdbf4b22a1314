"""A toy to train, and what the processes do that train it together: a module that spawned processes import by name."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from folder_runtime import FolderRuntime, train_stage, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from genpipe.data.loader import Data, SampleSet
from genpipe.models.layers import TransformerBlock
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources
from genpipe.stages import load_stage
from genpipe.training.loop import Interrupted, train
from genpipe.training.muon import Muon
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.optim import AdamW, build_optimizers, clip_gradients
from genpipe.training.parallel import Sharded, spread, unsharded
from genpipe.training.settings import TrainConfig
from genpipe.training.sharding import whole

WIDTH, TOKENS, SAMPLES, BATCH = 12, 5, 64, 16
PATIENCE = 800.0
"""Seconds after which a process that waits for others says where, and ends."""


class Network(nn.Module):
    """Blocks, and what is around them: layers, a scalar, and a method of its own beside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_in = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(TransformerBlock(WIDTH, heads=2, mlp_ratio=1.5) for _ in range(3))
        self.out = nn.Linear(WIDTH, 1)
        self.log_scale = nn.Parameter(torch.tensor(0.5))

    def encode(self, x: Tensor) -> Tensor:
        x = self.tokens_in(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(x)).mean((1, 2)) * self.log_scale.exp()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(WIDTH, heads=2) for _ in range(2))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x).mean((1, 2))


@dataclass
class Toy:
    """Two modules, each used in the other's loss, one called twice in its own."""

    noise: bool
    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network, self.critic = Network(), Critic()
        self.trainable: dict[str, nn.Module] = {"network": self.network, "critic": self.critic}

    def active(self, samples_seen: int) -> tuple[str, ...]:
        return ("network", "critic") if samples_seen else ("network",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        rows = zip(batch["position"].tolist(), batch["index"].tolist(), strict=True)
        self.seen = [*self.seen, *((name, *row) for row in rows)]  # anew: a trial leaves no trace
        x = batch["x"]
        if self.noise:
            x = x + 0.3 * torch.randn(x.shape, generator=step.generator)
        if name == "critic":
            with torch.no_grad():
                fake = self.network.encode(x)
            return (self.critic(fake) - 1).square().mean() + self.critic(fake.flip(-1)).square().mean(), {}
        error = (self.network(x) - batch["y"]).square().mean()
        return error + 0.1 * self.critic(self.network.encode(x)).square().mean(), {"error": error.detach()}

    def after_step(self) -> None:
        with torch.no_grad():
            self.network.log_scale.clamp_(0.0, 0.51)

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        errors = [(self.network.encode(batch["x"]).mean((1, 2)) - batch["y"]).square() for batch in batches]
        return Validation({"loss": torch.cat(errors).mean().item()})


def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
    x = torch.randn(SAMPLES, TOKENS, 3, generator=torch.Generator().manual_seed(1))
    index = torch.from_numpy(indices)
    return {"x": x[index], "y": x[index].sum((1, 2)), "index": index, "position": torch.from_numpy(positions)}


DATA = Data(SampleSet(SAMPLES, collate), SampleSet(8, collate))


def train_toy(
    rt: FolderRuntime, *, noise: bool, shard_over: int | str = 1, offload_averages: bool = False, **settings: Any
) -> dict[str, Any]:
    """Four steps; the weights, and what was seen, logged and validated."""
    cfg = TrainConfig.model_validate(
        {
            **{"samples": 4 * BATCH, "global_batch_size": BATCH, "ema_decay": 0.5, "precision": "fp32"},
            **{"optim": {"lr": 0.02, "eps": 1e-2}, "decay": "constant", "grad_clip": 0.5},
            **settings,
        }
    )
    objective, observe = Toy(noise), ObserveTraining(log_every=1, validate_every=2 * BATCH, heldout_samples=8)
    resources = Resources.model_validate({"shard_over": shard_over, "offload_averages": offload_averages})
    result = train(objective, DATA, cfg, rt, resources, observe)
    plain = unsharded(objective, lambda: Toy(noise), rank=rt.rank)
    found = weights(plain) if rt.rank == 0 else {}
    return {"weights": found, "seen": objective.seen, "logged": rt.logged, "metrics": result.metrics}


def train_on(rt: FolderRuntime, *, sharded: bool) -> dict[str, Tensor]:
    """Three steps of the toy on the device of one rank, the blocks in FSDP's hands or not; the weights."""
    toy, resources = Toy(noise=False), Resources()
    for module in toy.trainable.values():
        module.to(rt.device)
    parallel = Sharded(toy, rt, shards=1) if sharded else spread(toy, rt, resources)
    batch = {name: tensor.to(rt.device) for name, tensor in collate(np.arange(BATCH), np.arange(BATCH)).items()}
    optimizers = build_optimizers(toy.network, AdamW(lr=0.02, eps=1e-2))
    for _ in range(3):
        for last in (False, True):
            with parallel.accumulating("network", last=last):
                loss, _ = parallel.loss("network", batch, Step(BATCH, torch.Generator(rt.device)))
                loss.backward()
        clip_gradients(toy.network, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        parallel.zero_grad("network")
    return {name: whole(tensor.detach()).clone() for name, tensor in toy.network.state_dict().items()}


MATRICES = ((12, 8), (12, 8), (12, 8), (5, 30), (3, 2, 3, 3), (1, 4))
"""Shapes of weights: several of one, rows that do not divide, a convolution, fewer rows than ranks."""


def muon_steps(mesh: DeviceMesh | None) -> list[Tensor]:
    """Weights after three steps of Muon with given gradients; they are sharded over the last axis of the mesh."""
    generator = torch.Generator().manual_seed(0)

    def spread(x: Tensor) -> Tensor:
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)] if mesh else []
        return distribute_tensor(x, mesh, placements) if mesh else x

    parameters = [nn.Parameter(spread(torch.randn(shape, generator=generator))) for shape in MATRICES]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for p in parameters:
            p.grad = spread(torch.randn(p.shape, generator=generator))
        optimizer.step()
    return [whole(p.detach()) for p in parameters]


def train_together(
    rank: int, ranks: int, folder: str, toys: Mapping[str, dict[str, Any]], stages: Mapping[str, str]
) -> None:
    """One of several processes: train each toy and each stage, and leave the results in `folder`."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    for name, settings in toys.items():
        rt = FolderRuntime(Path(folder, name), rank=rank, world_size=ranks)
        torch.save(train_toy(rt, **settings), Path(folder, f"{name}-{rank}.pt"))
    if toys:
        row = init_device_mesh("cpu", (ranks,))
        grid = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("replicas", "shards"))
        torch.save([muon_steps(row), muon_steps(grid)], Path(folder, f"muon-{rank}.pt"))
    for name, text in stages.items():
        spec = StageSpec.model_validate_json(text)
        rt = FolderRuntime(Path(folder, name), rank=rank, world_size=ranks)
        torch.save(train_sharded(spec, rt), Path(folder, f"{name}-{rank}.pt"))
    dist.destroy_process_group()


STEPS = 8
LEG: dict[str, Any] = {
    **{"noise": True, "micro_batch_size": 4, "samples": STEPS * BATCH},
    "ema_snapshots": {"every": 2 * BATCH, "sigma_rel": [0.1]},
}


def train_in_turns(rank: int, ranks: int, folder: str, turns: Sequence[tuple[str, int | str, bool]]) -> None:
    """One of several processes: (folder of the run, shards, whether to stop on the way), one turn after the other.

    What a turn gave is left as FOLDER-RANK.pt; the last one of a run counts.
    """
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    for name, shard_over, stops in turns:
        stop_at = 4 * BATCH if stops else None
        settings = {**LEG, "shard_over": shard_over, "offload_averages": name.endswith("offloaded")}
        rt = FolderRuntime(Path(folder, name), stop_at=stop_at, rank=rank, world_size=ranks, round_seconds=0.0)
        try:
            torch.save(train_toy(rt, **settings), Path(folder, f"{name}-{rank}.pt"))
            assert not stops
        except Interrupted as stopped:
            assert stops and 2 * BATCH < stopped.samples_seen < STEPS * BATCH
    dist.destroy_process_group()


def train_sharded(spec: StageSpec, rt: FolderRuntime) -> dict[str, Any]:
    """A stage as `launch.rank` trains it."""
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    objective, result = train_stage(spec, rt)
    plain = unsharded(objective, lambda: stage.objective(cfg, spec.inputs, rt.device), rank=rt.rank)
    return {"weights": weights(plain) if rt.rank == 0 else {}, "metrics": result.metrics}
