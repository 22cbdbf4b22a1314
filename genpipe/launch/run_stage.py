"""The life of one stage, the same whoever launches it.

A launcher brings two abilities: to train (start ranks and call `train_rank` in each) and to map (call a worker
on every part). `execute` does the rest: skip what is committed, check the inputs, hold the lease, record, commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.launch import lease
from genpipe.launch.lease import LeaseLost
from genpipe.launch.process import set_up_process
from genpipe.pipeline.code import check_code
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import StageConfig
from genpipe.stages import load_stage
from genpipe.storage import open_storage
from genpipe.tracking.recording import StageRun, open_stage_run, settle_stage

ENVIRONMENT = "environment"
"""Where the stats of a part hold what its worker found on its machine."""


class Launcher(Protocol):
    """Where work runs."""

    def train(self, spec: StageSpec, run_id: str) -> bool:
        """Call `train_rank` on every rank; returns, when rank 0 has committed, whether that is on record."""
        ...

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        """Call a `PartWorker(spec)` on every part, on `parts_at_once` at a time; returns when all are in place."""
        ...


def execute(
    spec: StageSpec, launcher: Launcher, *, attempt: str = "", lost: Callable[[LeaseLost], None] = print
) -> Artifact:
    """Run a stage and commit its artifact, or return the one that is or gets committed by somebody else.

    What an earlier attempt left (checkpoints, finished parts) is taken up. Raises ValueError where this is other code
    than `spec` was planned with, on every rank and actor as well, and whatever the stage raises;
    its run is then marked failed, and nothing is committed. `attempt` is an id of `lease.new_attempt`, which is asked
    if there is none yet; `lost` is called on another thread when somebody else has taken over, and may end this
    process: it could only be refused (LeaseLost) at its next checkpoint, part or commit.
    """
    check_code(spec)
    with lease.hold(spec, attempt or lease.new_attempt(spec), lost=lost) as held:
        made = _make(held, launcher) if held else None
    if made is not None:
        open_storage(spec.work).delete_all()
        return made
    settle_stage(spec)
    lease.clear_work(spec)  # its maker may have been killed before it could
    artifact = artifacts.committed(spec.target)
    assert artifact is not None, "the lease is held until there is a committed artifact"
    return artifact


def _make(spec: StageSpec, launcher: Launcher) -> Artifact:
    """Do the work of a stage, as the only one who does. (Only ranks load what trains, as it imports torch.)"""
    with open_stage_run(spec) as run:
        recorded = False
        if spec.trains:
            recorded = launcher.train(spec, run.run_id)
        else:
            _map_parts(spec, launcher, run)
        artifact = artifacts.committed(spec.target)
        assert artifact is not None, "the launcher returned without a committed artifact"
        if recorded:
            run.leave()
        else:
            run.finish(artifact)
    return artifact


def _map_parts(spec: StageSpec, launcher: Launcher, run: StageRun) -> None:
    stage, cfg = load_checked(spec)
    parts = stage.parts(cfg, spec.inputs)
    missing = artifacts.missing_parts(spec.target.uri, parts)
    if missing:
        launcher.map(spec, missing)
    finished = artifacts.finished_parts(spec.target.uri)
    results = [finished[part]["stats"] for part in parts]
    environment = _merged([result.pop(ENVIRONMENT, {}) for result in results])
    run.set_tags(environment)
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(stage, "merge_parts"):
            results = stage.merge_parts(cfg, spec.inputs, open_storage(spec.target.uri), results, Path(folder))
        meta, metrics = stage.finalize(cfg, spec.inputs, results, Path(folder))
        _check_source(spec, stage, cfg)
        commit(
            spec,
            folder=Path(folder),
            parts=parts,
            meta=meta,
            metrics=metrics,
            environment=environment,
            run_id=run.run_id,
        )


def load_checked(spec: StageSpec) -> tuple[ModuleType, Any]:
    """The module of a stage and its settings, of its `Config`. Raises ValueError where its inputs do not fit."""
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    stage.check_inputs(cfg, spec.inputs)
    return stage, cfg


def _check_source(spec: StageSpec, stage: ModuleType, cfg: StageConfig) -> None:
    """Raise ValueError if what a stage read is no longer what its artifact's fingerprint stands for."""
    if hasattr(stage, "source_digest") and stage.source_digest(cfg) != spec.identity["source"]:
        raise ValueError(
            f"stages.{spec.name}: its source changed while it was read, so that samples may be missing or there twice; "
            "run it again when it no longer changes"
        )


def commit(
    spec: StageSpec,
    *,
    folder: Path,
    parts: Sequence[str] = (),
    meta: Mapping[str, Any],
    metrics: Mapping[str, float],
    environment: Mapping[str, str],
    run_id: str,
) -> Artifact:
    """Commit what a stage made. Raises LeaseLost if another attempt has taken over.

    `meta` is added to what the artifact promised; `environment` says what it was made with, beside the code.
    """
    target = spec.target.model_copy(update={"meta": {**spec.target.meta, **meta}})
    made_by = {"attempt": spec.attempt.id} if spec.attempt else {}
    code = {"version": spec.version, "git_revision": spec.git_revision, "code": spec.code}
    return artifacts.commit(
        target,
        folder=folder,
        parts=parts,
        identity=spec.identity,
        config=spec.config,
        inputs=spec.inputs,
        metrics=metrics,
        environment={**code, **made_by, **environment},
        run_id=run_id,
        fence=partial(lease.check, spec),
    )


def _merged(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the workers of all parts found, each value once."""
    found: dict[str, list[str]] = {}
    for name, value in (item for environment in environments for item in environment.items()):
        if value not in found.setdefault(name, []):
            found[name].append(value)
    return {name: ", ".join(values) for name, values in found.items()}


def parts_at_once(spec: StageSpec, parts: int, *, workers: int) -> int:
    """How many of `parts` each of the workers is given at a time: as many as the stage says, if there are enough."""
    most: int = getattr(load_stage(spec.stage).Worker, "parts_at_once", 1)
    return min(most, -(-parts // workers))


class PartWorker:
    """A data stage's worker with its files put in place: what an actor runs."""

    def __init__(self, spec: StageSpec) -> None:
        check_code(spec)
        stage = load_stage(spec.stage)
        self.spec = spec
        cfg = stage.Config.model_validate(spec.config)
        set_up_process(cfg, products="high")  # TF32 at the least: what is cached outlives many trainings
        self.work = stage.Worker(cfg, spec.inputs)

    def __call__(self, part: str) -> None:
        """Make one part and put its files in place."""
        with tempfile.TemporaryDirectory() as folder:
            stats = {**self.work(part, Path(folder)), ENVIRONMENT: getattr(self.work, "environment", {})}
            fence = partial(lease.check, self.spec)
            artifacts.add_part(self.spec.target.uri, part, Path(folder), stats, fence=fence)
