"""Which committed system a person means: by a pipeline's file, by its URI, or by the store that holds it."""

from __future__ import annotations

from genpipe.artifacts import MANIFEST, Artifact, Manifest, ManifestError, read_manifest
from genpipe.config import ConfigError, changed
from genpipe.pipeline.graph import Pipeline, is_uri, load_pipeline
from genpipe.pipeline.plan import plan
from genpipe.stage_config import UNFINGERPRINTED
from genpipe.storage import join, open_storage

DRAWING = ("system", "release")
"""The kinds of artifact that draw pictures."""


def find_system(source: str, *, name: str = "") -> Artifact:
    """The committed system that a pipeline's YAML file, an artifact's URI or a store stands for; or a release's folder.

    `name` says which one where a pipeline has several. Neither the training data nor their shards need be there any
    more. Raises ConfigError where there is none, or more than one.
    """
    if source.endswith((".yaml", ".yml")):
        return _of_pipeline(source, name)
    if name:
        raise ConfigError(f"system {name!r}: only a pipeline's YAML file has systems by name; leave it out")
    manifest = read_manifest(source)
    if manifest is None:
        return _of_store(source)
    if manifest.artifact.kind not in DRAWING:
        raise ConfigError(f"{source}: is an artifact of kind {manifest.artifact.kind}, not a system; name a system's")
    return manifest.artifact


def _of_store(store: str) -> Artifact:
    found = sorted(_committed(store), key=lambda manifest: manifest.created)
    if not found:
        raise ConfigError(
            f"{store}: neither a pipeline's YAML file, nor a system (it has no {MANIFEST}), nor a store with one in "
            "artifacts/system; correct the path, or train one with `genpipe run CONFIG`"
        )
    if len(found) > 1:
        listed = "\n".join(f"  {manifest.artifact.uri}  made {manifest.created}" for manifest in found)
        raise ConfigError(f"{store}: has {len(found)} systems; name one, or the pipeline's YAML file:\n{listed}")
    return found[0].artifact


def _committed(store: str) -> list[Manifest]:
    """The manifests of a store's systems, less those that are damaged."""
    folder = join(store, "artifacts", "system")
    found: list[Manifest] = []
    for artifact in open_storage(folder).folders():
        try:
            manifest = read_manifest(join(folder, artifact))
        except ManifestError:
            continue
        if manifest is not None:
            found.append(manifest)
    return found


def _of_pipeline(path: str, name: str) -> Artifact:
    pipeline = load_pipeline(path)
    systems = [instance.name for instance in pipeline.instances.values() if instance.makes == "system"]
    if name and name not in systems:
        raise ConfigError(f"system {name!r}: {path} has none of this name; it has {', '.join(systems) or 'none'}")
    if not name and len(systems) != 1:
        raise ConfigError(f"{path}: has {len(systems)} systems ({', '.join(systems)}); say which one by its name")
    name = name or systems[0]
    try:
        planned = plan(pipeline, only=[name])[-1]
    except ConfigError as error:  # the data may be elsewhere by now, and the system does not need them
        found = _made_without_data(pipeline, name)
        if found is None:
            raise ConfigError(f"{error}; nor is there a system of these settings in {pipeline.cfg.store}") from error
        return found
    if planned.status != "cached":
        raise ConfigError(f"{path}: {name} is not made yet ({planned.why}); `genpipe run {path}` makes it")
    return planned.artifact


def _made_without_data(pipeline: Pipeline, name: str) -> Artifact | None:
    """The newest committed system of these settings, whatever data it was trained on."""
    found = [manifest for manifest in _committed(pipeline.cfg.store) if _is_of(manifest, pipeline, name)]
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
