"""A training stage: fits a line through the points of `toy_data`."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.data.loader import Data, SampleSet
from genpipe.stage_config import StageConfig
from genpipe.training.checkpoint import Snapshot
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig

VERSION = 1
MAKES = "toy_line"
HEADLINES = ("loss",)


class Config(StageConfig):
    width: int = 1
    step_seconds: float = 0.0
    fail: str = ""
    fail_while: str = ""
    hang_while: str = ""
    stall_while: str = ""
    slow_while: str = ""
    train: TrainConfig
    observe: ObserveTraining = ObserveTraining()


def roles(cfg: Config) -> dict[str, Role]:
    return {"toy_data": Role("toy_data")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    width = inputs["toy_data"].meta["width"]
    if width != cfg.width:
        raise ValueError(f"width: {cfg.width}, but toy_data has {width}; set both alike")
    return {"width": cfg.width}


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    points = np.concatenate([np.load(path) for path in sorted(fetch(inputs["toy_data"]).glob("*.npy"))])

    def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
        while cfg.stall_while and os.path.exists(cfg.stall_while) and _last_rank():
            time.sleep(0.1)
        return {"x": torch.from_numpy(points[indices, :1]), "y": torch.from_numpy(points[indices, 1:])}

    return Data(train=SampleSet(len(points), collate), heldout=SampleSet(16, collate))


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    return {"x": torch.zeros(batch_size, 1), "y": torch.zeros(batch_size, 1)}


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    if cfg.slow_while and device.type != "meta":
        Snapshot.write = partialmethod(_write_slowly, Snapshot.write, cfg.slow_while)  # type: ignore[method-assign]
    return Objective(cfg, device)


def _write_slowly(
    snapshot: Snapshot, write: Callable[[Snapshot, Path], tuple[int, str]], slow_while: str, path: Path
) -> tuple[int, str]:
    """As to a store that takes small files at once, and large ones in its own time."""
    while os.path.exists(slow_while):
        time.sleep(0.1)
    return write(snapshot, path)


def _last_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


class Objective:
    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg = cfg
        self.model = nn.Linear(1, 1).to(device)
        self.trainable: dict[str, nn.Module] = {"line": self.model}

    def active(self, samples_seen: int) -> Sequence[str]:
        return ("line",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        if batch["x"].is_meta:  # planned, not trained
            return (self.model(batch["x"]) - batch["y"]).square().mean(), {}
        if self.cfg.fail:
            raise ValueError(self.cfg.fail)
        if self.cfg.fail_while and os.path.exists(self.cfg.fail_while):
            raise OSError(errno.ENOSPC, "No space left on device", self.cfg.fail_while)
        while self.cfg.hang_while and os.path.exists(self.cfg.hang_while) and _last_rank():
            time.sleep(0.1)
        time.sleep(self.cfg.step_seconds)
        return (self.model(batch["x"]) - batch["y"]).square().mean(), {"pid": torch.tensor(float(os.getpid()))}

    def after_step(self) -> None:
        pass

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        errors = [(self.model(batch["x"]) - batch["y"]).square().mean().item() for batch in batches]
        return Validation({"loss": float(np.mean(errors))}, {"picture": np.zeros((8, 8, 3), np.uint8)})


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    save_file(objective.model.state_dict(), folder / "model.safetensors")
    return {"slope": objective.model.weight.item()}
