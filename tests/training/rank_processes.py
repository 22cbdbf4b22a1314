"""What the processes of tests with several ranks do: a module that spawned processes can import by name."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from folder_runtime import FolderRuntime, build, full_disk, sgd, train_stage, weights
from parallel_ranks import BATCH, DATA, Toy, train_toy
from small_objective import G, Small, stream, train_small
from torch import nn

from genpipe.data.image_batches import Images
from genpipe.data.loader import Batches
from genpipe.data.order import order_of
from genpipe.data.shard_dataset import ShardDataset
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import StageSpec
from genpipe.training import compile as compiling
from genpipe.training import deferred, loop, state
from genpipe.training.agreement import Agreement
from genpipe.training.bad_samples import Damage
from genpipe.training.handover import HandOverStore
from genpipe.training.loop import Interrupted
from genpipe.training.settings import TrainConfig

RANKS = 2
SAMPLES = 60
PATIENCE = 100.0
"""Seconds after which a process that waits for others says where, and ends."""


def train_recorded(spec: StageSpec, rt: FolderRuntime) -> dict[str, Any]:
    """Train, and keep what the steps' generators were seeded with."""
    seeds: list[tuple[Any, ...]] = []
    seeded = loop.seeded

    def recording(device: torch.device, *identity: object) -> torch.Generator:
        seeds.append(identity)
        return seeded(device, *identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "seeded", recording)
        patch.setattr(state, "build_optimizers", sgd)
        objective, result = train_stage(spec, rt)
    record = {"weights": weights(objective), "initial": weights(build(spec))}
    return {**record, "seeds": seeds, "logged": rt.logged, "metrics": result.metrics}


def train_stages(rank: int, specs: dict[str, str], folder: str) -> None:
    """One of two processes: train every stage and leave the results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for stage, spec in specs.items():
        rt = FolderRuntime(Path(folder, stage), rank=rank, world_size=RANKS)
        record = train_recorded(StageSpec.model_validate_json(spec), rt)
        torch.save(record, Path(folder, f"{stage}-{rank}.pt"))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    artifact = run_local(StageSpec.model_validate_json(specs["upsampler"]))
    Path(folder, f"artifact-{rank}.json").write_text(artifact.model_dump_json())
    dist.destroy_process_group()


@dataclass
class Outcome:
    counts: list[int]
    error: str
    files: dict[str, str]


def count_damage(rank: int, folder: str) -> None:
    """One of two processes: count the damage that both meet and leave an `Outcome` in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    rt = FolderRuntime(Path(folder), rank=rank, world_size=RANKS)
    dataset = ShardDataset(Path(folder), split="train")
    batches = Batches(
        Images(dataset, 8),
        order=order_of(dataset.sources(), weights={}, seed=0),
        global_batch_size=4,
        micro_batch_size=2,
        rank=rank,
        world_size=RANKS,
        start=0,
        prefetch=1,
    )
    damage = Damage(batches, rt, length=len(dataset), max_share=0.04, start=0)
    outcome = Outcome([], "", {})
    try:
        for _ in range(SAMPLES):
            next(batches)
            outcome.counts.append(damage.report())
    except ValueError as error:
        outcome.error = str(error)
    outcome.files = rt.files
    Path(folder, f"outcome-{rank}").write_text(json.dumps(vars(outcome)))
    dist.destroy_process_group()


