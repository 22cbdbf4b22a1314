"""A state saved and resumed: on other numbers of ranks, sharded or not, after faults; always the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from folder_runtime import FolderRuntime, full_disk
from rank_processes import lose_checkpoints
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toybox import free_port

from genpipe.storage import open_storage
from genpipe.training import state as state_module
from genpipe.training.checkpoint_store import CheckpointStore
from genpipe.training.settings import BestConfig, TrainConfig
from genpipe.training.state import TrainState

CFG = TrainConfig(samples=1000, global_batch_size=10, best=BestConfig(every=10))
Kind = Literal["plain", "sharded", "hybrid"]
LAYOUTS: list[tuple[Kind, int]] = [
    ("plain", 2),
    ("sharded", 4),
    ("hybrid", 4),
    ("sharded", 2),
    ("plain", 1),
    ("plain", 4),
]


DAMAGED = 3
"""The turn before which the file of another rank than 0 is damaged: both ranks take the checkpoint before."""


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
    assert state.best is not None
    state.best.take(float(state.step), state.trainable, state.emas, at=state.samples_seen)
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
    if turn == DAMAGED and rt.rank == 0:
        truncate(sorted(rt.work.glob("checkpoints/*/*.safetensors"))[-1])
    dist.barrier()
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
        before = turn - 1 if turn <= DAMAGED else turn - 2
        assert resumed and (state.samples_seen, state.step) == (20 + before - (turn == DAMAGED), 2)
        assert same(found, load_file(rt.work / "expected.safetensors")), f"{kind} on {rt.world_size} ranks"
    if turn:
        state.samples_seen += 1
    state.save(rt)
    step(state)  # the optimizer takes what was loaded; what is written is from before
    state.wait(rt)
    told = ["passed over a damaged checkpoint"] if turn == DAMAGED and rt.rank == 0 else []
    assert [event.partition(":")[0] for event in rt.events] == told


@pytest.mark.slow
def test_other_ranks_sharded_or_not_go_on_from_the_same_bits(tmp_path: Path) -> None:
    """Plain on 2 -> sharded over 4 -> sharded twice over 2 -> sharded over 2 -> one process -> plain on 4."""
    run_ranks(pass_on, str(tmp_path), ranks=4)
    newest = FolderRuntime(tmp_path).checkpoints.names()[0]
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints" / newest).glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < sum(sizes) / 2, "each wrote its share"


@pytest.fixture
def rt(tmp_path: Path) -> FolderRuntime:
    return FolderRuntime(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_failed_write_is_told_and_the_next_one_is_made(rt: FolderRuntime) -> None:
    state = built(width=32)
    assert not state.resume(rt)
    step(state)
    with full_disk():
        state.save(rt)
        state.wait(rt)
    assert rt.saved() == [] and (state.failed, state.newest_of_all(rt)) == (1, (0, state.fault))
    [told] = rt.events
    assert told.startswith("a checkpoint could not be written, training goes on: ") and "File too large" in told
    step(state)
    state.save(rt)
    state.wait(rt)
    assert rt.saved() == [20] and len(rt.events) == 1
    assert (state.failed, state.newest_of_all(rt)) == (0, (20, ""))
    again = built(width=32, seed=1)
    assert again.resume(rt) and same(whole(again), whole(state))


def test_training_is_hopeless_once_checkpoints_fail_often_and_for_long(
    rt: FolderRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = built(width=32)
    step(state)
    state.save(rt)
    state.wait(rt)
    step(state)
    for count in range(1, 4):
        with full_disk():
            state.save(rt)
            state.wait(rt)
        assert not state.hopeless, "half an hour has not passed"
        monkeypatch.setattr(state_module, "MOST_SECONDS", 0.0)
        assert state.hopeless == (count == 3)
        monkeypatch.undo()
    with pytest.raises(OSError, match=r"last 3 checkpoints could not be written, .* that of 10 samples: .*too large"):
        state.give_up(rt)


@pytest.mark.slow
def test_ranks_that_lose_their_checkpoints_say_the_same(tmp_path: Path) -> None:
    """They stop, or give up, together, and know of the newest that there is."""
    run_ranks(lose_checkpoints, str(tmp_path), free_port(), ranks=2)
    first, second = (json.loads((tmp_path / f"said-{rank}").read_text()) for rank in range(2))
    assert first == second
    stopped, without, gave_up = first
    told = re.fullmatch(r"Interrupted: stopped at (\d+) samples; a new run goes on from there", stopped)
    assert told
    assert re.fullmatch(rf"Interrupted: stopped at \d+ samples; .* from {told[1]} samples, as .*: .*too large", without)
    assert re.fullmatch(rf"OSError: the last \d+ checkpoints .* that of {told[1]} samples: .*too large", gave_up)


def test_another_error_of_the_background_is_raised(rt: FolderRuntime) -> None:
    class LeaseLost(Exception):
        pass

    def refuse() -> None:
        raise LeaseLost

    rt.checkpoints.before_commit = refuse
    state = built(width=4)
    state.save(rt)
    with pytest.raises(LeaseLost):
        state.save(rt)
    assert rt.saved() == [] and rt.events == []


def test_a_checkpoint_under_way_is_finished_when_training_fails(rt: FolderRuntime) -> None:
    state = built(width=64)
    with pytest.raises(FloatingPointError), state.checkpoints_finished(rt):
        step(state)
        state.save(rt)
        raise FloatingPointError
    assert rt.saved() == [10]


def test_an_optimizer_begins_anew_where_the_checkpoint_has_none(rt: FolderRuntime) -> None:
    """Rolled back to before its first step, as a discriminator that joins late."""
    state = built(width=4)
    state.save(rt)
    expected = whole(state)
    step(state)
    assert state.resume(rt)
    assert same(whole(state), expected) and not any("exp_avg" in name for name in expected)


def test_tensors_go_by_the_names_of_weights() -> None:
    state = built()
    step(state)
    names = set(state.tensors())
    assert {"trainable/net/seen", "emas/net/gain", "optimizers/net/0/inner.2.weight/exp_avg_sq"} <= names
    kinds = ("trainable/net/", "emas/net/", "optimizers/net/0/", "scales/net/", "best/net/")
    assert all(name.startswith(kinds) for name in names)


KILLED = """
import os, signal, sys
from pathlib import Path
from folder_runtime import FolderRuntime
from test_state import built, step
state, rt = built(width=1500), FolderRuntime(Path(sys.argv[1]))
state.resume(rt)
state.save(rt)
state.wait(rt)
step(state)
state.save(rt)
while not list(rt.work.glob("checkpoints/*/*.part")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_it_writes(rt: FolderRuntime) -> None:
    """72 MB are under way: the checkpoint before is taken, and what is left of this one deleted."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(rt.work)], env=environment())
    assert killed.returncode == -signal.SIGKILL
    folders = list((rt.work / "checkpoints").iterdir())
    assert len(folders) == 2 and rt.saved() == [0]
    state = built(width=1500, seed=1)
    assert state.resume(rt)
    assert same(whole(state), whole(built(width=1500)))
    assert len(list((rt.work / "checkpoints").iterdir())) == 1


def environment() -> dict[str, str]:
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), str(tests.parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def test_checkpoints_on_s3(s3_server: str, rt: FolderRuntime) -> None:
    rt.checkpoints = CheckpointStore(f"s3://genpipe/{rt.work.name}")
    state = built()
    for _ in range(3):
        step(state)
        state.save(rt)
    state.wait(rt)
    assert rt.saved() == [20, 30] and rt.events == []
    rt.checkpoints = CheckpointStore(rt.checkpoints.uri)
    again = built(seed=1)
    assert again.resume(rt) and same(whole(again), whole(state))
    storage = open_storage(rt.checkpoints.uri)
    [key] = [entry.key for entry in storage.list(f"{rt.checkpoints.names()[0]}/rank")]
    storage.write(key, storage.read(key)[:-1] + b"?")
    assert built(seed=1).resume(rt)
    [told] = rt.events
    assert told == (
        f"passed over a damaged checkpoint: {rt.checkpoints.uri}/{key}: its content differs from the manifest's sha256"
    )
