"""What the gates of a plan are held against: the committed scores that a baseline stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from genpipe.artifacts import Artifact, Manifest, committed_in, read_manifest
from genpipe.config import ConfigError
from genpipe.evaluation.comparison import baseline_values
from genpipe.pipeline.graph import Pipeline, is_uri, load_pipeline
from genpipe.pipeline.plan import Planned, Resolve, resolve_uri
from genpipe.pipeline.systems import find_made, is_pipeline
from genpipe.stage_config import Gate
from genpipe.storage import join


def with_baselines(plans: Sequence[Planned], pipeline: Pipeline, *, resolve: Resolve = resolve_uri) -> list[Planned]:
    """A plan whose gates name the scores of their baselines by URI.

    So a run holds its numbers against one and the same baseline from beginning to end, even if an alias moves, and
    a baseline that is not there stops it before any work. `resolve` gives the artifact that a registered model stands
    for. Raises ConfigError for a baseline that is not there, or has no values of single pictures, or other pictures.
    """
    identities = {planned.name: planned.identity for planned in plans}
    return [_with_baselines(planned, pipeline, identities, resolve) for planned in plans]


def names_needed(plans: Iterable[Planned]) -> list[str]:
    """The names of all artifacts that some instances take, make, or are held against by `with_baselines`."""
    found: set[str] = set()
    for planned in plans:
        found |= {artifact.name for artifact in (planned.artifact, *planned.inputs.values())}
        baselines = (gate.not_worse_than for gate in planned.instance.cfg.observe.gates.values())
        found |= {"/".join(uri.rstrip("/").split("/")[-2:]) for uri in baselines if uri}
    return sorted(found)


def _with_baselines(
    planned: Planned, pipeline: Pipeline, identities: Mapping[str, Mapping[str, Any]], resolve: Resolve
) -> Planned:
    cfg, gates = planned.instance.cfg, dict(planned.instance.cfg.observe.gates)
    for name, gate in gates.items():
        if not gate.not_worse_than:
            continue
        where = f"{pipeline.source}: stages.{planned.name}.observe.gates.{name}.not_worse_than"
        if planned.instance.makes != "scores":
            raise ConfigError(f"{where}: only scores have values of single pictures to compare; use min and max")
        try:
            scores = _scores(gate.not_worse_than, planned, identities, resolve)
            baseline_values(scores.uri, name)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        gates[name] = Gate.model_validate({**gate.model_dump(), "not_worse_than": scores.uri})
    if gates == cfg.observe.gates:
        return planned
    cfg = cfg.model_copy(update={"observe": cfg.observe.model_copy(update={"gates": gates})})
    try:
        planned.instance.stage.check_inputs(cfg, planned.inputs)
    except ValueError as error:
        raise ConfigError(f"{pipeline.source}: stages.{planned.name}: {error}") from error
    return replace(planned, instance=replace(planned.instance, cfg=cfg))


def _scores(baseline: str, planned: Planned, identities: Mapping[str, Mapping[str, Any]], resolve: Resolve) -> Artifact:
    """The scores that a baseline stands for: those of a pipeline's instance of the same name, if it has several."""
    if is_pipeline(baseline):
        return find_made(
            baseline, "scores", name=planned.name if planned.name in load_pipeline(baseline).instances else ""
        )
    if not baseline.startswith("models:"):
        found = read_manifest(baseline)
        if found is None or found.artifact.kind == "scores":
            return find_made(baseline, "scores")
    artifact = resolve(baseline)
    if artifact.kind == "release" and (released := read_manifest(artifact.uri)):
        artifact = released.inputs["system"]
    if artifact.kind != "system":
        raise ValueError(f"{baseline} stands for an artifact of kind {artifact.kind}, neither scores nor a system")
    return _scores_of(artifact, planned, _identity_of_samples(planned, identities))


def _scores_of(system: Artifact, planned: Planned, samples: Mapping[str, Any]) -> Artifact:
    """The newest scores of a system's pictures, drawn and measured with the settings that are those of this plan."""
    store = system.uri.rstrip("/").rpartition(f"/artifacts/{system.kind}/")[0]
    of_system = [found for found in committed_in(store, "scores") if _system_of(found) == system.fingerprint]
    alike = [
        manifest
        for manifest in of_system
        if manifest.identity["settings"] == planned.identity["settings"]
        and _drawn(manifest).get("settings") == samples.get("settings")
    ]
    if not alike:
        others = f"; measured otherwise: {', '.join(of.artifact.uri for of in of_system)}" if of_system else ""
        raise ValueError(
            f"the system at {system.uri} has no scores in {join(store, 'artifacts', 'scores')} that were drawn and "
            f"measured with these settings; measure it with them first, or name its scores{others}"
        )
    return max(alike, key=lambda manifest: manifest.created).artifact


def _identity_of_samples(planned: Planned, identities: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of the samples that a plan's scores are of, which may be another instance's or given."""
    for reference in planned.instance.inputs.get("sample", ()):
        if not is_uri(reference):
            return identities[reference]
        manifest = read_manifest(reference, check_files=False)
        return manifest.identity if manifest else {}
    return {}


def _drawn(scores: Manifest) -> Mapping[str, Any]:
    """The identity of the samples that scores are of; empty if they are gone."""
    manifest = _manifest_of(scores.inputs.get("sample"))
    return manifest.identity if manifest else {}


def _system_of(scores: Manifest) -> str:
    """The fingerprint of the system that drew what scores are of."""
    return str(_drawn(scores).get("inputs", {}).get("system", ""))


def _manifest_of(artifact: Artifact | None) -> Manifest | None:
    return read_manifest(artifact.uri, check_files=False) if artifact else None
