"""What a stage's run records, and who keeps it: MLflow, or a plain JSONL file in the store where there is none.

MLflow's module is loaded by its name only where it is wanted, so that a stage runs on a machine without MLflow.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from genpipe.artifacts import Artifact
from genpipe.tracking import jsonl

if TYPE_CHECKING:
    from genpipe.pipeline.spec import StageSpec


class StageRun(Protocol):
    """A stage's run, open for records. Logging returns at once and raises nothing: it is not worth a training."""

    run_id: str
    """Of the run in MLflow; empty elsewhere."""

    def log(self, metrics: Mapping[str, float], *, samples_seen: int) -> None:
        """Record scalars by name."""
        ...

    def log_image(self, name: str, image: np.ndarray, *, samples_seen: int) -> None:
        """Record a picture (uint8, HWC); those of one name are a series over samples."""
        ...

    def log_file(self, path: Path) -> None:
        """Record a file; it is read before this returns, so it may be temporary."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record facts about the run by name."""
        ...

    def finish(self, artifact: Artifact) -> None:
        """Record the committed artifact and end the run."""
        ...

    def close(self) -> None:
        """Write what is left, within a bounded time."""
        ...


class Records(Protocol):
    """A module that keeps runs."""

    def open_stage_run(self, spec: StageSpec) -> AbstractContextManager[StageRun]:
        """The run of a stage; an exception in the block marks it failed, an interruption killed."""
        ...

    def attach(self, spec: StageSpec, run_id: str) -> StageRun:
        """The run that another process opened, for rank 0 of a training stage."""
        ...


def records_of(tracking_uri: str) -> Records:
    """Who keeps the runs of a `tracking.uri`: the JSONL files for `jsonl` and where MLflow is not installed."""
    records: Records = jsonl
    if tracking_uri != jsonl.URI and _mlflow_is_there():
        records = importlib.import_module("genpipe.tracking.runs")
    return records


@cache
def _mlflow_is_there() -> bool:
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec("mlflow") is not None:
            return True
    print("MLflow is not installed; runs are recorded in the store's folder runs/", flush=True)
    return False
