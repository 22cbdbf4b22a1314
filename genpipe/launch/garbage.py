"""What a store keeps that nothing refers to any more, and how it is deleted.

A store has two kinds of folders, each named KIND/FINGERPRINT: committed artifacts, and unfinished work (checkpoints and
progress below `work/`, files without a manifest below `artifacts/`). A folder stays for what it is itself: somebody is
at work on it, a registered model was made from it, a pipeline plans it, it is young. So does, as what it was made from
is part of it, every input of what stays.

Deleting one takes the lease of its work folder, as making it does, so that nobody makes it anew meanwhile. What makes
the rest count goes first: a manifest, the markers of finished parts, the manifests of checkpoints. Whatever interrupts
it, an artifact is whole or absent, and nothing that is resumed trusts a file that is gone. What was made from others
goes before them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from graphlib import TopologicalSorter

from pydantic import ValidationError

from genpipe import artifacts
from genpipe.artifacts import MANIFEST, PARTS, Manifest
from genpipe.config import ConfigError
from genpipe.launch.lease import LEASE, Holder, Watch, find_holder, seized
from genpipe.pipeline.baselines import names_needed, with_baselines
from genpipe.pipeline.graph import Pipeline, load_pipeline
from genpipe.pipeline.plan import plan
from genpipe.pipeline.spec import StageSpec, sqlite_uri
from genpipe.storage import Storage, at_once, join, local_path, open_storage
from genpipe.tracking.open_runs import all_open, is_alive
from genpipe.tracking.registry import registered, resolve

DAY_SECONDS = 86400.0
SILENT_SECONDS = 3600.0
"""A lease in whose folder nothing was written for so long is nobody's: its holder renews it every few seconds."""

ARTIFACTS, WORK = "artifacts/", "work/"


@dataclass
class Folder:
    """One thing that may go: `path` below the store, bytes, seconds since it was last written to, and why it stays.

    The lease does not count as written; where there is nothing else, the age is infinite.
    """

    path: str
    size: int = 0
    age: float = float("inf")
    committed: bool = False
    leased: bool = False
    stays: str = ""
    inputs: list[str] = field(default_factory=list)
    """The paths of the artifacts that it was made from, or is being made from."""

    @property
    def name(self) -> str:
        """KIND/FINGERPRINT."""
        return self.path.partition("/")[2]


def survey(store: str, pipelines: Sequence[Pipeline] = (), *, days: float) -> list[Folder]:
    """Every folder of a store; what has no `stays` is referred to by nothing and has not changed for `days`.

    Plans are those of `pipelines` and of what was deployed from the store, models those that are registered in their
    MLflow and in the store's own. Raises ValueError where a plan cannot be made, a registry does not answer, or a
    manifest is damaged: then it is not known what is needed.
    """
    known = [*pipelines, *_deployed(store)]
    found = _folders(store)
    manifests = _manifests(store, [folder for folder in found.values() if folder.committed])
    for folder in found.values():
        folder.inputs = _inputs(store, folder, manifests.get(folder.path))
    roots = _reasons(store, known, found, manifests)
    for folder in found.values():
        young = f"younger than {days:g} days" if folder.age < days * DAY_SECONDS else ""
        folder.stays = roots.get(folder.path, "") or young
    _keep_inputs(found)
    return sorted(found.values(), key=lambda folder: (bool(folder.stays), folder.path))


def delete(store: str, folders: Iterable[Folder]) -> Iterator[tuple[Folder, bool]]:
    """Delete those of a survey that do not stay, each after all that was made from it; whether it went.

    One that somebody is at by now does not.
    """
    going = {folder.path: folder for folder in folders if not folder.stays}
    inputs_first = TopologicalSorter({path: [i for i in f.inputs if i in going] for path, f in going.items()})
    for path in reversed(list(inputs_first.static_order())):
        yield going[path], _delete(store, going[path])


def _delete(store: str, folder: Folder) -> bool:
    work = join(store, WORK + folder.name)
    holder = find_holder(open_storage(work))
    if folder.path in _held_by_runs(store) or (holder is not None and not _is_silent(work, holder)):
        return False
    with seized(work, holder) as ours:
        if not ours:
            return False
        made = open_storage(join(store, ARTIFACTS + folder.name))
        if folder.committed or not _is_committed(made):
            _wipe(made)
        _disarm(open_storage(work))
    return True


def _wipe(storage: Storage) -> None:
    _disarm(storage)
    storage.delete_all()


def _disarm(storage: Storage) -> None:
    """Delete what makes other files count: first of all, so that none counts that has lost some of them."""
    storage.delete(MANIFEST)
    storage.delete_all(PARTS)
    for entry in list(storage.list()):
        if entry.key.endswith(f"/{MANIFEST}"):
            storage.delete(entry.key)


def _is_committed(storage: Storage) -> bool:
    with suppress(FileNotFoundError):
        return bool(storage.stat(MANIFEST))
    return False


