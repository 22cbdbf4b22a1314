"""Remove samples from committed shards, and report what else was made from them.

An artifact never changes, so what remains becomes a new one beside the old. The new shards hold no byte of
the samples that were taken out, nor of duplicates that an index stopped naming.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe import artifacts
from genpipe.artifacts import MANIFEST, Artifact, Manifest, ManifestError
from genpipe.data.combinations import is_members_file, read_members
from genpipe.data.samples import Reject
from genpipe.data.shards import (
    INDEX_SUFFIX,
    check_shard,
    read_index,
    rewrite_shard,
    split_of_shard,
    statistics,
    write_rejects,
    write_statistics,
    write_table,
)
from genpipe.storage import Storage, join, local_path, open_storage

PREVIEW = "preview.png"
REMOVED = "rejects-removed.parquet"


@dataclass(frozen=True)
class Removal:
    """What removing samples from shards will do; nothing is done yet."""

    uri: str  # as its storage says it: a path is absolute
    manifest: Manifest
    samples: tuple[Reject, ...]  # what is taken out, as the ledger will have it; `source` is the tar
    captions: int  # of those samples
    unknown: tuple[str, ...]  # what was asked for and is not there
    rewritten: frozenset[str]  # the shards that hold bytes which must go
    staying: Mapping[str, frozenset[str]]  # the keys left in each shard

    @property
    def identity(self) -> dict[str, Any]:
        """What the new shards' fingerprint is made of."""
        return artifacts.identity(
            self.manifest.identity["stage"],
            version=self.manifest.identity["version"],
            settings={"removed": sorted(reject.key for reject in self.samples)},
            inputs={"shard": self.manifest.artifact},
        )

    @property
    def target(self) -> Artifact:
        """Where the shards without the samples will be, and their fingerprint: a function of what is taken out."""
        old = self.manifest.artifact
        fingerprint = artifacts.fingerprint(self.identity)
        uri = join(self.uri.rpartition("/")[0], fingerprint[:16])
        return Artifact(kind=old.kind, uri=uri, fingerprint=fingerprint, meta=self._meta())

    @property
    def before(self) -> list[str]:
        """The fingerprints of all shards that held these samples: also of those that others were taken out of."""
        old = self.manifest.artifact
        return [*old.meta.get("removed_from", ()), old.fingerprint]

    @property
    def shards(self) -> list[str]:
        """The shards that something is left of."""
        return sorted(name for name, keys in self.staying.items() if keys)

    def _meta(self) -> dict[str, Any]:
        meta = self.manifest.artifact.meta
        left = {split: [name for name in self.shards if split_of_shard(name) == split] for split in meta["samples"]}
        rejected = Counter(meta["rejected"]) + Counter(removed=len(self.samples))
        return {
            **meta,
            "samples": {split: sum(len(self.staying[name]) for name in names) for split, names in left.items()},
            "shards": left,
            "rejected": dict(sorted(rejected.items())),
            "removed_from": self.before,
        }


def plan_removal(uri: str, wanted: Collection[str]) -> Removal:
    """Find the samples whose key, or whose stored image's sha256, is in `wanted`.

    Raises ValueError if `uri` is no shard artifact, holds none of them, or nothing else in one of its splits.
    """
    manifest = artifacts.read_manifest(uri)
    if manifest is None or manifest.artifact.kind not in ("shards", "samples"):
        raise ValueError(f"{uri}: not a committed shard artifact; give the folder that holds its {MANIFEST}")
    storage = open_storage(uri)
    values = pa.array(sorted(wanted), pa.string())
    samples: list[Reject] = []
    captions = 0
    matched: set[str] = set()
    staying: dict[str, frozenset[str]] = {}
    for name in shard_names(manifest):
        index = pq.read_table(io.BytesIO(storage.read(f"{name}{INDEX_SUFFIX}")))
        listed = _listed(index, values)
        rows = index.filter(listed)
        found = rows["key"].to_pylist()
        samples += [Reject(key, f"{name}.tar", "removed", "taken out by `genpipe data remove`") for key in found]
        captions += sum(map(len, rows["captions"].to_pylist()))
        matched.update(found, rows["sha256"].to_pylist() if "sha256" in rows.column_names else ())
        staying[name] = frozenset(index.filter(pc.invert(listed))["key"].to_pylist())
    if not samples:
        raise ValueError(f"{uri}: holds none of the {len(wanted)} samples to be removed; check the keys")
    for split in sorted({split_of_shard(reject.source) for reject in samples}):
        if not any(keys for name, keys in staying.items() if split_of_shard(name) == split):
            raise ValueError(f"{uri}: without them nothing is left in the {split} split; delete it and shard again")
    inert = {shard for shard, key in _hashed(manifest, storage) if key not in staying[shard]}
    rewritten = inert | {reject.source.removesuffix(".tar") for reject in samples}
    unknown = tuple(sorted(set(wanted) - matched))
    return Removal(storage.uri, manifest, tuple(samples), captions, unknown, frozenset(rewritten), staying)


