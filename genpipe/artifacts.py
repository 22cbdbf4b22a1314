"""Artifacts: committed folders, named by the fingerprint of what made them.

An artifact is a folder with a `manifest.json`, written last, that lists every file with its size and sha256.
No manifest, no artifact: whatever else lies in the folder is unfinished work that a later attempt may reuse.
The fingerprint names the folder, so that asking 'is this stage done?' is one look at one place, for a
scheduled flow and for a person at a shell alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from genpipe.config import Config, canonical_json
from genpipe.files import TEMPORARY, locked, replacing
from genpipe.storage import (
    Entry,
    Storage,
    at_once,
    check_key,
    join,
    local_path,
    open_object,
    open_storage,
    relative,
    resolve,
)

MANIFEST = "manifest.json"
CURVE = "curve.json"
"""Beside trained weights: what validations found on the way. How often there was one changes nothing about them."""

PARTS = "_parts/"
ASIDE = "aside/"
"""Files of an artifact that `fetch` leaves where they are: large ones, which hardly anybody wants."""
ROLLS = f"{PARTS}rolled/"
ROLL = 1000
"""Markers that one file takes the place of, once somebody has read as many one by one."""
HASH_BLOCK = 8 * 2**20
TRANSFERS = 8
"""Files of an artifact that go up or down at once: S3 takes large ones in concurrent parts besides."""


class Artifact(Config):
    """What a stage consumes and gives. `meta` is what a consumer must agree with (sizes, statistics, digests)."""

    kind: str
    uri: str
    fingerprint: str
    meta: dict[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """KIND/FINGERPRINT: its folder below `artifacts/` of a store, and that of its unfinished work below `work/`."""
        return f"{self.kind}/{self.fingerprint[:16]}"


class Role:
    """What may fill one role of a stage: artifacts of some kinds, perhaps none, perhaps several.

    `Role("shards", "samples")` takes one artifact of either kind, which must be there.
    """

    def __init__(self, *kinds: str, optional: bool = False, several: bool = False) -> None:
        self.kinds = kinds
        self.optional = optional
        self.several = several

    def fits(self, kind: str) -> bool:
        """Whether an artifact of this kind may fill the role."""
        return kind in self.kinds


def several(inputs: Mapping[str, Artifact], role: str) -> list[Artifact]:
    """The artifacts of a role that takes several, in order: `role.0`, `role.1`, ... of `inputs`."""
    found: list[Artifact] = []
    while (key := f"{role}.{len(found)}") in inputs:
        found.append(inputs[key])
    return found


class FileEntry(Config):
    """One file of an artifact: path relative to it, bytes, and sha256 in hex."""

    path: str
    size: int
    sha256: str


class Manifest(Config):
    """The record that makes a folder an artifact.

    `identity` is all that the fingerprint was made of, so that anyone can derive it again. As stored, the URIs of
    inputs in the same store are relative to the artifact's, so that a store can be moved as a whole.
    """

    format: int = 2
    artifact: Artifact
    identity: dict[str, Any]
    config: dict[str, Any] = Field(description="every setting, resources and observe included")
    inputs: dict[str, Artifact]
    metrics: dict[str, float]
    files: tuple[FileEntry, ...]
    environment: dict[str, str] = Field(default_factory=dict, description="git revision, and what was used where")
    run_id: str = Field("", description="the MLflow run that made it")
    created: str


class ManifestError(ValueError):
    """A manifest that does not agree with itself or with the files beside it."""


def identity(
    stage: str, *, version: int, settings: Mapping[str, Any], inputs: Mapping[str, Artifact], source: str = ""
) -> dict[str, Any]:
    """Everything that decides a stage's output, as JSON values.

    `settings` are those that differ from the defaults of this `version` (`config.changed`); `source` is a digest of
    what the stage reads from outside the pipeline. Names of instances are no part of it, roles are.
    """
    return {
        "stage": stage,
        "version": version,
        "settings": dict(settings),
        "inputs": {role: artifact.fingerprint for role, artifact in inputs.items()},
        "source": source,
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The sha256 (hex) of an identity."""
    return hashlib.sha256(canonical_json(dict(identity)).encode()).hexdigest()


def artifact_uri(store: str, kind: str, fingerprint: str) -> str:
    """Where the artifact with this fingerprint lives, whether or not it is there yet."""
    return join(store, "artifacts", kind, fingerprint[:16])


def work_uri(store: str, kind: str, fingerprint: str) -> str:
    """Where the resumable state of an unfinished stage lives."""
    return join(store, "work", kind, fingerprint[:16])