def agree(rank: int, folder: str, round_seconds: float) -> None:
    """One of two processes: rank 1 raises a flag from its fourth step until it is seen; each tells when it saw it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    rt = FolderRuntime(Path(folder), rank=rank, world_size=RANKS, round_seconds=round_seconds)
    agreement = Agreement(rt, flags=2)
    seen: list[int] = []
    rounds = 0
    for step in range(400):
        before = agreement._work
        stop, other = agreement.ask(rank == 1 and step >= 3 and not seen, False)
        rounds += agreement._work is not before
        assert not other
        seen += [step] if stop else []
        time.sleep(0.002)
    agreement.close()
    Path(folder, f"seen-{rank}").write_text(json.dumps([seen, rounds]))
    dist.destroy_process_group()


def train_small_ranks(rank: int, folder: str) -> None:
    """One of two processes: train on a stream with bad steps, of which each is met by one rank alone."""
    torch.set_num_threads(1)
    bad = {3: ("x", math.nan), 6: ("offset", math.nan), **dict.fromkeys((12, 13, 14), ("x", math.inf))}
    settings: dict[str, Any] = {"steps": 24, "micro_batch_size": 2, "guard": {"steps": 3}, "build": Plain}
    settings["optim"] = {"kind": "adamw", "lr": 0.01, "eps": 1e-3}  # small gradients' last bits are not blown up
    if rank == 0:
        alone = train_small(stream(bad), FolderRuntime(Path(folder, "alone")), **settings)
        torch.save(alone, Path(folder, "alone.pt"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    rt = FolderRuntime(Path(folder, "together"), rank=rank, world_size=RANKS)
    torch.save(train_small(stream(bad), rt, **settings), Path(folder, f"{rank}.pt"))
    assert rank or (rt.logged[24 * G]["rollbacks"] == 1 and rt.logged[24 * G]["skipped_steps"] == 2)
    dist.destroy_process_group()


def lose_checkpoints(rank: int, folder: str, port: int) -> None:
    """One of two processes: a stop with its checkpoint, then one without, then training without any; what each says."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    state.MOST_SECONDS = 0.0
    settings: dict[str, Any] = {"steps": 300, "log_every": 1, "micro_batch_size": 2, "build": Plain}
    said = []
    for stop_at, limit, seconds in ((16, nullcontext(), 1e9), (28, full_disk(), 1e9), (None, full_disk(), 1e-9)):
        rt = FolderRuntime(Path(folder), stop_at, rank=rank, world_size=RANKS, round_seconds=0.0)
        with limit, pytest.raises((Interrupted, OSError)) as ended:
            train_small(stream(), rt, checkpoint_seconds=seconds, **settings)
        said.append(f"{type(ended.value).__name__}: {ended.value}")
    Path(folder, f"said-{rank}").write_text(json.dumps(said))
    dist.destroy_process_group()


COMPILED: dict[str, Any] = {"steps": 6, "micro_batch_size": 2, "optim": {"kind": "adamw", "lr": 0.01, "eps": 1e-3}}


def compile_small_ranks(rank: int, folder: str, cases: Mapping[str, tuple[Sequence[Any], int | str]]) -> None:
    """One of two processes, each with compilers of its own: train, and leave what was said and the weights.

    By the name of a case: the compiler of each rank, and over how many they shard.
    """
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for name, (backends, shard_over) in cases.items():
        torch._dynamo.reset()
        compiling.BACKEND = backends[rank]
        rt = FolderRuntime(Path(folder, name), rank=rank, world_size=RANKS)
        tensors = train_small(stream(), rt, build=Plain, compile=True, shard_over=shard_over, **COMPILED)
        found = {"weights": tensors, "events": rt.events, "told": rt.environment.get("compiled")}
        torch.save(found, Path(folder, f"{name}-{rank}.pt"))
    dist.destroy_process_group()


def defer_toys(rank: int, folder: str) -> None:
    """One of two processes: train the toy sharded, and leave what was logged of validations by who validates."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for case in ("loop", "beside", "left"):
        rt = FolderRuntime(Path(folder, case), rank=rank, world_size=RANKS)
        rt.handovers.attended = case != "loop"
        deferred.PATIENCE_SECONDS = deferred.PATIENCE = 0.0 if case == "left" else 50.0
        # Its weights are drawn here: all threads of a process share torch's generator.
        thread = threading.Thread(target=validate_toy, args=(rt.handovers, Toy(noise=False)), daemon=True)
        if case == "beside" and rank == 0:
            thread.start()
        train_toy(rt, noise=False, shard_over="all")
        heldout = {at: values["heldout/loss"] for at, values in rt.logged.items() if "heldout/loss" in values}
        assert rank or rt.events == ["the validator has found nothing for 0 s; the ranks validate what is left"] * (
            case == "left"
        )
        if rank == 0:
            torch.save(heldout, Path(folder, f"{case}.pt"))
    dist.destroy_process_group()


def validate_toy(store: HandOverStore, toy: Toy) -> None:
    """Validate the first hand-over of the toy."""
    while not (waiting := store.waiting()):
        time.sleep(0.02)
    cfg = TrainConfig(samples=BATCH, global_batch_size=BATCH)
    deferred.answer(store, waiting[0], toy, DATA, cfg, device=torch.device("cpu"), heldout_samples=8)


class Plain(Small):
    """Without statistics of a batch, which are a rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.model[1].norm = nn.Identity()
