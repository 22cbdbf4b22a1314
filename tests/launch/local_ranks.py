"""Ranks of `python -m genpipe.launch.local`, started as torchrun or Slurm start them, for tests to signal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor
from toybox import TOYS, free_port, install, wait_for

from genpipe.launch.local import main, spec_of_stage
from genpipe.pipeline.spec import Progress, StageSpec, read_progress
from genpipe.training.checkpoint_store import samples_of

STEPS = 100
BATCH = 4


class Line:
    """A pipeline in a folder whose stage `line` trains for some seconds; its data are made."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        install()
        folder.mkdir(parents=True, exist_ok=True)
        train = {"samples": STEPS * BATCH, "global_batch_size": BATCH, "micro_batch_size": 2, "precision": "fp32"}
        line = {"kind": "toys.toy_line", "inputs": {"toy_data": "points"}, "train": train, "step_seconds": 0.03}
        stages = {"points": {"kind": "toys.toy_data", "parts": 2}, "line": line | settings}
        self.config = folder / "toy.yaml"
        tracking = {"uri": "jsonl"}
        pipeline = {"name": "toy", "store": str(folder / "store"), "tracking": tracking, "stages": stages}
        self.config.write_text(yaml.safe_dump(pipeline))
        assert main([str(self.config), "points"]) == 0

    @property
    def spec(self) -> StageSpec:
        return spec_of_stage(str(self.config), "line")

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(Path(self.spec.target.uri, "model.safetensors"))

    @property
    def checkpoints(self) -> list[int]:
        """Samples seen of those that are newer than the beginning."""
        found = (samples_of(path.parent.name) for path in Path(self.spec.work).glob("checkpoints/*/manifest.json"))
        return sorted(at for at in found if at)

    def wait_until_it_trains(self) -> Progress:
        """Its first progress in an attempt."""
        found: Progress = wait_for(lambda: read_progress(self.spec.work))
        return found

    @contextmanager
    def ranks(self, count: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
        """Run the stage by so many ranks, and kill those that are left at the end."""
        Path(self.spec.work, "progress.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "genpipe.launch.local", str(self.config), "line"]
        there = os.environ.get("PYTHONPATH", "")
        shared = {"PYTHONPATH": f"{TOYS}:{TOYS.parent.parent}:{there}", "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def statuses(processes: Sequence[subprocess.Popen[str]], *, seconds: float = 240.0) -> list[int]:
    """The exit statuses of processes that end by themselves."""
    return [process.wait(seconds) for process in processes]
