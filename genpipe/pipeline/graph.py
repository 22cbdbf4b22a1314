"""The pipeline as a graph of stages, and the plan of a run: what is done, what is to do, and why."""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from genpipe import artifacts, config
from genpipe.artifacts import Artifact
from genpipe.config import Config, ConfigError, StageConfig, Tree
from genpipe.pipeline.spec import StageSpec, TrackingConfig
from genpipe.stages import consumed, is_training, load_stage
from genpipe.storage import join, local_path

STAGES = ("shard", "autoencoder", "clip", "features", "decoder", "prior", "upsampler", "upsampler2", "evaluate")
"""Every stage, in an order that runs; the edges are what each stage consumes. Where several wait for cores of the local
Ray the earliest here goes first: hence the decoder, the longest, before the prior."""


class RayConfig(Config):
    """Which Ray cluster the jobs go to."""

    address: str = Field("", description="a dashboard URL such as http://head:8265; default: a local Ray for this run")
    runtime_env: dict[str, Any] = Field(default_factory=dict, description="Ray's runtime environment of every job")
    retries: int = Field(2, ge=0, description="times a stage is submitted again whose job was lost")


class PipelineConfig(Config):
    """A pipeline: its stages and where they run, store and record."""

    name: str
    store: str = Field(description="a folder or s3://bucket/prefix for artifacts and unfinished work")
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    stages: dict[str, dict[str, Any]]


Status = Literal["cached", "run"]


@dataclass(frozen=True)
class Planned:
    """One stage of a plan. `artifact` is committed if `status` is cached, promised otherwise."""

    name: str
    cfg: StageConfig
    inputs: dict[str, Artifact]
    artifact: Artifact
    status: Status
    why: str


@dataclass(frozen=True)
class Pipeline:
    """A configuration that was read and checked, stage by stage."""

    cfg: PipelineConfig
    stages: dict[str, StageConfig]
    source: str

    @property
    def tracking_uri(self) -> str:
        return self.cfg.tracking.uri or f"sqlite:///{Path(self.cfg.store).absolute()}/mlflow.db"

    @property
    def experiment(self) -> str:
        return self.cfg.tracking.experiment or self.cfg.name

    def needs(self, stage: str) -> tuple[str, ...]:
        """The stages whose artifacts a stage of this pipeline takes."""
        return consumed(load_stage(stage), self.stages[stage])


