"""Run a stage in this process, or under torchrun in as many as it started."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from genpipe.artifacts import Artifact
from genpipe.launch.execute import PartWorker, execute, train_rank
from genpipe.launch.spec import Progress, StageSpec, write_progress


class LocalLauncher:
    """This process does the work; RANK, WORLD_SIZE and LOCAL_RANK are torchrun's."""

    def train(self, spec: StageSpec, run_id: str) -> None:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        train_rank(spec, run_id, rank=rank, world_size=world_size, device=device)

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        worker = PartWorker(spec)
        for done, part in enumerate(parts):
            write_progress(spec.work, Progress(done=done, total=len(parts), unit="parts"))
            worker(part)


def run_local(spec: StageSpec) -> Artifact:
    """Run a stage here and return its artifact."""
    return execute(spec, LocalLauncher())
