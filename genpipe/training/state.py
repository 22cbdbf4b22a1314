"""The state of a training run, and its checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from genpipe.training.ema import Ema
from genpipe.training.optim import TrainConfig, build_optimizers
from genpipe.training.runtime import Runtime

STATE_FILE = "state.pt"


@dataclass
class TrainState:
    """All that a resumed run needs. The place in the data and all randomness follow from `samples_seen`."""

    trainable: dict[str, nn.Module]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    emas: dict[str, Ema]
    samples_seen: int = 0
    step: int = 0

    @classmethod
    def fresh(cls, trainable: dict[str, nn.Module], cfg: TrainConfig) -> TrainState:
        return cls(
            trainable=trainable,
            optimizers={part: build_optimizers(module, cfg.optim) for part, module in trainable.items()},
            emas={part: Ema(module, decay=cfg.ema_decay) for part, module in trainable.items()},
        )

    def save(self, rt: Runtime) -> None:
        """Commit a checkpoint through the runtime."""
        state = {
            "samples_seen": self.samples_seen,
            "step": self.step,
            "trainable": {part: module.state_dict() for part, module in self.trainable.items()},
            "optimizers": {part: [o.state_dict() for o in group] for part, group in self.optimizers.items()},
            "emas": {part: ema.state_dict() for part, ema in self.emas.items()},
        }
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder, STATE_FILE))
            rt.save(Path(folder), samples_seen=self.samples_seen)

    def resume(self, rt: Runtime) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        folder = rt.latest()
        if folder is None:
            return
        state = torch.load(folder / STATE_FILE, map_location=rt.device, weights_only=True)
        shutil.rmtree(folder)
        self.samples_seen, self.step = state["samples_seen"], state["step"]
        for part, module in self.trainable.items():
            module.load_state_dict(state["trainable"][part])
            self.emas[part].load_state_dict(state["emas"][part])
            for optimizer, saved in zip(self.optimizers[part], state["optimizers"][part], strict=True):
                optimizer.load_state_dict(saved)