def load_pipeline(path: str, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline, every stage against its own Config.

    Raises ConfigError that lists every fault, each with its file, setting and remedy.
    """
    tree = config.load(path, overrides)
    cfg = config.parse(PipelineConfig, tree)
    if (folder := local_path(cfg.store)) is not None:  # absolute, because workers have working folders of their own
        cfg = cfg.model_copy(update={"store": str(folder.expanduser().absolute())})
    if cfg.store.startswith("s3://") and not cfg.tracking.uri:
        raise ConfigError(f"{path}: tracking.uri: required when the store is on S3; name an MLflow server")
    faults, stages = [], {}
    for name in cfg.stages:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known stages: {', '.join(STAGES)}"
            faults.append(f"{tree.origin_of(('stages', name))}: stages.{name}: no such stage; {remedy}")
            continue
        try:
            stages[name] = parse_stage(name, tree.at("stages", name), prefix=f"stages.{name}")
        except ConfigError as error:
            faults.append(str(error))
    for name in (n for n in STAGES if n in stages):
        absent = [need for need in consumed(load_stage(name), stages[name]) if need not in cfg.stages]
        if absent:
            faults.append(f"{path}: stages.{name}: needs the stages {', '.join(absent)}, which are not configured")
    if faults:
        raise ConfigError("\n".join(faults))
    return Pipeline(cfg, {name: stages[name] for name in STAGES if name in stages}, str(path))


def parse_stage(name: str, tree: Tree, *, prefix: str = "") -> StageConfig:
    """The Config of one stage from its tree. Raises ConfigError."""
    cfg: StageConfig = config.parse(load_stage(name).Config, tree, prefix=prefix)
    return cfg


def plan(
    pipeline: Pipeline,
    *,
    only: Sequence[str] = (),
    given: Mapping[str, Artifact] | None = None,
    sources: bool = True,
) -> list[Planned]:
    """What a run would do, in order; `only` limits it to some stages and what they need.

    `given` puts committed artifacts in place of stages. Without `sources` nothing is asked of what lies outside of the
    store, so that nothing counts as done that depends on it. Raises ConfigError where stages disagree and
    ManifestError where a committed artifact is damaged.
    """
    wanted = _needed(pipeline, only or tuple(pipeline.stages), given or {})
    known: dict[str, Artifact] = dict(given or {})
    plans = []
    for name in (n for n in pipeline.stages if n in wanted):
        inputs = {need: known[need] for need in pipeline.needs(name)}
        planned = plan_stage(
            name,
            pipeline.stages[name],
            inputs,
            store=pipeline.cfg.store,
            source=pipeline.source,
            sources=sources,
        )
        known[name] = planned.artifact
        plans.append(planned)
    return plans


def plan_stage(
    name: str, cfg: StageConfig, inputs: dict[str, Artifact], *, store: str, source: str, sources: bool = True
) -> Planned:
    """Whether one stage is done for this config and these inputs."""
    stage = load_stage(name)
    identity = config.resolved(cfg, without=frozenset({"resources"}))
    try:
        if is_training(stage):
            cfg.train.check_ranks(cfg.resources.workers)  # type: ignore[attr-defined]
        promised = stage.agree(cfg, inputs)
        external = _external(stage, cfg, sources=sources)
    except ValueError as error:
        raise ConfigError(f"{source}: stages.{name}: {error}") from error
    digest = artifacts.fingerprint(name, version=stage.VERSION, config=identity, inputs=inputs, external=external)
    uri = artifacts.artifact_uri(store, name, digest)
    done = artifacts.find(uri)
    if done is not None:
        return Planned(name, cfg, inputs, done, "cached", "committed with this configuration and these inputs")
    target = Artifact(kind=name, uri=uri, fingerprint=digest, meta=promised)
    return Planned(name, cfg, inputs, target, "run", _why(name, identity, inputs, store=store))


def spec_of(
    planned: Planned, pipeline: Pipeline, *, pipeline_run_id: str = "", links: Mapping[str, str] | None = None
) -> StageSpec:
    """What a launcher needs to run a planned stage."""
    return StageSpec(
        stage=planned.name,
        config=config.resolved(planned.cfg),
        inputs=planned.inputs,
        target=planned.artifact,
        store=pipeline.cfg.store,
        git_revision=git_revision(),
        tracking_uri=pipeline.tracking_uri,
        experiment=pipeline.experiment,
        pipeline=pipeline.cfg.name,
        pipeline_run_id=pipeline_run_id,
        links=dict(links or {}),
    )


def git_revision() -> str:
    """The commit of the working tree, with `-dirty` where it was changed; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _external(stage: ModuleType, cfg: StageConfig, *, sources: bool) -> str:
    """What stands in the fingerprint for what a stage reads from outside of the pipeline."""
    if not hasattr(stage, "external"):
        return ""
    return str(stage.external(cfg)) if sources else "not looked at"


def _needed(pipeline: Pipeline, only: Sequence[str], given: Mapping[str, Artifact]) -> set[str]:
    wanted: set[str] = set()
    queue = [name for name in only]
    while queue:
        name = queue.pop()
        if name not in wanted and name not in given:
            wanted.add(name)
            queue += pipeline.needs(name)
    return wanted


def _why(name: str, identity: Mapping[str, Any], inputs: Mapping[str, Artifact], *, store: str) -> str:
    """What differs from the most similar artifact of this stage that is committed."""
    differences = []
    storage = artifacts.open_storage(join(store, "artifacts", name))
    for entry in storage.list():
        folder, _, file = entry.key.partition("/")
        if file != artifacts.MANIFEST:
            continue
        try:
            manifest = artifacts.read_manifest(join(store, "artifacts", name, folder))
        except artifacts.ManifestError:
            continue
        if manifest is not None:
            differences.append(_differences(manifest, identity, inputs))
    if not differences:
        return "not made yet"
    closest = min(differences, key=len)
    shown = "; ".join(closest[:3]) + (f"; and {len(closest) - 3} more" if len(closest) > 3 else "")
    return shown or "the source's files or the stage's code version changed"


def _differences(
    manifest: artifacts.Manifest, identity: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> list[str]:
    before = config.flatten({k: v for k, v in manifest.config.items() if k != "resources"})
    after = config.flatten(identity)
    found = [f"{key}: {before.get(key, '(unset)')} -> {after.get(key, '(unset)')}"
             for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]  # fmt: skip
    changed = [n for n, artifact in inputs.items()
               if n not in manifest.inputs or manifest.inputs[n].fingerprint != artifact.fingerprint]  # fmt: skip
    return found + [f"its input {n} changed" for n in changed]
