"""Which committed system, or which scores, a person means: by a pipeline's file, by the URI, or by the store."""

from __future__ import annotations

from typing import Literal

from genpipe.artifacts import MANIFEST, Artifact, Manifest, committed_in, read_manifest
from genpipe.config import ConfigError, changed
from genpipe.pipeline.graph import Pipeline, is_uri, load_pipeline
from genpipe.pipeline.plan import plan
from genpipe.stage_config import UNFINGERPRINTED

Kind = Literal["system", "scores"]
ONE: dict[Kind, str] = {"system": "a system", "scores": "scores"}
SEVERAL: dict[Kind, str] = {"system": "systems", "scores": "scores"}
DRAWING = ("system", "release")
"""The kinds of artifact that draw pictures."""
FITTING: dict[Kind, tuple[str, ...]] = {"system": DRAWING, "scores": ("scores",)}


def is_pipeline(source: str) -> bool:
    """Whether a source names a pipeline's YAML file."""
    return source.endswith((".yaml", ".yml"))


def find_system(source: str, *, name: str = "") -> Artifact:
    """The committed system that a pipeline's YAML file, an artifact's URI or a store stands for; or a release's folder.

    See `find_made`.
    """
    return find_made(source, "system", name=name)


def find_made(source: str, kind: Kind, *, name: str = "") -> Artifact:
    """The committed system, or the scores, that a pipeline's YAML file, an artifact's URI or a store stands for.

    `name` says which one where a pipeline has several. Neither the training data nor their shards need be there any
    more. Raises ConfigError where there is none, or more than one.
    """
    if is_pipeline(source):
        return _of_pipeline(source, name, kind)
    if name:
        raise ConfigError(f"{kind} {name!r}: only a pipeline's YAML file has {SEVERAL[kind]} by name; leave it out")
    manifest = read_manifest(source)
    if manifest is None:
        return _of_store(source, kind)
    if manifest.artifact.kind not in FITTING[kind]:
        raise ConfigError(
            f"{source}: is an artifact of kind {manifest.artifact.kind}, not {ONE[kind]}; name one of kind {kind}"
        )
    return manifest.artifact


def _of_store(store: str, kind: Kind) -> Artifact:
    found = sorted(committed_in(store, kind), key=lambda manifest: manifest.created)
    if not found:
        raise ConfigError(
            f"{store}: neither a pipeline's YAML file, nor {ONE[kind]} (it has no {MANIFEST}), nor a store with "
            f"some in artifacts/{kind}; correct the path, or make them with `genpipe run CONFIG`"
        )
    if len(found) > 1:
        listed = "\n".join(f"  {manifest.artifact.uri}  made {manifest.created}" for manifest in found)
        raise ConfigError(
            f"{store}: has {len(found)} {SEVERAL[kind]}; name one, or the pipeline's YAML file:\n{listed}"
        )
    return found[0].artifact


def _of_pipeline(path: str, name: str, kind: Kind) -> Artifact:
    pipeline = load_pipeline(path)
    names = [instance.name for instance in pipeline.instances.values() if instance.makes == kind]
    if name and name not in names:
        raise ConfigError(f"{kind} {name!r}: {path} has none of this name; it has {', '.join(names) or 'none'}")
    if not name and len(names) != 1:
        raise ConfigError(f"{path}: has {len(names)} {SEVERAL[kind]} ({', '.join(names)}); say which one by its name")
    name = name or names[0]
    try:
        planned = plan(pipeline, only=[name])[-1]
    except ConfigError as error:  # the data may be elsewhere by now, and the system does not need them
        found = _made_without_data(pipeline, name, kind)
        if found is None:
            raise ConfigError(f"{error}; nor is there {ONE[kind]} of these settings in {pipeline.cfg.store}") from error
        return found
    if planned.status != "cached":
        raise ConfigError(f"{path}: {name} is not made yet ({planned.why}); `genpipe run {path}` makes it")
    return planned.artifact


def _made_without_data(pipeline: Pipeline, name: str, kind: Kind) -> Artifact | None:
    """The newest committed artifact of these settings, whatever data it was made from."""
    found = [manifest for manifest in committed_in(pipeline.cfg.store, kind) if _is_of(manifest, pipeline, name)]
    return max(found, key=lambda manifest: manifest.created).artifact if found else None


def _is_of(manifest: Manifest, pipeline: Pipeline, name: str) -> bool:
    """Whether an artifact is one of this instance but for the content of the data: by settings, and so its inputs."""
    instance = pipeline.instances[name]
    identity = manifest.identity
    settings = changed(instance.cfg, without=UNFINGERPRINTED)
    if (identity["stage"], identity["version"], identity["settings"]) != (
        instance.kind, instance.stage.VERSION, settings,
    ):  # fmt: skip
        return False
    references = {
        f"{role}.{i}" if instance.roles[role].several else role: reference
        for role, several in instance.inputs.items()
        for i, reference in enumerate(several)
    }
    if references.keys() != manifest.inputs.keys():
        return False
    for role, reference in references.items():
        if is_uri(reference):
            continue
        made_from = read_manifest(manifest.inputs[role].uri, check_files=False)
        if made_from is not None and not _is_of(made_from, pipeline, reference):  # shards may be gone as well
            return False
    return True
