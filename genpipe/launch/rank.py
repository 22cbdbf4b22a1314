"""One rank of a training stage, whoever started it: its runtime, and what it does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from genpipe.launch import lease
from genpipe.launch.checkpoints import latest_checkpoint, save_checkpoint
from genpipe.launch.process import set_up_process
from genpipe.launch.run_stage import commit
from genpipe.pipeline.spec import Progress, StageSpec, write_progress
from genpipe.stages import load_stage
from genpipe.tracking.recording import records_of
from genpipe.training.loop import train


def train_rank(spec: StageSpec, run_id: str, *, rank: int, world_size: int, device: torch.device) -> None:
    """What every rank of a training stage does; rank 0 also exports, records and commits."""
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    set_up_process(cfg, products="medium")  # bf16 passes, TF32
    torch.manual_seed(cfg.train.seed)  # the same initial weights on every rank
    with RankRuntime(spec, run_id, rank=rank, world_size=world_size, device=device, total=cfg.train.samples) as rt:
        objective = stage.objective(cfg, spec.inputs, device)
        result = train(objective, stage.data(cfg, spec.inputs), cfg.train, rt, cfg.resources, cfg.observe)
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                meta = stage.export(objective, cfg, spec.inputs, Path(folder))
                commit(
                    spec,
                    folder=Path(folder),
                    meta=meta,
                    metrics=result.metrics,
                    environment=rt.environment,
                    run_id=run_id,
                )


@dataclass
class RankRuntime:
    """The Runtime of one rank: records go to the stage's run, checkpoints to its work folder."""

    spec: StageSpec
    run_id: str
    rank: int
    world_size: int
    device: torch.device
    total: int
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> RankRuntime:
        self.run = records_of(self.spec.tracking_uri).attach(self.spec, self.run_id) if self.rank == 0 else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.run:
            self.run.close()

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        """Record metrics in the run, and progress in the work folder."""
        assert self.run is not None, "only rank 0 logs"
        self.run.log(metrics, samples_seen=samples_seen)
        rate = metrics.get("samples_per_second")
        if rate is not None:
            write_progress(self.spec.work, Progress(done=samples_seen, total=self.total, rate=rate, metrics=metrics))

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        """Record pictures in the run."""
        assert self.run is not None, "only rank 0 logs"
        for name, image in images.items():
            self.run.log_image(name, image, samples_seen=samples_seen)

    def log_file(self, path: Path) -> None:
        """Record a file in the run."""
        assert self.run is not None, "only rank 0 logs"
        self.run.log_file(path)

    def log_environment(self, facts: dict[str, str]) -> None:
        """Tag the run, and keep the facts for the manifest."""
        assert self.run is not None, "only rank 0 logs"
        self.environment |= facts
        self.run.set_tags(facts)

    def save(self, folder: Path, *, samples_seen: int) -> None:
        """Commit a checkpoint to the work folder. Raises LeaseLost if another attempt has taken over."""
        lease.check(self.spec)
        save_checkpoint(self.spec.work, folder, samples_seen=samples_seen)

    def latest(self) -> Path | None:
        """A copy of the newest intact checkpoint of the work folder."""
        return latest_checkpoint(self.spec.work)

    def should_stop(self) -> bool:
        """Never: a job that is to stop is killed."""
        return False
