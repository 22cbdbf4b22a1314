"""Run a stage in this process, or under torchrun in as many as it started."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.launch.rank import train_rank
from genpipe.launch.run_stage import PartWorker, execute
from genpipe.pipeline.spec import Progress, StageSpec, write_progress
from genpipe.stages import is_training, load_stage


class LocalLauncher:
    """This process does the work; RANK, WORLD_SIZE and LOCAL_RANK are torchrun's."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def train(self, spec: StageSpec, run_id: str) -> None:
        train_rank(spec, run_id, rank=self.rank, world_size=self.world_size, device=self.device)

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        worker = PartWorker(spec)
        for done, part in enumerate(parts):
            write_progress(spec.work, Progress(done=done, total=len(parts), unit="parts"))
            worker(part)


def run_local(spec: StageSpec) -> Artifact:
    """Run a stage here and return its artifact; under torchrun rank 0 leads and the others only train with it."""
    launcher = LocalLauncher()
    if launcher.rank == 0:
        execute(spec, launcher)
    elif is_training(load_stage(spec.stage)) and artifacts.committed(spec.target) is None:
        launcher.train(spec, run_id="")
    if launcher.world_size > 1:
        dist.barrier()
    artifact = artifacts.committed(spec.target)
    assert artifact is not None, "rank 0 committed it, or raised"
    return artifact
