"""The checkpoints of one training in its work folder: put there by all ranks, committed, thinned out, found again.

A checkpoint is a folder under `uri`, committed like an artifact: each rank puts its file and a marker in place, and
when all have, rank 0 writes the manifest with every file's sha256. Ranks meet in the storage alone, so all of this
can be done in the background of training. What has no manifest is no checkpoint.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import Field

from genpipe import artifacts
from genpipe.artifacts import Artifact, FileEntry, ManifestError
from genpipe.config import Config
from genpipe.files import may_pass
from genpipe.storage import Storage, join, open_storage
from genpipe.training.checkpoint import Checkpoint, Snapshot

T = TypeVar("T")

NAME = re.compile(r"(\d{15})-[0-9a-f]{12}-\d{6}")
"""Of a checkpoint's folder: samples seen, the attempt that wrote it, and how many it had written before."""

FAILED = "failed/"
RETRY_SECONDS = (1.0, 4.0, 16.0)
POLL_SECONDS = (0.01, 1.0)
PATIENCE_SECONDS, PATIENCE = 120.0, 10.0
"""How long rank 0 waits for the other ranks' parts: so long, or so many times as long as its own part took."""


class KeepBest(Config):
    """Which checkpoint is the best: by a metric of the held-out validation."""

    metric: str = Field(description="name of the metric")
    goal: Literal["min", "max"] = Field("min", description="whether less or more of it is better")


class Canceled(Exception):
    """A checkpoint that is no longer wanted."""


@dataclass
class CheckpointStore:
    """The checkpoints under `uri`; of those committed the newest `keep` are kept, and the `best` so far.

    `before_commit` is called by rank 0 right before a manifest is written, and raises where this process may no longer
    write one.
    """

    uri: str
    keep: int = 2
    best: KeepBest | None = None
    before_commit: Callable[[], None] = lambda: None
    damaged: set[str] = field(default_factory=set)
    """Names of those that were passed over; they are deleted when there is a newer one."""

    _deleted: set[str] = field(default_factory=set)

    def names(self) -> list[str]:
        """Of the committed checkpoints, newest first."""
        keys = (entry.key for entry in open_storage(self.uri).list())
        folders = {key.split("/")[0] for key in keys if key.endswith(f"/{artifacts.MANIFEST}")}
        return sorted((name for name in folders if NAME.fullmatch(name)), reverse=True)

    def fault(self, name: str, *, rank: int, world_size: int) -> str | None:
        """What is wrong with this rank's share of a checkpoint's files, by their sha256; None if nothing is.

        All ranks together look at every file.
        """
        uri = join(self.uri, name)
        try:
            manifest = artifacts.read_manifest(uri)
        except ManifestError as error:
            return str(error)
        if manifest is None:
            return f"{uri}: has no {artifacts.MANIFEST} anymore"
        storage = open_storage(uri)
        faults = (artifacts.file_fault(storage, file) for file in manifest.files[rank::world_size])
        return next((fault for fault in faults if fault), None)

    def open(self, name: str) -> Checkpoint:
        """A committed checkpoint. Raises ManifestError if it is damaged or not there."""
        uri = join(self.uri, name)
        manifest = artifacts.read_manifest(uri)
        if manifest is None:
            raise ManifestError(f"{uri}: no {artifacts.MANIFEST} here, so nothing was committed")
        return Checkpoint(open_storage(uri), [file.path for file in manifest.files])

    def rewind(self, samples_seen: int) -> None:
        """Delete what is newer than `samples_seen`, or all but the oldest intact one if all are."""
        intact = [name for name in self.names() if name not in self.damaged]
        kept = [name for name in intact if samples_of(name) <= samples_seen]
        self._delete_all_but(set(kept or intact[-1:]))

    def delete(self, name: str) -> None:
        """Delete a checkpoint, if it is there."""
        storage = open_storage(self.uri)
        storage.delete(f"{name}/{artifacts.MANIFEST}")  # first, so that no half of one is taken for damaged
        storage.delete_all(f"{name}/")
        self._deleted.add(name)  # some S3 servers go on listing its folder

    def clear(self) -> None:
        """Delete what attempts that were cut off left: everything that is not committed."""
        self._delete_all_but(set(self.names()))

    def put(
        self,
        name: str,
        snapshot: Snapshot,
        *,
        rank: int,
        world_size: int,
        metrics: Mapping[str, float],
        canceled: threading.Event,
    ) -> None:
        """Put this rank's part in place; rank 0 then waits for the others' and commits. Every rank calls it.

        A storage that cannot be reached, or is full, is tried again some times. Raises OSError where it failed, here or
        (on rank 0) at another rank, and Canceled once `canceled` is set; rank 0 then deletes what is there of it.
        """
        storage = open_storage(join(self.uri, name))
        begun = time.monotonic()
        try:
            insisting(lambda: _put_part(storage, snapshot, rank=rank), canceled=canceled)
            if rank == 0:
                patience = max(PATIENCE_SECONDS, PATIENCE * (time.monotonic() - begun))
                self._commit_all(storage, name, world_size, metrics, patience=patience, canceled=canceled)
        except OSError as error:
            with suppress(OSError):  # it was worth a try; rank 0 does not wait forever
                if rank:
                    storage.write(f"{FAILED}{rank}", f"rank {rank}: {error}".encode())
                elif not artifacts.read_manifest(storage.uri, check_files=False):
                    storage.delete_all()  # there may be no room for the next one beside it
            raise

    def _commit_all(
        self,
        storage: Storage,
        name: str,
        world_size: int,
        metrics: Mapping[str, float],
        *,
        patience: float,
        canceled: threading.Event,
    ) -> None:
        """Wait for the other ranks' parts, commit them, and delete what is not to be kept."""
        until = time.monotonic() + patience
        insisting(lambda: _wait_for_parts(storage, world_size, until=until, canceled=canceled), canceled=canceled)
        insisting(lambda: self._commit(name, world_size=world_size, metrics=metrics), canceled=canceled)
        try:
            insisting(self._thin_out, canceled=canceled)
        except OSError as error:  # this one is there; the next one tries again
            print(f"{self.uri}: old checkpoints could not be deleted: {error}", flush=True)

    def _commit(self, name: str, *, world_size: int, metrics: Mapping[str, float]) -> None:
        uri = join(self.uri, name)
        if artifacts.read_manifest(uri, check_files=False):
            return  # an earlier try did it, and only its answer was lost
        identity = {"checkpoint": name}
        target = Artifact(kind="checkpoint", uri=uri, fingerprint=artifacts.fingerprint(identity))
        self.before_commit()
        parts = [_part(rank) for rank in range(world_size)]
        artifacts.commit(target, parts=parts, identity=identity, config={}, inputs={}, metrics=metrics)

    def _thin_out(self) -> None:
        """Delete all but the newest intact ones and the best; other ranks may have begun the next already."""
        intact = [name for name in self.names() if name not in self.damaged]
        begun = {name for name in open_storage(self.uri).folders() if name > max(intact, default="")} - self.damaged
        kept = begun | set(intact[: self.keep])
        if self.best is not None and (best := self._best(intact, self.best)):
            kept.add(best)
        self._delete_all_but(kept)

    def _best(self, names: list[str], best: KeepBest) -> str | None:
        """The first one with the best value: later ones may carry on the value of the same validation."""
        values: dict[str, float] = {}
        for name in reversed(names):
            manifest = artifacts.read_manifest(join(self.uri, name), check_files=False)
            if manifest is not None and best.metric in manifest.metrics:
                values[name] = manifest.metrics[best.metric] * (1 if best.goal == "min" else -1)
        return min(values, key=lambda name: values[name], default=None)

    def _delete_all_but(self, kept: set[str]) -> None:
        storage = open_storage(self.uri)
        for name in list(storage.folders()):
            if name not in kept | self._deleted:
                self.delete(name)


