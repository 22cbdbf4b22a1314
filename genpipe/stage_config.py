"""What the configuration of every stage has in common: how it is run and how it is watched, which changes no result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from genpipe.config import Config

QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us")
"""Where a container finds its quota and the period that it is for: cgroups v2, v1."""


def cores() -> int:
    """CPU cores that this process may use: by its affinity, and by the quota of its container, as Ray counts them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in QUOTAS:
        with suppress(OSError, ValueError):  # no such file, or no limit
            quota, period = map(int, " ".join(Path(file).read_text() for file in files.split()).split())
            if quota > 0:
                count = min(count, max(1, quota // period))
    return count


def _shared(cpus: Any) -> Any:
    """`auto`: half of the cores."""
    return max(1, cores() // 2) if cpus == "auto" else cpus


class ValidatorResources(Config):
    """What the process takes that validates beside the ranks; what else it asks for is what each of them does."""

    cpus: float = Field(1.0, gt=0, description="CPU cores that are kept for it")
    gpus: float = Field(0.0, ge=0, description="GPUs of it, as the workers have some or none")


class Resources(Config):
    """How a stage is run, never what comes out of it: left out of the fingerprint."""

    workers: int | tuple[int, int] = Field(
        1, description="training ranks, or actors of a data stage; [least, most] where they may come and go"
    )
    cpus: Annotated[float, BeforeValidator(_shared)] = Field(
        1.0, gt=0, description="CPU cores of each worker, and its torch threads; auto: half of this machine's, for two "
        "workers or stages side by side",
    )  # fmt: skip
    gpus: float = Field(0.0, ge=0, description="GPUs of each worker")
    accelerator_type: str = Field("", description="of the GPUs, as Ray calls it: H100, A100, L4; default: any")
    memory: float | None = Field(None, gt=0, description="GiB of main memory that Ray keeps for each worker")
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="amounts of what the cluster's nodes were started with, by name"
    )
    placement: Literal["PACK", "SPREAD"] | None = Field(
        None, description="on as few nodes as hold the workers, or on as many; none: ranks are packed, actors spread"
    )
    shard_over: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        1,
        description="training ranks that share one copy of weights, gradients, optimizer and averages: 1: each has its "
        "own (DDP); all: one among them (FSDP); a number: one in each group of neighbors, such as a node's (hybrid)",
    )
    recompute_blocks: bool = Field(
        False,
        description="compute the activations of blocks again in the backward pass instead of keeping them: less "
        "memory, a fifth to a third more time",
    )
    offload_averages: bool = Field(
        False,
        description="keep the averages of weights in main memory: less on the GPU, where each passes through at a step",
    )
    loader_threads: int = Field(1, ge=1, description="threads that read and decode batches in each worker")
    loader_processes: int = Field(0, ge=0, description="processes that do so instead of the threads; 0: threads")
    checkpoint_seconds: float | None = Field(
        None, gt=0, description="wall time between checkpoints; none: what loses least, by their cost and failure_hours"
    )
    compile: bool = Field(
        False, description="compile the blocks of trained networks, if their gradients are then what they are without"
    )
    failure_hours: float = Field(24.0, gt=0, description="mean time between losses of a worker, of all together")
    keep_checkpoints: int = Field(2, ge=1, description="of the newest intact ones")
    hang_seconds: float | None = Field(
        300.0, gt=0, description="for which a rank may be stuck in a pass before its group starts anew; null: for ever"
    )
    max_failures: int = Field(3, ge=0, description="worker losses that training, or one part, survives")
    validation: ValidatorResources | None = Field(
        None,
        description="of a process of its own that validates while training goes on, on Ray; null: rank 0 does, and the "
        "others wait",
    )

    def shards(self, ranks: int) -> int:
        """How many of `ranks` training ranks share one copy. Raises ValueError if groups of them do not come out even.

        One rank by itself shares with nobody, whatever is set.
        """
        if ranks == 1 or self.shard_over == "all":
            return ranks
        if ranks % self.shard_over:
            raise ValueError(
                f"resources.shard_over {self.shard_over} does not divide the {ranks} training ranks; set it to a "
                "number that does, or to all"
            )
        return self.shard_over

    @model_validator(mode="after")
    def _workers_are_some(self) -> Resources:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"workers: {self.workers}; give a number from 1 on, or [least, most]")
        return self

    @model_validator(mode="after")
    def _validator_is_of_the_same_kind(self) -> Resources:
        if self.validation and bool(self.validation.gpus) != bool(self.gpus):
            raise ValueError(
                f"validation.gpus: {self.validation.gpus:g}, where each worker has {self.gpus:g}; on another kind of "
                "device validation finds other numbers: give GPUs to both or to none"
            )
        return self

    @property
    def validator(self) -> Resources | None:
        """What the process that validates beside the ranks is run with, if there is one."""
        if self.validation is None:
            return None
        own = {"workers": 1, "cpus": self.validation.cpus, "gpus": self.validation.gpus, "validation": None}
        return self.model_copy(update=own)

    def taken(self, workers: int) -> dict[str, float]:
        """CPUs and GPUs, by Ray's names, that so many workers take, and the process that validates beside them."""
        beside = self.validation
        return {
            "CPU": workers * self.cpus + (beside.cpus if beside else 0.0),
            "GPU": workers * self.gpus + (beside.gpus if beside else 0.0),
        }

    @property
    def min_workers(self) -> int:
        """Workers that it takes at the least."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that are used if they are to be had."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Gate(Config):
    """What a metric must come to; a run whose metrics miss a gate fails.

    `not_worse_than` holds it against a baseline, picture by picture: it is missed where the 95 % interval of the
    difference lies beyond `margin` on the worse side.
    """

    min: float | None = Field(None, description="least value")
    max: float | None = Field(None, description="largest value")
    not_worse_than: str = Field(
        "",
        description="a baseline: the URI of other scores or of a system that was measured, a store or another "
        "pipeline's YAML file with scores, or a registered model such as models:/NAME@champion",
    )
    margin: float = Field(0.0, ge=0, description="by how much worse than the baseline it may be")

    @model_validator(mode="after")
    def _margin_is_of_a_baseline(self) -> Gate:
        if self.margin and not self.not_worse_than:
            raise ValueError("margin says how much worse than a baseline is allowed: set not_worse_than, too")
        return self

    def missed(self, name: str, metrics: Mapping[str, float]) -> str:
        """A sentence if the metric `name` is not in the range, or not there at all; else nothing."""
        if name not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            return f"observe.gates: there is no metric {name!r}; known: {known}"
        value = metrics[name]
        if self.min is not None and not value >= self.min:
            return f"{name} is {value:.4g}, its gate asks for at least {self.min:.4g}"
        if self.max is not None and not value <= self.max:
            return f"{name} is {value:.4g}, its gate asks for at most {self.max:.4g}"
        return ""


class Observe(Config):
    """How a stage is watched, never what comes out of it: left out of the fingerprint."""

    gates: dict[str, Gate] = Field(default_factory=dict, description="by metric of the stage")


class StageConfig(Config):
    """What the Config of every stage has in common."""

    resources: Resources = Resources()
    observe: Observe = Observe()


UNFINGERPRINTED = frozenset({"resources", "observe"})
"""The settings of a stage that decide nothing about what it makes."""