def read_manifest(uri: str, *, check_files: bool = True) -> Manifest | None:
    """The manifest of a committed artifact, None where nothing is committed.

    Checks the manifest against its own digest and every file's presence and size. Raises ManifestError if
    either fails: a damaged artifact is neither used nor silently made anew.
    """
    try:
        raw = open_storage(uri).read(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        record = json.loads(raw)
        digest = record.pop("digest")
        manifest = _resolved(Manifest.model_validate(record), uri)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ManifestError(f"{join(uri, MANIFEST)}: not a readable manifest; {_remedy(uri)}") from None
    if digest != _digest(record):
        raise ManifestError(f"{join(uri, MANIFEST)}: changed since it was written (its digest differs); {_remedy(uri)}")
    if manifest.artifact.fingerprint != fingerprint(manifest.identity):
        raise ManifestError(f"{join(uri, MANIFEST)}: its fingerprint is not that of its identity; {_remedy(uri)}")
    if check_files:
        _check_sizes(uri, manifest)
    return manifest


def committed_in(store: str, kind: str, *, check_files: bool = True) -> list[Manifest]:
    """The manifests of a store's artifacts of one kind, less those that are damaged."""
    folder = join(store, "artifacts", kind)

    def read(name: str) -> Manifest | None:
        with suppress(ManifestError):
            return read_manifest(join(folder, name), check_files=check_files)
        return None

    return [manifest for manifest in at_once(read, open_storage(folder).folders()) if manifest is not None]


def _resolved(manifest: Manifest, uri: str) -> Manifest:
    """With the URIs as they are from here: where the manifest lies, and where its inputs lie from there."""
    inputs = {
        role: artifact.model_copy(update={"uri": resolve(uri, artifact.uri)})
        for role, artifact in manifest.inputs.items()
    }
    artifact = manifest.artifact.model_copy(update={"uri": uri})
    return manifest.model_copy(update={"artifact": artifact, "inputs": inputs})


def _check_sizes(uri: str, manifest: Manifest) -> None:
    sizes = {entry.key: entry.size for entry in open_storage(uri).list()}
    for file in manifest.files:
        if sizes.get(file.path) != file.size:
            found = f"has {sizes[file.path]} bytes" if file.path in sizes else "is missing"
            raise ManifestError(f"{join(uri, file.path)}: {found}, its manifest says {file.size} bytes; {_remedy(uri)}")


def _remedy(uri: str) -> str:
    return f"delete {uri} to have it made again, or restore it from a copy"


def find(uri: str) -> Artifact | None:
    """The committed artifact at `uri`, or None. Raises ManifestError if it is damaged."""
    manifest = read_manifest(uri)
    return manifest.artifact if manifest else None


def committed(planned: Artifact) -> Artifact | None:
    """The artifact that was planned as `planned`, if it is committed.

    Raises ManifestError if what lies there is damaged, or is another artifact.
    """
    found = find(planned.uri)
    if found is not None and found.fingerprint != planned.fingerprint:
        raise ManifestError(
            f"{planned.uri}: holds the {found.kind} {found.fingerprint[:16]}, not the {planned.kind} "
            f"{planned.fingerprint[:16]} that belongs here; {_remedy(planned.uri)}"
        )
    return found


def verify(uri: str) -> Manifest:
    """Re-hash every file of an artifact. Raises ManifestError at the first that differs."""
    manifest = read_manifest(uri)
    if manifest is None:
        raise ManifestError(f"{uri}: no {MANIFEST} here, so nothing was committed")
    for fault in damaged_files(uri):
        raise ManifestError(fault)
    return manifest


def damaged_files(uri: str) -> Iterator[str]:
    """A sentence for each file of a committed artifact whose size or sha256 is not its manifest's.

    Raises ManifestError if there is no manifest, or a damaged one.
    """
    manifest = read_manifest(uri, check_files=False)
    if manifest is None:
        raise ManifestError(f"{uri}: no {MANIFEST} here, so nothing was committed")
    storage = open_storage(uri)
    for file in manifest.files:
        if fault := file_fault(storage, file):
            yield fault


def file_fault(storage: Storage, file: FileEntry) -> str | None:
    """A sentence if a stored file's size or sha256 is not `file`'s. Reads it block by block."""
    where = join(storage.uri, file.path)
    try:
        entry = storage.stat(file.path)
        if entry.size != file.size:
            return f"{where}: has {entry.size} bytes, its manifest says {file.size} bytes"
        with open_object(storage, entry, block=HASH_BLOCK) as content:
            same = hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        return f"{where}: is missing"
    return None if same else f"{where}: its content differs from the manifest's sha256"


def added_files(manifest: Manifest, uri: str) -> Iterator[str]:
    """A sentence for each file at `uri` that the manifest there does not have; leftovers of parts do not count."""
    known = {MANIFEST, *(file.path for file in manifest.files)}
    for entry in open_storage(uri).list():
        if entry.key not in known and not entry.key.startswith(PARTS):
            yield f"{join(uri, entry.key)}: was not committed, but readers may take it for a part of the artifact"


def add_part(
    uri: str, part: str, folder: Path, stats: Mapping[str, Any], *, fence: Callable[[], None] = lambda: None
) -> None:
    """Put one part's finished files into the artifact at `uri`, its marker last.

    Repeating a part replaces it, so a worker that died halfway costs that part and nothing else. `fence` raises if
    the caller may no longer write: it is called before the files and again before the marker.
    """
    fence()
    storage = open_storage(uri)
    files = _upload(storage, folder)
    fence()
    mark_part(storage, part, files, stats)


def mark_part(storage: Storage, part: str, files: Iterable[FileEntry], stats: Mapping[str, Any]) -> None:
    """Mark one part of an artifact as finished, whose files are in place."""
    record = {"part": part, "files": [file.model_dump() for file in files], "stats": dict(stats)}
    storage.write(_marker(part), canonical_json(record).encode())


def forget_part(uri: str, part: str) -> None:
    """Take a finished part back. Its files count no more, and go when the artifact is committed without them."""
    storage = open_storage(uri)
    storage.delete(_marker(part))
    for key, rolled in _rolls(storage, storage.list(ROLLS)):
        if rolled.pop(part, None):
            storage.write(key, canonical_json(rolled).encode())


def missing_parts(uri: str, parts: Iterable[str]) -> list[str]:
    """Those of `parts` that an unfinished artifact does not hold yet, in order; no marker is read for that."""
    storage = open_storage(uri)
    there = list(storage.list(PARTS))
    markers = {entry.key for entry in there}
    rolled = {part for _, roll in _rolls(storage, there) for part in roll}
    return [part for part in parts if part not in rolled and _marker(part) not in markers]


def finished_parts(uri: str) -> dict[str, dict[str, Any]]:
    """The parts that an unfinished artifact already holds: part name to its `files` and `stats`.

    A file takes the place of each `ROLL` markers: call this now and then while parts are made, and at the end of tens
    of thousands there are tens of files to list, read and delete. Only who may write there may call it.
    """
    storage = open_storage(uri)
    return _records(storage, storage.list(PARTS))


def _records(storage: Storage, entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """What is said among a storage's entries of finished parts, by the name of the part."""
    there = [entry for entry in entries if entry.key.startswith(PARTS)]
    rolls = _rolls(storage, there)
    markers = [entry.key for entry in there if "/" not in entry.key.removeprefix(PARTS)]
    read = [json.loads(marker) for marker in at_once(storage.read, markers)]
    for first in range(0, len(read) - ROLL + 1, ROLL):
        key = f"{ROLLS}{len(rolls):06d}.json"
        rolls.append((key, {record["part"]: record for record in read[first : first + ROLL]}))
        storage.create(key, canonical_json(rolls[-1][1]).encode())
        storage.delete_many(markers[first : first + ROLL])
    # What was repeated counts as it was made last: its marker is newer than any roll, and a roll than those before.
    found = {part: record for _, roll in rolls for part, record in roll.items()}
    return found | {record["part"]: record for record in read}


def _rolls(storage: Storage, entries: Iterable[Entry]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """The files of rolled-up markers among a storage's entries, the oldest first: their keys, and what they hold."""
    keys = sorted(entry.key for entry in entries if entry.key.startswith(ROLLS))
    return list(zip(keys, map(json.loads, at_once(storage.read, keys)), strict=True))


def commit(
    artifact: Artifact,
    *,
    folder: Path | None = None,
    parts: Iterable[str] = (),
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    metrics: Mapping[str, float],
    environment: Mapping[str, str] | None = None,
    run_id: str = "",
    fence: Callable[[], None] = lambda: None,
) -> Artifact:
    """Make `artifact` real: gather the finished `parts`, upload `folder`, and create the manifest last.

    A file of `folder` takes the place of one of the same path that a part brought. What attempts that were cut off
    left beside them is deleted. `artifact.fingerprint` must be that of `identity`. `fence` raises if the caller may no
    longer write: it is called before the files and again before the manifest. Raises FileExistsError where a manifest
    is there already.
    """
    assert artifact.fingerprint == fingerprint(identity), "an artifact is named by its identity"
    fence()
    storage = open_storage(artifact.uri)
    uploaded = _upload(storage, folder) if folder else []
    there = list(storage.list())
    done = _records(storage, there)
    gathered = [FileEntry.model_validate(file) for part in parts for file in done[part]["files"]]
    files = {file.path: file for file in [*gathered, *uploaded]}
    leftovers = [entry.key for entry in there if entry.key not in files and not entry.key.startswith(PARTS)]
    manifest = Manifest(
        artifact=artifact,
        identity=dict(identity),
        config=dict(config),
        inputs={
            role: given.model_copy(update={"uri": relative(artifact.uri, given.uri)}) for role, given in inputs.items()
        },
        metrics=dict(metrics),
        files=tuple(file for _, file in sorted(files.items())),
        environment=dict(environment or {}),
        run_id=run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    record = manifest.model_dump(mode="json")
    text = json.dumps({**record, "digest": _digest(record)}, indent=1, sort_keys=True)
    fence()
    storage.delete_many(key for key in leftovers if key != MANIFEST)
    storage.create(MANIFEST, text.encode())
    storage.delete_all(PARTS)
    return artifact


def cache_root() -> Path:
    """Where this machine keeps copies and digests: `GENPIPE_CACHE`, else `~/.cache/genpipe`."""
    return Path(os.environ.get("GENPIPE_CACHE", "~/.cache/genpipe")).expanduser()


def cache_folder(artifact: Artifact) -> Path:
    """Where this machine keeps a whole copy of a remote artifact, whether or not it is there yet."""
    return cache_root() / artifact.kind / artifact.fingerprint


def fetch(artifact: Artifact) -> Path:
    """The artifact's files as a local folder: itself if it is local, else a copy in the cache.

    The cache is `GENPIPE_CACHE` (default `~/.cache/genpipe`), one folder a fingerprint. A copy is complete but for what
    is below `aside/`, or absent, and is made by one process of a machine while the others wait; one that was cut off
    goes on with the files that it lacks. Each file's sha256 is checked as it arrives (ManifestError).
    """
    here = local_path(artifact.uri)
    if here is not None:
        return here
    target = cache_folder(artifact)
    if target.exists():
        return target
    staging = target.with_name(f"{target.name}{TEMPORARY}")
    with locked(target.with_name(f"{target.name}.lock")):
        if target.exists():
            return target
        manifest = read_manifest(artifact.uri)
        if manifest is None:
            raise ManifestError(f"{artifact.uri}: no {MANIFEST} here, so nothing was committed")
        staging.mkdir(parents=True, exist_ok=True)
        try:
            _copy(artifact.uri, [file for file in manifest.files if not file.path.startswith(ASIDE)], staging)
        except ManifestError:  # what was committed is damaged, so that the rest of it is of no use either
            shutil.rmtree(staging)
            raise
        staging.rename(target)
    return target


def fetch_files(uri: str, files: Sequence[FileEntry], folder: Path) -> None:
    """Copy some files of the artifact at `uri` into `folder`, those that are not there whole; one process at a time.

    Raises ManifestError for one that does not arrive as committed.
    """
    with ThreadPoolExecutor(TRANSFERS) as pool:  # every process looks for itself: that needs no lock
        whole = list(pool.map(partial(_is_whole, folder), files))
    if not all(whole):
        with locked(folder.with_name(f"{folder.name}.lock")):
            _copy(uri, files, folder)


def _copy(uri: str, files: Sequence[FileEntry], folder: Path) -> None:
    """Copy files that are not whole in `folder`, where this process alone writes, and delete halves of files there."""
    storage = open_storage(uri)
    for half in {*folder.rglob(f"*{TEMPORARY}*")} - {folder / file.path for file in files}:  # somebody was killed
        half.unlink()

    def copy(file: FileEntry) -> None:
        if _is_whole(folder, file):
            return
        with replacing(folder / file.path) as arriving:
            storage.download(file.path, arriving)
            if sha256_file(arriving) != file.sha256:
                raise ManifestError(f"{join(uri, file.path)}: arrived with another sha256 than its manifest's")

    at_once(copy, files, requests=TRANSFERS)


def _is_whole(folder: Path, file: FileEntry) -> bool:
    path = folder / check_key(file.path)
    return path.exists() and path.stat().st_size == file.size and sha256_file(path) == file.sha256


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upload(storage: Storage, folder: Path) -> list[FileEntry]:
    def upload(path: Path) -> FileEntry:
        key = path.relative_to(folder).as_posix()
        storage.upload(key, path)
        return FileEntry(path=key, size=path.stat().st_size, sha256=sha256_file(path))

    return at_once(upload, sorted(path for path in folder.rglob("*") if path.is_file()), requests=TRANSFERS)


def _marker(part: str) -> str:
    return f"{PARTS}{hashlib.sha256(part.encode()).hexdigest()[:24]}.json"


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(record).encode()).hexdigest()
