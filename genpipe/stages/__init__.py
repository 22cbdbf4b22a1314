"""The stages, one file each, and what a stage file holds.

Every stage module, of this package or of the user's own, has

    VERSION: int                        raised when the stage's output changes for the same config
    MAKES: str                          the kind of artifact that it makes; several stages may make one kind
    HEADLINES: tuple[str, ...]          those of its metrics that a summary shows
    class Config(StageConfig)           its settings; `resources` and `observe` decide nothing about its output
    roles(cfg) -> dict[str, Role]       what it takes
    check_inputs(cfg, inputs) -> dict   what its artifact will promise in `meta`, as far as that is known before the
                                        work is done; raises ValueError where inputs and config do not fit

A *training* stage has settings `train`, which no other has, and adds

    data(cfg, inputs) -> Data                            what to train on and what to hold out
    objective(cfg, inputs, device) -> Objective          what one optimizer step optimizes
    export(objective, cfg, inputs, folder) -> meta       writes the weights; called with the EMA in place
    example_batch(cfg, inputs, *, batch_size) -> Batch   zeros in the shapes of a batch, from the inputs' `meta` alone

A *data* stage adds

    parts(cfg, inputs) -> list[str]                      its units of work, stable across runs
    class Worker:  __init__(cfg, inputs), __call__(part, out) -> stats     one part to files in folder `out`; may have
                   `environment: dict[str, str]`, what it found on its machine, for the manifest and the run, and
                   `parts_at_once: int`, the number of threads that may call it at the same time, each with a part of
                   its own: one part is then read and another written while a third has the accelerator
    finalize(cfg, inputs, results, out) -> (meta, metrics)                 after all parts, given their stats in order

and may add `source_digest(cfg) -> str`, a digest of what it reads from outside the pipeline, and
`merge_parts(cfg, inputs, made, results, out) -> results`, called before `finalize`, with the storage that has the files
of all parts: what it puts into `out` takes the place of files of the same name. It may be called again.

`inputs` maps roles to artifacts; a role that takes several has the keys `role.0`, `role.1`, ... (`artifacts.several`).
`check_inputs` sees inputs that exist and inputs that are only planned, so it uses nothing but their `meta` and
`fingerprint`.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType

REQUIRED = ("VERSION", "MAKES", "HEADLINES", "Config", "roles", "check_inputs")
TRAINING = ("data", "objective", "export", "example_batch")
DATA = ("parts", "Worker", "finalize")


def stage_kinds() -> list[str]:
    """The names of the stages that come with genpipe."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_stage(kind: str) -> ModuleType:
    """The module of a stage: of this package by its name, or any other by its dotted path.

    Raises ValueError if there is none, or if it is not a stage.
    """
    path = kind if "." in kind else f"genpipe.stages.{kind}"
    try:
        stage = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(_unknown(kind)) from None
    missing = [name for name in REQUIRED if not hasattr(stage, name)]
    for names in (TRAINING if is_training(stage) else DATA,):
        missing += [name for name in names if not hasattr(stage, name)]
    if missing:
        raise ValueError(f"{path} is not a stage: it has no {', '.join(missing)}; see docs/write-a-stage.md")
    if is_training(stage) != ("train" in stage.Config.model_fields):
        raise ValueError(f"{path} is not a stage: a training stage has settings `train`, and no other has them")
    return stage


def is_training(stage: ModuleType) -> bool:
    """Whether a stage trains (gives an objective) rather than maps parts to files."""
    return hasattr(stage, "objective")


def _unknown(kind: str) -> str:
    if "." in kind:
        return f"no module {kind!r} can be imported; install its package where genpipe is, or put it on PYTHONPATH"
    near = get_close_matches(kind, stage_kinds(), n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known stages: {', '.join(stage_kinds())}"
    return f"no such stage {kind!r}; {remedy} (a stage of your own is named as package.module)"
