"""A Runtime of one process that keeps its records in memory and its checkpoints in a folder, as the real one does."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources
from genpipe.stages import load_stage
from genpipe.training.averages import AverageStore
from genpipe.training.checkpoint_store import CheckpointStore, samples_of
from genpipe.training.handover import HandOverStore
from genpipe.training.loop import train
from genpipe.training.objective import Objective, Validation
from genpipe.training.runtime import Phase

CPU = torch.device("cpu")
SGD_RATE = 0.05
STEP = 16
"""Samples of a step of most trainings of tests."""


@dataclass
class FolderRuntime:
    """It asks for a stop when it has logged all but one step, of `step` samples, of `stop_at` samples."""

    work: Path
    stop_at: int | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    reported: list[int] = field(default_factory=list)
    phases: dict[str, int] = field(default_factory=dict)
    round_seconds: float = 0.1
    step: int = STEP
    checkpoints: CheckpointStore = field(init=False)
    averages: AverageStore = field(init=False)
    handovers: HandOverStore = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = CheckpointStore(str(self.work / "checkpoints"))
        self.averages = AverageStore(str(self.work / "artifact"))
        self.handovers = HandOverStore(str(self.work / "validations"))

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        assert self.rank == 0, "only rank 0 logs"
        self.logged.setdefault(samples_seen, {}).update(metrics)
        if "samples_per_second" in metrics:
            self.reported.append(samples_seen)

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        self.pictures += images

    def log_file(self, path: Path) -> None:
        assert self.rank == 0, "only rank 0 logs"
        self.files[path.name] = path.read_text()

    def log_environment(self, facts: dict[str, str]) -> None:
        assert self.rank == 0, "only rank 0 logs"
        self.environment |= facts

    def log_event(self, message: str, *, samples_seen: int) -> None:
        assert self.rank == 0, "only rank 0 logs"
        self.events.append(message)

    def enter(self, phase: Phase) -> None:
        self.phases[phase] = self.phases.get(phase, 0) + 1

    def should_stop(self) -> bool:
        return self.stop_at is not None and max(self.logged, default=0) + self.step >= self.stop_at

    def saved(self) -> list[int]:
        """Samples seen of the committed checkpoints."""
        return [samples_of(name) for name in reversed(self.checkpoints.names())]


def train_stage(
    spec: StageSpec, rt: FolderRuntime, *, resources: Resources | None = None
) -> tuple[Objective, Validation]:
    """Train a stage as `launch.rank.train_rank` does, with this runtime."""
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    objective = build(spec, device=rt.device)
    result = train(objective, stage.data(cfg, spec.inputs), cfg.train, rt, resources or cfg.resources, cfg.observe)
    return objective, result


def build(spec: StageSpec, *, device: torch.device = CPU) -> Objective:
    """The objective of a training stage with its initial weights."""
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    torch.manual_seed(cfg.train.seed)
    objective: Objective = stage.objective(cfg, spec.inputs, device)
    return objective


def weights(objective: Objective) -> dict[str, Tensor]:
    """Every tensor of every trainable module, by dotted name."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, module in objective.trainable.items()
        for key, tensor in module.state_dict().items()
    }


def sgd(module: nn.Module, _: object) -> list[torch.optim.Optimizer]:
    """Ranks add in another order, so gradients differ in their last bits; Adam, dividing by their size, blows those
    bits up where a gradient is near zero. Plain descent shows gradients as they are.
    """
    optimizer = torch.optim.SGD(module.parameters(), lr=SGD_RATE, fused=True)
    optimizer.param_groups[0]["peak_lr"] = SGD_RATE
    return [optimizer]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may have more than 1,000 bytes: a write beyond that is an error, as on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