def remove(removal: Removal) -> Artifact:
    """Commit a new artifact without the samples, or return the one that is committed already.

    Interrupted, the next call goes on with the shards that are missing. `preview.png`, which may show what is
    removed, is left out. Raises ManifestError if a file is not as it was committed.
    """
    target = removal.target
    done = artifacts.committed(target)
    if done is not None:
        return done
    for name in artifacts.missing_parts(target.uri, removal.shards):
        with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
            _download(removal, [f"{name}.tar", f"{name}{INDEX_SUFFIX}"], Path(old))
            if name in removal.rewritten:
                gone = {reject.key for reject in removal.samples if reject.source == f"{name}.tar"}
                facts, files = rewrite_shard(name, Path(old), Path(new), without=gone), Path(new)
            else:
                index, size = read_index(Path(old, f"{name}{INDEX_SUFFIX}")), Path(old, f"{name}.tar").stat().st_size
                facts, files = statistics(name, index, tar_bytes=size), Path(old)
            artifacts.add_part(target.uri, name, files, facts)
    finished = artifacts.finished_parts(target.uri)
    with tempfile.TemporaryDirectory() as folder:
        _write_rest(removal, Path(folder))
        write_statistics(Path(folder), [finished[name]["stats"] for name in removal.shards])
        return artifacts.commit(
            target,
            folder=Path(folder),
            parts=removal.shards,
            identity=removal.identity,
            config=removal.manifest.config,
            inputs=removal.manifest.inputs,
            metrics=_metrics(removal),
            environment=removal.manifest.environment,
        )


@dataclass(frozen=True)
class Affected:
    """What else in a store is affected by the removal of samples."""

    made_from: list[Artifact]  # it, directly or through others
    also_holding: list[tuple[Artifact, int]]  # other shards with samples of the same keys, and how many
    unreadable: list[str]  # manifests that could not be read, a sentence each


def affected(removal: Removal) -> Affected:
    """Search the store of the shards for what was trained on them. Raises ValueError if they lie in no store."""
    root, kind, _ = ("", "", *removal.uri.rsplit("/", 2))[-3:]
    if kind not in ("shards", "samples") or not root.endswith("artifacts"):
        raise ValueError(
            f"{removal.uri}: is not in a store (STORE/artifacts/shards/...); what was made from it is unknown"
        )
    manifests, unreadable = _manifests(root)
    before = set(removal.before)
    made: set[str] = set()
    grown = before
    while made != grown:
        made = grown
        grown = made | {m.artifact.fingerprint for m in manifests if made & {i.fingerprint for i in m.inputs.values()}}
    keys = pa.array(sorted({reject.key for reject in removal.samples}), pa.string())
    holding = []
    for manifest in manifests:
        if (
            manifest.artifact.kind in ("shards", "samples")
            and manifest.artifact.fingerprint != removal.manifest.artifact.fingerprint
        ):
            try:
                holding.append((manifest.artifact, _holds(manifest, keys)))
            except (OSError, pa.ArrowException) as error:
                unreadable.append(f"{manifest.artifact.uri}: {error}")
    return Affected(
        [m.artifact for m in manifests if m.artifact.fingerprint in made - before],
        [(artifact, count) for artifact, count in holding if count],
        unreadable,
    )


def _manifests(root: str) -> tuple[list[Manifest], list[str]]:
    """Those under `root`/KIND/NAME, by place, with the URI where they are; and what is wrong with the others."""
    found, unreadable = [], []
    for entry in open_storage(root).list():
        folder, _, name = entry.key.rpartition("/")
        if name != MANIFEST or folder.count("/") != 1:
            continue
        uri = join(root, folder)
        try:
            manifest = artifacts.read_manifest(uri, check_files=False)
        except ManifestError as error:
            unreadable.append(str(error))
            continue
        if manifest is not None:
            found.append(manifest.model_copy(update={"artifact": manifest.artifact.model_copy(update={"uri": uri})}))
    return found, unreadable


