"""genpipe from Python: what `genpipe.load`, `genpipe.plan` and `genpipe.run` are.

system = genpipe.load("runs/demo")
pictures = system.sample(["a red apple, drawn in twemoji style"], seed=0)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from genpipe.artifacts import Artifact
from genpipe.config import ConfigError
from genpipe.loaded_system import LoadedSystem
from genpipe.models.precision import Precision
from genpipe.pipeline.baselines import with_baselines
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import Planned
from genpipe.pipeline.plan import plan as plan_pipeline
from genpipe.pipeline.systems import DRAWING, find_system
from genpipe.tracking.registry import resolve

__all__ = ["LoadedSystem", "load", "plan", "run"]

if TYPE_CHECKING:
    from flows.reporting import Reporter, StageResult


def load(
    source: str | Path,
    *,
    system: str = "",
    tracking_uri: str = "",
    device: str | torch.device | None = None,
    precision: Precision = "auto",
) -> LoadedSystem:
    """A trained system, in memory and ready to draw. The training data are not needed.

    `source` is a store with one trained system (`runs/demo`), the URI of a system's artifact, a release's folder, a
    pipeline's YAML file whose system is made (`system` names it where there are several), or a registered model
    (`models:/NAME@ALIAS`, of the MLflow at `tracking_uri`; default: the environment variable MLFLOW_TRACKING_URI).
    `device` is by default the GPU, if there is one; `precision` is that of matrix products.

    Raises ValueError where there is no such system, more than one, or one whose files are damaged.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedSystem(_artifact(str(source), system, tracking_uri), device=where, precision=precision)


def plan(config: str | Path, overrides: Sequence[str] = (), *, sources: bool = True) -> list[Planned]:
    """What a run of a pipeline would do: the `name`, `status` (cached or run), `why` and `artifact` of each stage.

    `overrides` are settings that replace the file's: `["stages.decoder.train.samples=1000"]`. Without `sources` the
    data are not looked at, and nothing that depends on them counts as done. Raises ConfigError, a ValueError, for
    anything that is wrong with the pipeline, and ManifestError, another, where what is committed is damaged.
    """
    pipeline = load_pipeline(str(config), overrides)
    look_up = partial(resolve, tracking_uri=pipeline.tracking_uri)
    return with_baselines(plan_pipeline(pipeline, sources=sources, resolve=look_up), pipeline, resolve=look_up)


def run(config: str | Path, overrides: Sequence[str] = (), *, reporter: Reporter | None = None) -> list[StageResult]:
    """Run a pipeline: every stage that is not done yet. The result of each stage, those that failed among them.

    A result has its `stage`, `status` (cached, ran, failed or skipped), `artifact`, `metrics`, and in `message` why it
    failed. `reporter` is told of all progress, by default in lines on standard output. Raises ValueError before any
    work if the configuration is wrong or a service cannot be reached.
    """
    from flows.pipeline import run_pipeline

    return run_pipeline(str(config), overrides, reporter=reporter)


def _artifact(source: str, system: str, tracking_uri: str) -> Artifact:
    """The committed system that `load` is asked for."""
    if not source.startswith("models:"):
        return find_system(source, name=system)
    where = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not where:
        raise ConfigError(f"{source}: in which MLflow? Set tracking_uri, or MLFLOW_TRACKING_URI in the environment")
    artifact = resolve(source, tracking_uri=where)
    if artifact.kind not in DRAWING:
        raise ConfigError(f"{source}: stands for an artifact of kind {artifact.kind}, not for a system")
    return artifact
