"""A training stage that tells how long its steps take, and that works only when it has the turn.

Its objective trains a DiT on noise held in memory. It ends a block of `block` steps by writing the seconds of
each to the socket `clock`, and begins the next when it is answered: `bench_train.py` lets a bare loop run in between.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role
from genpipe.data.loader import Data, SampleSet
from genpipe.models.dit import DiT, DiTConfig
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig

VERSION = 1
MAKES = "clocked"
HEADLINES = ("loss",)
SAMPLES = 512
SIZES = {
    "small": (DiTConfig(patch_size=2, width=256, depth=3, heads=4), 16),
    "base": (DiTConfig(patch_size=2, width=768, depth=12, heads=12), 32),
}
"""Networks, and the side of the latents that each is given."""


class Config(StageConfig):
    clock: str
    block: int
    size: str = "small"
    train: TrainConfig
    observe: ObserveTraining = ObserveTraining()


class Clock:
    """Steps of this process, told to the one that gives the turns."""

    def __init__(self, address: str, *, block: int) -> None:
        self.block, self.stamps = block, [0.0]
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)
        self._hand_over({"pid": os.getpid()})

    def step(self) -> None:
        """A step has ended; on a GPU, which is behind, that is known of a block's last one only."""
        if len(self.stamps) == self.block and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        if len(self.stamps) > self.block:
            steps = np.diff(self.stamps).tolist()
            self._hand_over({"steps": steps, "cpu": time.process_time() - self.cpu})

    def _hand_over(self, told: Mapping[str, Any]) -> None:
        self.socket.sendall(json.dumps(told).encode() + b"\n")
        if not self.socket.recv(1):
            raise SystemExit(0)  # nobody listens any longer
        self.cpu, self.stamps = time.process_time(), [time.perf_counter()]


@cache
def _noise(size: str) -> Tensor:
    side = SIZES[size][1]
    return torch.randn(SAMPLES, 4, side, side, generator=torch.Generator().manual_seed(0))


def images(size: str, indices: np.ndarray) -> Tensor:
    """Of all samples those of `indices`, [B, 4, SIDE, SIDE]."""
    return _noise(size)[torch.from_numpy(indices)]


class Objective:
    def __init__(self, clock: Clock | None, size: str, device: torch.device) -> None:
        self.clock = clock
        sizes = {"in_channels": 4, "out_channels": 4, "context_dim": None, "vector_dim": None, "classes": 0}
        self.model = DiT(SIZES[size][0], **sizes).to(device)  # type: ignore[arg-type]
        self.trainable: dict[str, nn.Module] = {"dit": self.model}

    def active(self, samples_seen: int) -> Sequence[str]:
        return ("dit",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        x0 = batch["images"]
        t = torch.rand(len(x0), generator=step.generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=step.generator, device=x0.device)
        share = t[:, None, None, None]
        return (self.model((1 - share) * x0 + share * noise, t) - (noise - x0)).square().mean(), {}

    def after_step(self) -> None:
        if self.clock is not None:
            self.clock.step()

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        return Validation({"loss": 0.0})


def roles(cfg: Config) -> dict[str, Role]:
    return {}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    return {}


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
        return {"images": images(cfg.size, indices)}

    return Data(train=SampleSet(SAMPLES, collate), heldout=SampleSet(16, collate))


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    side = SIZES[cfg.size][1]
    return {"images": torch.zeros(batch_size, 4, side, side)}


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    clock = None if device.type == "meta" else Clock(cfg.clock, block=cfg.block)
    return Objective(clock, cfg.size, device)


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    return {}