def _holds(manifest: Manifest, keys: pa.Array) -> int:
    """How many of these keys the indexes of other shards name."""
    storage = open_storage(manifest.artifact.uri)
    count = 0
    for name in shard_names(manifest):
        index = pq.read_table(io.BytesIO(storage.read(f"{name}{INDEX_SUFFIX}")), columns=["key"])
        count += pc.sum(pc.is_in(index["key"], keys)).as_py() or 0
    return count


def check_shards(uri: str) -> Iterator[str]:
    """What is wrong between the indexes of a committed shard artifact and its tars, a sentence each."""
    manifest = artifacts.read_manifest(uri, check_files=False)
    assert manifest is not None, "its files were looked at before"
    here, storage = local_path(uri), open_storage(uri)
    for name in shard_names(manifest):
        if here is not None:
            yield from check_shard(name, here)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                for file in (f"{name}.tar", f"{name}{INDEX_SUFFIX}"):
                    storage.download(file, Path(folder, file))
            except FileNotFoundError as error:
                yield f"{name}: cannot be read: {error}"
                continue
            yield from check_shard(name, Path(folder))


def read_ledger(uri: str) -> list[Reject]:
    """All rejects of a committed shard artifact, in the order of its parts."""
    manifest, storage = artifacts.read_manifest(uri), open_storage(uri)
    assert manifest is not None, "the caller found it"
    names = [file.path for file in manifest.files if file.path.startswith("rejects-")]
    return [Reject(**row) for name in names for row in pq.read_table(io.BytesIO(storage.read(name))).to_pylist()]


def shard_names(manifest: Manifest) -> list[str]:
    """The names of an artifact's shards, without suffix, in the manifest's order."""
    paths = [file.path for file in manifest.files]
    return [path.removesuffix(INDEX_SUFFIX) for path in paths if path.endswith(INDEX_SUFFIX)]


def _listed(index: pa.Table, values: pa.Array) -> pa.ChunkedArray:
    listed = pc.is_in(index["key"], values)
    return pc.or_(listed, pc.is_in(index["sha256"], values)) if "sha256" in index.column_names else listed


def _hashed(manifest: Manifest, storage: Storage) -> Iterator[tuple[str, str]]:
    """The shard and key of every sample that was written, also of those that no index names any more."""
    for file in manifest.files:
        if file.path.startswith("hashes-"):
            table = pq.read_table(io.BytesIO(storage.read(file.path)), columns=["shard", "key"])
            yield from zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)
        elif is_members_file(file.path):
            for member in read_members(storage, [file.path]):
                yield from ((shard, member.key) for shard in (member.train, member.combinations))


def _download(removal: Removal, names: Collection[str], folder: Path) -> None:
    """Copies of files of the old artifact. Raises ManifestError if one is not what was committed."""
    committed = {file.path: file.sha256 for file in removal.manifest.files}
    for name in names:
        open_storage(removal.uri).download(name, folder / name)
        if artifacts.sha256_file(folder / name) != committed[name]:
            raise ManifestError(
                f"{join(removal.uri, name)}: its content differs from the manifest's sha256; restore it from a copy "
                "before samples are taken out"
            )


def _write_rest(removal: Removal, folder: Path) -> None:
    """All but the shards: ledgers, with what is removed, and the hashes of what stays.

    No sample is there twice any more, so that no table of such samples is needed.
    """
    left = {f"{name}{suffix}" for name in removal.staying for suffix in (".tar", INDEX_SUFFIX)} | {PREVIEW}
    paths = [file.path for file in removal.manifest.files]
    names = [path for path in paths if path not in left and not is_members_file(path)]
    _download(removal, names, folder)
    for path in folder.glob("hashes-*.parquet"):
        table = pq.read_table(path)
        rows = zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)
        write_table(table.filter(pa.array([key in removal.staying[shard] for shard, key in rows], pa.bool_())), path)
    before = pq.read_table(folder / REMOVED).to_pylist() if (folder / REMOVED).exists() else []
    write_rejects(folder, [*(Reject(**row) for row in before), *removal.samples], name="removed")


def _metrics(removal: Removal) -> dict[str, float]:
    metrics, meta = dict(removal.manifest.metrics), removal.target.meta
    metrics |= {f"samples_{split}": float(count) for split, count in meta["samples"].items()}
    metrics["captions"] -= removal.captions
    metrics["rejected"] += len(removal.samples)
    metrics["rejected_removed"] = float(meta["rejected"]["removed"])
    return metrics
