"""The life of one stage, the same whoever launches it.

A launcher brings two abilities: to train (start ranks and call `train_rank` in each) and to map (call a worker
on every part). `execute` does the rest: skip what is committed, agree with the inputs, record, commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import StageConfig
from genpipe.launch.process import set_up_process
from genpipe.pipeline.spec import Progress, StageSpec, write_progress
from genpipe.stages import is_training, load_stage
from genpipe.storage import join, open_storage
from genpipe.tracking.runs import StageRun, open_stage_run
from genpipe.training.loop import train


class Launcher(Protocol):
    """Where work runs."""

    def train(self, spec: StageSpec, run_id: str) -> None:
        """Call `train_rank` on every rank; returns when rank 0 has committed the artifact."""
        ...

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        """Call `PartWorker(spec)` on every part; returns when all are in place."""
        ...


def execute(spec: StageSpec, launcher: Launcher) -> Artifact:
    """Run a stage and commit its artifact, or return the one that is committed already.

    What an earlier attempt left (checkpoints, finished parts) is taken up. Raises whatever the stage raises;
    its MLflow run is then marked failed, and nothing is committed.
    """
    done = artifacts.committed(spec.target)
    if done is not None:
        return done
    stage = load_stage(spec.stage)
    cfg: StageConfig = stage.Config.model_validate(spec.config)
    stage.check_inputs(cfg, spec.inputs)
    with open_stage_run(spec) as run:
        if is_training(stage):
            launcher.train(spec, run.run_id)
        else:
            _map_parts(spec, stage, cfg, launcher, run)
        artifact = artifacts.committed(spec.target)
        assert artifact is not None, "the launcher returned without a committed artifact"
        _log_pictures(artifact, run)
        run.finish(artifact)
    open_storage(spec.work).delete_all()
    return artifact


def _log_pictures(artifact: Artifact, run: StageRun) -> None:
    """Show the pictures of an artifact beside its metrics, without copying the rest of it here."""
    storage = open_storage(artifact.uri)
    with tempfile.TemporaryDirectory() as folder:
        for entry in storage.list():
            if entry.key.endswith(".png"):
                path = Path(folder, Path(entry.key).name)
                storage.download(entry.key, path)
                run.log_file(path)


def _map_parts(spec: StageSpec, stage: ModuleType, cfg: StageConfig, launcher: Launcher, run: StageRun) -> None:
    parts = stage.parts(cfg, spec.inputs)
    already = artifacts.finished_parts(spec.target.uri)
    missing = [part for part in parts if part not in already]
    if missing:
        launcher.map(spec, missing)
    finished = artifacts.finished_parts(spec.target.uri)
    results = [finished[part]["stats"] for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(stage, "merge_parts"):
            results = stage.merge_parts(cfg, open_storage(spec.target.uri), results, Path(folder))
        meta, metrics = stage.finalize(cfg, spec.inputs, results, Path(folder))
        run.log(metrics, samples_seen=0)
        commit(spec, folder=Path(folder), parts=parts, meta=meta, metrics=metrics, run_id=run.run_id)


def commit(
    spec: StageSpec,
    *,
    folder: Path,
    parts: Sequence[str] = (),
    meta: dict[str, Any],
    metrics: dict[str, float],
    run_id: str,
) -> Artifact:
    """Commit what a stage made, with what it promised and what it measured in `meta`."""
    target = spec.target.model_copy(update={"meta": {**spec.target.meta, **meta}})
    return artifacts.commit(
        target,
        folder=folder,
        parts=parts,
        identity=spec.identity,
        config=spec.config,
        inputs=spec.inputs,
        metrics=metrics,
        environment={"git_revision": spec.git_revision},
        run_id=run_id,
    )


def train_rank(spec: StageSpec, run_id: str, *, rank: int, world_size: int, device: torch.device) -> None:
    """What every rank of a training stage does; rank 0 also exports, records and commits."""
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    set_up_process(cfg, products="medium")  # bf16 passes, TF32
    torch.manual_seed(cfg.train.seed)  # the same initial weights on every rank
    with RankRuntime(spec, run_id, rank=rank, world_size=world_size, device=device, total=cfg.train.samples) as rt:
        objective = stage.objective(cfg, spec.inputs, device)
        result = train(objective, stage.data(cfg, spec.inputs), cfg.train, rt, cfg.resources, cfg.observe)
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                meta = stage.export(objective, cfg, spec.inputs, Path(folder))
                commit(spec, folder=Path(folder), meta=meta, metrics=result.metrics, run_id=run_id)


class PartWorker:
    """A data stage's worker with its files put in place: what an actor runs."""

    def __init__(self, spec: StageSpec) -> None:
        stage = load_stage(spec.stage)
        self.spec = spec
        cfg = stage.Config.model_validate(spec.config)
        set_up_process(cfg, products="high")  # TF32 at the least: what is cached outlives many trainings
        self.work = stage.Worker(cfg, spec.inputs)

    def __call__(self, part: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stats = self.work(part, Path(folder))
            artifacts.add_part(self.spec.target.uri, part, Path(folder), stats)


@dataclass
class RankRuntime:
    """The Runtime of one rank: records through MLflow, checkpoints through the store."""

    spec: StageSpec
    run_id: str
    rank: int
    world_size: int
    device: torch.device
    total: int

    def __enter__(self) -> RankRuntime:
        self.run = StageRun.attach(self.spec, self.run_id) if self.rank == 0 else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.run:
            self.run.close()

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        assert self.run is not None, "only rank 0 logs"
        self.run.log(metrics, samples_seen=samples_seen)
        rate = metrics.get("samples_per_second")
        if rate is not None:
            write_progress(self.spec.work, Progress(done=samples_seen, total=self.total, rate=rate, metrics=metrics))

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        assert self.run is not None, "only rank 0 logs"
        for name, image in images.items():
            self.run.log_image(name, image, samples_seen=samples_seen)

    def log_file(self, path: Path) -> None:
        assert self.run is not None, "only rank 0 logs"
        self.run.log_file(path)

    def save(self, folder: Path, *, samples_seen: int) -> None:
        save_checkpoint(self.spec.work, folder, samples_seen=samples_seen)

    def latest(self) -> Path | None:
        return latest_checkpoint(self.spec.work)

    def should_stop(self) -> bool:
        return False


KEEP_CHECKPOINTS = 2


def save_checkpoint(work: str, folder: Path, *, samples_seen: int) -> None:
    """Commit `folder` as a checkpoint under `work` and drop all but the newest two."""
    uri = join(work, "checkpoints", f"{samples_seen:015d}")
    identity = {"samples_seen": samples_seen}
    target = Artifact(kind="checkpoint", uri=uri, fingerprint=artifacts.fingerprint(identity))
    artifacts.commit(target, folder=folder, identity=identity, config={}, inputs={}, metrics={})
    storage = open_storage(work)
    for old in _checkpoints(work)[:-KEEP_CHECKPOINTS]:
        storage.delete_all(f"checkpoints/{old}/")


def latest_checkpoint(work: str) -> Path | None:
    """The newest checkpoint under `work` whose hashes hold, as a local copy; damaged ones are passed over."""
    for name in reversed(_checkpoints(work)):
        uri = join(work, "checkpoints", name)
        try:
            manifest = artifacts.verify(uri)
        except artifacts.ManifestError as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
            continue
        return _local_copy(uri, manifest)
    return None


def _checkpoints(work: str) -> list[str]:
    keys = (entry.key for entry in open_storage(work).list("checkpoints/"))
    return sorted({key.split("/")[1] for key in keys if key.endswith(f"/{artifacts.MANIFEST}")})


def _local_copy(uri: str, manifest: artifacts.Manifest) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    storage = open_storage(uri)
    for file in manifest.files:
        storage.download(file.path, folder / file.path)
    return folder
