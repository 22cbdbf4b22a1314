"""The state of a training run, and its checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from genpipe.data.loader import skip_ranges
from genpipe.models.precision import Products
from genpipe.training.ema import Ema
from genpipe.training.guard import Guard
from genpipe.training.optim import build_optimizers
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig

STATE_FILE = "state.pt"


@dataclass
class TrainState:
    """All that a resumed run needs. The place in the data and all randomness follow from `samples_seen`."""

    trainable: dict[str, nn.Module]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    emas: dict[str, Ema]
    guard: Guard
    samples_seen: int = 0
    step: int = 0
    products: Products = "fp32"
    """The precision of matrix products, which a run keeps to its end."""

    @classmethod
    def fresh(cls, trainable: dict[str, nn.Module], cfg: TrainConfig) -> TrainState:
        """The state before the first step: each module's optimizers as `cfg` says, averages of the first weights."""
        return cls(
            trainable=trainable,
            optimizers={name: build_optimizers(module, cfg.of(name).optim) for name, module in trainable.items()},
            emas={name: Ema(module, decay=cfg.ema_decay) for name, module in trainable.items()},
            guard=Guard(cfg.guard, global_batch_size=cfg.global_batch_size),
        )

    def advance(self) -> None:
        """Count a step, and pass over the data that is skipped."""
        self.samples_seen += self.guard.global_batch_size
        self.skip_windows()

    def skip_windows(self) -> None:
        """Pass over data that is skipped: it counts as seen, so that schedules and the end stay in place."""
        self.samples_seen = skip_ranges(self.samples_seen, self.guard.windows)
        self.step = self.samples_seen // self.guard.global_batch_size

    def save(self, rt: Runtime) -> None:
        """Commit a checkpoint through the runtime."""
        state = {
            "samples_seen": self.samples_seen,
            "step": self.step,
            "products": self.products,
            "trainable": {name: module.state_dict() for name, module in self.trainable.items()},
            "optimizers": {name: [o.state_dict() for o in group] for name, group in self.optimizers.items()},
            "emas": {name: ema.state_dict() for name, ema in self.emas.items()},
            "guard": self.guard.state_dict(),
        }
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder, STATE_FILE))
            rt.save(Path(folder), samples_seen=self.samples_seen)

    def resume(self, rt: Runtime) -> bool:
        """Go on from the newest intact checkpoint; False if there is none."""
        folder = rt.latest()
        if folder is None:
            return False
        state = torch.load(folder / STATE_FILE, map_location=rt.device, weights_only=True)
        shutil.rmtree(folder)
        self.samples_seen, self.step, self.products = state["samples_seen"], state["step"], state["products"]
        self.guard.load_state_dict(state["guard"])
        for name, module in self.trainable.items():
            module.load_state_dict(state["trainable"][name])
            self.emas[name].load_state_dict(state["emas"][name])
            for optimizer, saved in zip(self.optimizers[name], state["optimizers"][name], strict=True):
                optimizer.load_state_dict(saved)
        return True
