"""A state saved and resumed: on other numbers of ranks, sharded or not, after faults; always the same bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from folder_runtime import FolderRuntime
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState

CFG = TrainConfig(samples=1000, global_batch_size=10)
Kind = Literal["plain", "sharded", "hybrid"]
LAYOUTS: list[tuple[Kind, int]] = [
    ("plain", 2),
    ("sharded", 4),
    ("hybrid", 4),
    ("sharded", 2),
    ("plain", 1),
    ("plain", 4),
]


class Net(nn.Module):
    """Sides that no number of ranks divides, a side of one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False))
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.inner(x)


def built(kind: Kind = "plain", *, seed: int = 0, width: int = 0) -> TrainState:
    torch.manual_seed(seed)
    net: nn.Module = nn.Linear(width, width) if width else Net()
    if kind != "plain":
        ranks = dist.get_world_size()
        shape, names = ((ranks,), ("shard",)) if kind == "sharded" else ((2, ranks // 2), ("copy", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(net.inner, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return TrainState.fresh({"net": net}, CFG)


def step(state: TrainState) -> None:
    net = state.trainable["net"]
    width = 5 if isinstance(net, Net) else net.in_features
    net(torch.randn(4, width)).square().mean().backward()
    for optimizer in state.optimizers["net"]:
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(net, Net):
        net.seen += 1
    state.emas["net"].update()
    state.samples_seen += CFG.global_batch_size
    state.step += 1


def whole(state: TrainState) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in state.tensors().items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pass_on(rank: int, folder: str) -> None:
    """One of four processes: each layout in turn takes over the state that the one before left."""
    torch.set_num_threads(1)
    for turn, (kind, ranks) in enumerate(LAYOUTS):
        if rank < ranks:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{turn}", rank=rank, world_size=ranks)
            take_over(FolderRuntime(Path(folder), rank=rank, world_size=ranks), kind, turn=turn)
            dist.barrier()
            dist.destroy_process_group()
        while not Path(folder, f"done-{turn}").exists():
            if rank == 0:
                Path(folder, f"done-{turn}").touch()
            time.sleep(0.01)


def take_over(rt: FolderRuntime, kind: Kind, *, turn: int) -> None:
    state = built(kind, seed=turn)
    resumed = state.resume(rt)
    found = whole(state)
    if turn == 0:
        assert not resumed
        step(state)
        step(state)
        found = whole(state)
        if rt.rank == 0:
            save_file(found, rt.work / "expected.safetensors")
    else:
        assert resumed and (state.samples_seen, state.step) == (20 + turn - 1, 2)
        assert same(found, load_file(rt.work / "expected.safetensors")), f"{kind} on {rt.world_size} ranks"
    if turn:
        state.samples_seen += 1
    state.save(rt)
    step(state)  # the optimizer takes what was loaded; what is written is from before
    state.wait()
    assert turn == 0 or rt.rank or not rt.events


@pytest.mark.slow
def test_other_ranks_sharded_or_not_go_on_from_the_same_bits(tmp_path: Path) -> None:
    """Plain on 2 -> sharded over 4 -> sharded twice over 2 -> sharded over 2 -> one process -> plain on 4."""
    mp.spawn(pass_on, args=(str(tmp_path),), nprocs=4)
    newest = FolderRuntime(tmp_path).checkpoints.names()[0]
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints" / newest).glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < sum(sizes) / 2, "each wrote its share"
