"""A regression that trains in milliseconds, on a stream in which chosen steps are bad: spawned processes import it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from folder_runtime import FolderRuntime
from torch import Tensor, nn

from genpipe.data.loader import Batch, Data, SampleSet
from genpipe.models.layers import ResidualBlock
from genpipe.stage_config import Resources
from genpipe.training.loop import train
from genpipe.training.objective import Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.training.sharding import whole

G = 4
"""Samples of a step."""


class Block(ResidualBlock):
    """A hidden matrix, which Muon optimizes where it is asked to, after running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden(self.norm(x)).tanh()


class Small:
    """y = sin(3 x) of x and noise; the loss of samples with `offset` is so much larger, their gradients are not."""

    noise = 1.0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 6), Block(), nn.Linear(6, 1))
        self.trainable: dict[str, nn.Module] = {"small": self.model}

    def active(self, samples_seen: int) -> Sequence[str]:
        return ("small",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        noise = torch.randn(len(batch["x"]), generator=step.generator)
        x = torch.stack([batch["x"], self.noise * noise], dim=1)
        error = (self.model(x)[:, 0] - (3 * batch["x"]).sin()).square() + batch["offset"]
        return error.mean(), {"x": batch["x"].mean()}

    def after_step(self) -> None:
        pass

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        return Validation({"x": float(np.mean([batch["x"].mean() for batch in batches]))})


def stream(bad: Mapping[int, tuple[str, float]] = {}, left_out: Sequence[int] = ()) -> Data:
    """Samples that follow from their place alone.

    `bad`: by step, the field of its first sample that has another value, and which. The steps of `left_out` are not in
    the stream; those that come later move up.
    """

    def collate(_: np.ndarray, positions: np.ndarray) -> Batch:
        for step in sorted(left_out):
            positions = np.where(positions >= step * G, positions + G, positions)
        x = torch.from_numpy(np.sin(7.0 * positions)).float()
        batch = {"x": x, "offset": torch.zeros_like(x)}
        for i, position in enumerate(positions.tolist()):
            if position % G == 0 and position // G in bad:
                field, value = bad[position // G]
                batch[field][i] = value
        return batch

    def heldout(indices: np.ndarray, _: np.ndarray) -> Batch:
        return {"x": torch.from_numpy(np.sin(7.0 * indices)).float()}

    return Data(train=SampleSet(64, collate), heldout=SampleSet(8, heldout))


def train_small(
    data: Data,
    rt: FolderRuntime,
    *,
    steps: int,
    log_every: int = 4,
    validate_every: int = 0,
    checkpoint_seconds: float | None = 1e9,
    build: Callable[[], Small] = Small,
    compile: bool = False,
    shard_over: int | str = 1,
    **settings: Any,
) -> dict[str, Tensor]:
    """Train at a constant rate, without an average, and return the tensors left in the model."""
    objective = build()
    fixed = {"decay": "constant", "ema_decay": 0.0, "precision": "fp32", "optim": {"kind": "adamw", "lr": 0.01}}
    cfg = TrainConfig.model_validate({"samples": steps * G, "global_batch_size": G, **fixed, **settings})
    resources = Resources.model_validate(
        {"checkpoint_seconds": checkpoint_seconds, "compile": compile, "shard_over": shard_over}
    )
    observe = ObserveTraining(log_every=log_every, validate_every=validate_every, heldout_samples=8)
    train(objective, data, cfg, rt, resources, observe)
    return {name: whole(tensor).clone() for name, tensor in objective.model.state_dict().items()}
