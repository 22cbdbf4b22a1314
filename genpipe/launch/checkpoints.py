"""Checkpoints in a stage's work folder: committed like artifacts, so that a truncated one is never taken."""

from __future__ import annotations

import tempfile
from pathlib import Path

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.storage import join, open_storage

KEEP_CHECKPOINTS = 2


def save_checkpoint(work: str, folder: Path, *, samples_seen: int) -> None:
    """Commit `folder` as a checkpoint under `work` and delete all but the newest `KEEP_CHECKPOINTS`."""
    uri = join(work, "checkpoints", f"{samples_seen:015d}")
    identity = {"samples_seen": samples_seen}
    open_storage(uri).delete(artifacts.MANIFEST)  # of a damaged one that was passed over
    target = Artifact(kind="checkpoint", uri=uri, fingerprint=artifacts.fingerprint(identity))
    artifacts.commit(target, folder=folder, identity=identity, config={}, inputs={}, metrics={})
    storage = open_storage(work)
    for old in _checkpoints(work)[:-KEEP_CHECKPOINTS]:
        storage.delete_all(f"checkpoints/{old}/")


def latest_checkpoint(work: str) -> Path | None:
    """The newest checkpoint under `work` whose hashes hold, as a local copy; damaged ones are skipped."""
    for name in reversed(_checkpoints(work)):
        uri = join(work, "checkpoints", name)
        try:
            manifest = artifacts.verify(uri)
        except artifacts.ManifestError as error:
            print(f"skipping a damaged checkpoint: {error}", flush=True)
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
