"""The plan of a run: which artifacts are committed, which are to be made, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import genpipe
from genpipe import artifacts, config
from genpipe.artifacts import Artifact, Manifest, ManifestError
from genpipe.config import ConfigError
from genpipe.pipeline.code import code_digest
from genpipe.pipeline.curves import likeness
from genpipe.pipeline.graph import Instance, Pipeline, is_uri, misfit
from genpipe.pipeline.spec import Curve, StageSpec
from genpipe.revision import git_revision
from genpipe.stage_config import UNFINGERPRINTED
from genpipe.stages import is_training

Status = Literal["cached", "run"]
Resolve = Callable[[str], Artifact]


@dataclass(frozen=True)
class Planned:
    """One instance of a plan. `artifact` is committed if `status` is cached, promised otherwise."""

    instance: Instance
    inputs: dict[str, Artifact]
    identity: dict[str, Any]
    artifact: Artifact
    status: Status
    why: str

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.instance.name


def resolve_uri(uri: str) -> Artifact:
    """The committed artifact at a URI. Raises ValueError if there is none."""
    artifact = artifacts.find(uri)
    if artifact is None:
        raise ValueError(f"nothing is committed at {uri} (no {artifacts.MANIFEST}); correct the URI")
    return artifact


def plan(
    pipeline: Pipeline, *, only: Sequence[str] = (), sources: bool = True, resolve: Resolve = resolve_uri
) -> list[Planned]:
    """What a run would do, in order; `only` limits it to some instances and what they need.

    Without `sources` nothing is asked of what lies outside of the store, so that nothing counts as done that depends
    on it. `resolve` gives the artifact that a URI or a registered model stands for. Raises ConfigError where
    instances do not fit one another and ManifestError where a committed artifact is damaged.
    """
    wanted = pipeline.needed(only)
    known: dict[str, Planned] = {}
    for name, instance in pipeline.instances.items():
        if name in wanted:
            inputs = _inputs(pipeline, instance, known, resolve)
            known[name] = plan_instance(pipeline, instance, inputs, sources=sources)
    return list(known.values())


def _inputs(
    pipeline: Pipeline, instance: Instance, known: Mapping[str, Planned], resolve: Resolve
) -> dict[str, Artifact]:
    """The artifacts by role, planned ones among them. Raises ConfigError for one that is of another kind."""
    inputs: dict[str, Artifact] = {}
    for name, references in instance.inputs.items():
        role = instance.roles[name]
        for i, reference in enumerate(references):
            where = f"{pipeline.source}: stages.{instance.name}.inputs.{name}"
            try:
                artifact = resolve(reference) if is_uri(reference) else known[reference].artifact
            except ManifestError:
                raise
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
            if not role.fits(artifact.kind):
                raise ConfigError(misfit(where, role, reference, artifact.kind, pipeline.instances))
            inputs[f"{name}.{i}" if role.several else name] = artifact
    return inputs


def plan_instance(
    pipeline: Pipeline, instance: Instance, inputs: dict[str, Artifact], *, sources: bool = True
) -> Planned:
    """Whether one instance is done for these inputs."""
    stage, cfg = instance.stage, instance.cfg
    try:
        if is_training(stage):
            ranks = range(cfg.resources.min_workers, cfg.resources.max_workers + 1)
            cfg.train.check_ranks(ranks)  # type: ignore[attr-defined]
            for count in ranks:
                cfg.resources.shards(count)
        _check_validator(cfg, training=is_training(stage))
        promised = stage.check_inputs(cfg, inputs)
        source = _source_digest(instance, sources=sources)
    except ValueError as error:
        raise ConfigError(f"{pipeline.source}: stages.{instance.name}: {error}") from error
    settings = config.changed(cfg, without=UNFINGERPRINTED)
    identity = artifacts.identity(instance.kind, version=stage.VERSION, settings=settings, inputs=inputs, source=source)
    fingerprint = artifacts.fingerprint(identity)
    uri = artifacts.artifact_uri(pipeline.cfg.store, instance.makes, fingerprint)
    target = Artifact(kind=instance.makes, uri=uri, fingerprint=fingerprint, meta=promised)
    done = artifacts.committed(target)
    if done is not None:
        why = "committed with these settings and inputs"
        return Planned(instance, inputs, identity, done, "cached", why)
    why = why_not(identity, config.resolved(cfg), store=pipeline.cfg.store, kind=instance.makes)
    return Planned(instance, inputs, identity, target, "run", why)


def spec_of(
    planned: Planned, pipeline: Pipeline, *, pipeline_run_id: str = "", links: Mapping[str, str] | None = None
) -> StageSpec:
    """What a launcher needs to run a planned instance."""
    return StageSpec(
        name=planned.name,
        stage=planned.instance.kind,
        config=config.resolved(planned.instance.cfg),
        inputs=planned.inputs,
        identity=planned.identity,
        target=planned.artifact,
        store=pipeline.cfg.store,
        version=genpipe.__version__,
        git_revision=git_revision(),
        code=code_digest(planned.instance.kind),
        tracking_uri=pipeline.tracking_uri,
        experiment=pipeline.experiment,
        pipeline=pipeline.cfg.name,
        pipeline_run_id=pipeline_run_id,
        links=dict(links or {}),
        curves=_curves(planned, pipeline),
    )


def _curves(planned: Planned, pipeline: Pipeline) -> dict[str, Curve]:
    """Those of the pipeline's file that are of trainings like this one."""
    if not pipeline.curves or not is_training(planned.instance.stage):
        return {}
    alike = likeness(planned)
    return {made: curve for of in pipeline.curves.values() if of.likeness == alike for made, curve in of.curves.items()}


