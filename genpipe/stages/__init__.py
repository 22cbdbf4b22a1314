"""The stages, one file each, and what a stage file holds.

Every stage module has

    VERSION: int                       raised when the stage's output changes for the same config
    CONSUMES: tuple[str, ...]          the stages whose artifacts it takes
    class Config(StageConfig)
    agree(cfg, inputs) -> dict         what its artifact will promise in `meta`, as far as it is known before
                                       the work is done; raises ValueError where inputs and config do not fit

and, if what it takes depends on its configuration, `consumes(cfg) -> tuple[str, ...]`. A *training* stage adds

    data(cfg, inputs) -> Data                            what to train on and what to hold out
    objective(cfg, inputs, device) -> Objective          what one optimizer step optimizes
    export(objective, cfg, inputs, folder) -> meta       writes the weights; called with the EMA in place
    example(cfg, inputs, *, batch_size) -> Batch         zeros in the shapes of a batch, from the inputs' `meta` alone

A *data* stage adds

    parts(cfg, inputs) -> list[str]                      its units of work, stable across runs
    class Worker:  __init__(cfg, inputs), __call__(part, out) -> stats     one part to files in folder `out`
    finish(cfg, inputs, results, out) -> (meta, metrics) after all parts, given their stats in parts' order

and may add `external(cfg) -> str`, a digest of what it reads from outside the pipeline, and
`settle(cfg, made, results, out) -> results`, called before `finish` with the storage that holds the files of all parts:
what it puts into `out` takes the place of files of the same name. It may be called again. `agree` sees inputs
that exist and inputs that are only planned, so it uses nothing but their `meta` and `fingerprint`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from genpipe.config import StageConfig


def load_stage(name: str) -> ModuleType:
    """The module of a stage, found by its name. Raises ValueError for an unknown one."""
    try:
        return importlib.import_module(f"genpipe.stages.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"genpipe.stages.{name}":
            raise
        raise ValueError(f"no stage is called {name!r}; `genpipe run --help` lists them") from None


def consumed(stage: ModuleType, cfg: StageConfig) -> tuple[str, ...]:
    """The stages whose artifacts a stage takes with this configuration."""
    needs: tuple[str, ...] = stage.consumes(cfg) if hasattr(stage, "consumes") else stage.CONSUMES
    return needs


def is_training(stage: ModuleType) -> bool:
    """Whether a stage trains (gives an objective) rather than maps parts to files."""
    return hasattr(stage, "objective")
