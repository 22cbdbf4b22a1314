"""What a training run is configured with, and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from genpipe.config import Config
from genpipe.data.loader import check_batch_sizes
from genpipe.models.precision import Precision
from genpipe.training.ema import WIDEST
from genpipe.training.optim import AdamW, OptimConfig

Decay = Literal["constant", "linear", "cosine"]


class TrainableConfig(Config):
    """How one trainable module is optimized where that differs from the others; what is not given is as in `train`."""

    optim: OptimConfig | None = Field(None, description="an optimizer of its own; nothing of `train.optim` is kept")
    warmup_samples: int | None = Field(None, ge=0, description="samples over which its learning rate rises")
    decay: Decay | None = Field(None, description="of its learning rate")
    final_lr: float | None = Field(None, ge=0, le=1, description="share of its learning rate that is left at the end")
    every: int = Field(1, ge=1, description="steps of the run between updates of this module")


class GuardConfig(Config):
    """When training goes back to a checkpoint and skips what it met since.

    Steps with a loss or gradient that is not finite are never applied. A run of them, or of losses far off, ends in a
    rollback; the part of the data that is skipped is the run and as many steps before it (as Chowdhery et al. 2022,
    section 5.1, did by hand).
    """

    steps: int = Field(16, ge=1, description="bad steps in a row that make training go back")
    deviations: float | None = Field(
        20.0, gt=0, description="robust standard deviations above the recent median that make a loss bad; null: none do"
    )
    rollbacks: int = Field(3, ge=0, description="how often training goes back before it fails")


class BestConfig(Config):
    """Keep the averaged weights of the best held-out validation, not the last ones, and perhaps end early."""

    every: int = Field(ge=1, description="samples between the validations that are compared; the end is one, too")
    metric: str = Field("loss", description="held-out metric that compares them")
    goal: Literal["min", "max"] = Field("min", description="whether less or more of it is better")
    heldout_samples: int = Field(256, ge=1, description="held-out samples of one validation")
    patience: int | None = Field(
        None, ge=1, description="samples without a better one after which training ends; null: train to the end"
    )


class EmaSnapshots(Config):
    """Power-function averages that are kept with the weights, to make those of other widths from when it is over."""

    every: int = Field(gt=0, description="samples between snapshots; the last one is taken at the end")
    sigma_rel: tuple[Annotated[float, Field(gt=0, lt=WIDEST)], ...] = Field(
        (0.05, 0.1), min_length=1, description="widths, as shares of the training so far; each is one more average"
    )

    @model_validator(mode="after")
    def _widths_differ(self) -> EmaSnapshots:
        if len({f"{width:g}" for width in self.sigma_rel}) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel: {self.sigma_rel}; name each width once")
        return self


class TrainConfig(Config):
    """One training run. Progress is counted in samples, so that batch size and ranks may change."""

    samples: int = Field(ge=0, description="samples to train on, repeats included; 0: weights stay as they begin")
    global_batch_size: int = Field(gt=0, description="samples of one optimizer step, over all ranks")
    micro_batch_size: int | None = Field(None, gt=0, description="samples of a forward pass; default: a rank's share")
    optim: OptimConfig = Field(AdamW(), description="the optimizer")
    warmup_samples: int = Field(0, ge=0, description="samples over which the learning rate rises to its peak")
    decay: Decay = Field("cosine", description="of the learning rate after the warm-up")
    final_lr: float = Field(0.0, ge=0, le=1, description="share of the learning rate that is left at the end")
    trainable: dict[str, TrainableConfig] = Field(
        default_factory=dict, description="by name of a trainable module: an optimizer, schedule or cadence of its own"
    )
    grad_clip: float | None = Field(
        1.0, gt=0, allow_inf_nan=False, description="largest gradient norm of a trainable module; null: no clipping"
    )
    sam_rho: float | None = Field(
        None, gt=0, allow_inf_nan=False,
        description="sharpness-aware minimization: distance at which gradients are taken, for twice the arithmetic",
    )  # fmt: skip
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the average of the weights, per step")
    ema_sigma_rel: float | None = Field(
        None,
        gt=0,
        lt=WIDEST,
        description="width of a power-function average, as a share of the training so far, instead of ema_decay",
    )
    ema_snapshots: EmaSnapshots | None = Field(
        None, description="averages from which `genpipe ema` makes weights of any width afterwards; none: none are kept"
    )
    precision: Precision = Field("auto", description="of matrix products; auto: bf16 where the hardware is fast at it")
    seed: int = Field(0, description="of the order of the data and of all noise")
    source_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="share of the training samples from each source of a mix; default: by size"
    )
    best: BestConfig | None = Field(None, description="keep the weights that validate best; null: the last ones")
    guard: GuardConfig = GuardConfig()
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of damaged samples beyond which training stops")

    @model_validator(mode="after")
    def _batches_fit(self) -> TrainConfig:
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        return self

    def of(self, name: str) -> TrainConfig:
        """The settings of the trainable module `name`: its own where it has some, otherwise these."""
        own = self.trainable.get(name, TrainableConfig())
        given = {key: value for key in ("optim", "warmup_samples", "decay", "final_lr")
                 if (value := getattr(own, key)) is not None}  # fmt: skip
        return self.model_copy(update=given)

    def every(self, name: str) -> int:
        """Steps of the run between updates of the trainable module `name`."""
        return self.trainable.get(name, TrainableConfig()).every

    def check_trainable(self, names: Iterable[str], *, sharded: bool = False) -> None:
        """Raise ValueError for names of modules that are not trained, and for what sharded weights cannot do."""
        if self.sam_rho and sharded:
            raise ValueError(
                "train.sam_rho moves a rank's weights by its own micro-batch, which sharded ones cannot; set "
                "resources.shard_over to 1"
            )
        names = list(names)
        if unknown := [name for name in self.trainable if name not in names]:
            raise ValueError(
                f"train.trainable.{unknown[0]}: this stage trains nothing of that name; it trains {', '.join(names)}"
            )

    def micro_batch(self, world_size: int) -> int:
        """Samples of one forward pass on one rank."""
        return self.micro_batch_size or max(1, self.global_batch_size // world_size)

    def check_ranks(self, world_sizes: Sequence[int]) -> None:
        """Raise ValueError, with values that work, unless a step divides evenly over each of these numbers of ranks."""
        for world_size in world_sizes:
            try:
                micro = self.micro_batch(world_size)
                check_batch_sizes(self.global_batch_size, micro_batch_size=micro, world_size=world_size)
            except ValueError as error:
                if len(world_sizes) == 1:
                    raise
                unit = math.lcm(*world_sizes) * (self.micro_batch_size or 1)
                raise ValueError(
                    f"resources.workers allows {world_sizes[0]} to {world_sizes[-1]} ranks, and a step must divide "
                    f"evenly over each number of them: {str(error).partition(';')[0]}; set global_batch_size to a "
                    f"multiple of {unit}, or resources.workers to a smaller range"
                ) from None

    @property
    def validation_batch(self) -> int:
        """Samples of one forward pass of validation: not a matter of ranks, as its noise is drawn by batch."""
        return self.micro_batch_size or min(self.global_batch_size, 64)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.samples / self.global_batch_size)


def lr_scale(cfg: TrainConfig, *, samples_seen: int) -> float:
    """The learning rate at `samples_seen` as a share of its peak: linear warm-up, then decay to `final_lr`."""
    warm = min(1.0, (samples_seen + cfg.global_batch_size) / cfg.warmup_samples) if cfg.warmup_samples else 1.0
    span = max(1, cfg.samples - cfg.warmup_samples)
    done = min(1.0, max(0.0, (samples_seen - cfg.warmup_samples) / span))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.decay]
    return warm * (cfg.final_lr + (1 - cfg.final_lr) * shape)