def _folders(store: str) -> dict[str, Folder]:
    """By path; files below `artifacts/` that no manifest lists are counted with the unfinished work of that name."""
    now = time.time()
    found: dict[str, Folder] = {}
    listed = {room: list(open_storage(join(store, room)).list()) for room in ("artifacts", "work")}
    made = {e.key.removesuffix(f"/{MANIFEST}") for e in listed["artifacts"] if e.key.endswith(f"/{MANIFEST}")}
    for room, entries in listed.items():
        for entry in entries:
            parts = entry.key.split("/")
            if len(parts) < 3:
                continue  # nothing of ours
            name = "/".join(parts[:2])
            committed = room == "artifacts" and name in made
            path = (ARTIFACTS if committed else WORK) + name
            folder = found.setdefault(path, Folder(path, committed=committed))
            folder.size += entry.size
            if room == "work" and parts[2] == LEASE:  # renewed while somebody is at work; of what went half, the rest
                folder.leased = True
            else:
                folder.age = min(folder.age, now - entry.modified)
    return found


def _manifests(store: str, folders: Sequence[Folder]) -> dict[str, Manifest]:
    read = partial(artifacts.read_manifest, check_files=False)
    manifests = at_once(read, [join(store, folder.path) for folder in folders])
    return {folder.path: manifest for folder, manifest in zip(folders, manifests, strict=True) if manifest}


def _reasons(
    store: str, pipelines: Sequence[Pipeline], found: Mapping[str, Folder], manifests: Mapping[str, Manifest]
) -> dict[str, str]:
    """Why a folder stays by itself, by path; the weightiest reason of each."""
    reasons: dict[str, str] = {}
    for pipeline in pipelines:
        look_up = partial(resolve, tracking_uri=pipeline.tracking_uri)
        plans = with_baselines(plan(pipeline, resolve=look_up), pipeline, resolve=look_up)
        for path in _both(names_needed(plans)):
            reasons[path] = f"in the plan of {pipeline.source}"
    models = {key: model for uri in _registries(store, pipelines, manifests) for key, model in registered(uri).items()}
    for path, manifest in manifests.items():
        if model := models.get(manifest.artifact.fingerprint):
            reasons[path] = f"registered as {model}"
    for folder in found.values():
        work = join(store, folder.path)
        holder = find_holder(open_storage(work)) if folder.leased else None
        if holder is not None and not _is_silent(work, holder):
            reasons[folder.path] = f"held by {holder.claim.attempt}"
    return reasons | dict.fromkeys(_held_by_runs(store), "held by a run that is under way")


def _both(names: Iterable[str]) -> list[str]:
    """The paths of artifacts and of the work on them."""
    return [room + name for name in names for room in (ARTIFACTS, WORK)]


def _registries(store: str, pipelines: Sequence[Pipeline], manifests: Mapping[str, Manifest]) -> set[str]:
    """The MLflows whose registries may name artifacts of the store."""
    uris = {pipeline.tracking_uri for pipeline in pipelines}
    here = local_path(store)
    if here is not None and (here / "mlflow.db").exists():
        uris.add(sqlite_uri(here / "mlflow.db"))
    if not uris and any(manifest.run_id for manifest in manifests.values()):
        raise ValueError(
            f"{store}: its runs are in an MLflow that is not known here, whose registry may name artifacts; give the "
            "CONFIG of a pipeline of this store instead of the store"
        )
    return uris


def _held_by_runs(store: str) -> set[str]:
    """The paths of all that runs which are alive make or take."""
    runs = all_open(store)
    held: set[str] = set()
    for run in runs:
        if is_alive(run, runs):
            taken = [*run.stage.inputs.values(), run.stage.target] if run.stage else []
            held.update(_both(artifact.name for artifact in taken), _both(run.pipeline.holds if run.pipeline else ()))
    return held


def _is_silent(work: str, holder: Holder) -> bool:
    """Whether nobody holds a lease any more, as far as that can be known without waiting."""
    if Watch().is_over(holder):
        return True
    return time.time() - max(entry.modified for entry in open_storage(work).list(f"{LEASE}/")) > SILENT_SECONDS


def _keep_inputs(found: Mapping[str, Folder]) -> None:
    """Whatever a folder that stays was made from stays as well."""
    queue = [folder for folder in found.values() if folder.stays]
    while queue:
        user = queue.pop()
        for path in user.inputs:
            folder = found.get(path)
            if folder is not None and not folder.stays:
                folder.stays = f"input of {user.path}"
                queue.append(folder)


def _inputs(store: str, folder: Folder, manifest: Manifest | None) -> list[str]:
    """The paths of what a folder was made from; of unfinished work also that of what it has become, if it has."""
    if manifest is not None:
        return [ARTIFACTS + artifact.name for artifact in manifest.inputs.values()]
    try:
        inputs = StageSpec.read(join(store, folder.path, "spec.json")).inputs
    except (FileNotFoundError, ValidationError):  # never written, or by another version
        inputs = {}
    return [ARTIFACTS + folder.name, *(ARTIFACTS + artifact.name for artifact in inputs.values())]


def _deployed(store: str) -> list[Pipeline]:
    """The pipelines that `genpipe deploy` has put into the store."""
    folder = join(store, "deployments")
    files = [join(folder, entry.key) for entry in open_storage(folder).list() if entry.key.endswith(".yaml")]
    pipelines = []
    for file in files:
        try:
            pipelines.append(load_pipeline(file))
        except ConfigError as error:
            raise ValueError(f"{error}\n{file} was deployed; delete it if nothing of it is needed any more") from None
    return pipelines