def name_of(samples_seen: int, *, attempt: int, count: int) -> str:
    """The name of a checkpoint; those of one training sort by their age.

    `attempt` (ms since 1970 when the attempt began) and `count` (of checkpoints before it) make it one that no other
    write has: what a process that is still alive by mistake puts in place is never taken for a part of it.
    """
    return f"{samples_seen:015d}-{attempt:012x}-{count:06d}"


def samples_of(name: str) -> int:
    """The samples seen of a checkpoint, by its name."""
    match = NAME.fullmatch(name)
    assert match, "one of our own names"
    return int(match[1])


def _part(rank: int) -> str:
    return f"rank-{rank:05d}"


def _put_part(storage: Storage, snapshot: Snapshot, *, rank: int) -> None:
    key = f"{_part(rank)}.safetensors"
    with storage.writing(key) as path:
        size, sha256 = snapshot.write(path)
    artifacts.mark_part(storage, _part(rank), [FileEntry(path=key, size=size, sha256=sha256)], {})


def _wait_for_parts(storage: Storage, world_size: int, *, until: float, canceled: threading.Event) -> None:
    """Return when all ranks have put their parts in place. Raises OSError if one says that it failed, or is late."""
    pause, longest = POLL_SECONDS
    while True:
        keys = [entry.key for entry in storage.list()]
        if failed := next((key for key in keys if key.startswith(FAILED)), None):
            raise OSError(storage.read(failed).decode())
        there = sum(key.startswith(artifacts.PARTS) for key in keys)
        if there == world_size:
            return
        if time.monotonic() > until:
            raise OSError(f"{storage.uri}: {world_size - there} of {world_size} ranks did not put their parts in place")
        if canceled.wait(pause):
            raise Canceled
        pause = min(2 * pause, longest)


def insisting(action: Callable[[], T], *, canceled: threading.Event) -> T:
    """The action's result, tried again after pauses where the storage cannot be reached, is full or keeps failing."""
    for pause in RETRY_SECONDS:
        try:
            return action()
        except OSError as error:
            if not may_pass(error):
                raise
            if canceled.wait(pause):
                raise Canceled from None
    return action()