def _check_validator(cfg: Any, *, training: bool) -> None:
    """Raise ValueError where `resources.validation` is for a process that has nothing to do, or is waited for."""
    if cfg.resources.validation is None:
        return
    if not training:
        raise ValueError("resources.validation: this stage trains nothing that could be validated; leave it out")
    if not cfg.observe.validate_every:
        raise ValueError(
            "resources.validation: observe.validate_every is 0, so that the only validation is the last one, which is "
            "rank 0's; set observe.validate_every, or leave out resources.validation"
        )
    for setting, given in (("train.best", cfg.train.best), ("observe.keep_best", cfg.observe.keep_best)):
        if given:
            raise ValueError(
                f"resources.validation: {setting} decides by what validation finds, so training waits for it; leave "
                "out one of the two"
            )


def _source_digest(instance: Instance, *, sources: bool) -> str:
    """What stands in the fingerprint for what a stage reads from outside of the pipeline."""
    if not hasattr(instance.stage, "source_digest"):
        return ""
    return str(instance.stage.source_digest(instance.cfg)) if sources else "not looked at"


def why_not(identity: Mapping[str, Any], settings: Mapping[str, Any], *, store: str, kind: str) -> str:
    """What differs from the most similar artifact of this stage among those of a kind that a store has."""
    manifests = artifacts.committed_in(store, kind, check_files=False)
    found = [_differences(m, identity, settings) for m in manifests if m.identity["stage"] == identity["stage"]]
    if not found:
        return "not made yet"
    closest = min(found, key=len)
    assert closest, "equal identities have equal fingerprints"
    return "; ".join(closest[:3]) + (f"; and {len(closest) - 3} more" if len(closest) > 3 else "")


def _differences(manifest: Manifest, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What an identity has other than that of a manifest, in words; `settings` are all, as the manifest's config is."""
    then, now = manifest.identity, identity
    found = []
    if then["version"] != now["version"]:
        found.append(f"the stage's version: {then['version']} -> {now['version']}")
    then_set, now_set = (config.flatten(each["settings"]) for each in (then, now))
    before, after = config.flatten(manifest.config), config.flatten(settings)
    for key in sorted(then_set.keys() | now_set.keys()):
        if then_set.get(key) != now_set.get(key) and before.get(key) != after.get(key):
            found.append(f"{key}: {before.get(key, '(unset)')} -> {after.get(key, '(unset)')}")
    found += [f"its input {role} changed" if role in then["inputs"] and role in now["inputs"] else
              f"its input {role} is {'new' if role in now['inputs'] else 'gone'}"
              for role in sorted(then["inputs"].keys() | now["inputs"].keys())
              if then["inputs"].get(role) != now["inputs"].get(role)]  # fmt: skip
    if then["source"] != now["source"]:
        found.append("its source changed")
    return found or ["the defaults of its settings"]
