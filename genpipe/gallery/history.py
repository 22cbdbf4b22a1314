"""How the parts of a system came to be: the artifacts behind it, and the pictures that their training recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genpipe.artifacts import Artifact
from genpipe.lineage import manifests_behind
from genpipe.pipeline.spec import sqlite_uri
from genpipe.storage import local_path
from genpipe.tracking import jsonl
from genpipe.tracking.progress_pictures import Series, series_of


@dataclass(frozen=True)
class Made:
    """An artifact behind a system: `role` in what was made from it, the stage's kind, and its run in MLflow."""

    role: str
    stage: str
    uri: str
    run_id: str


def behind(system: Artifact) -> list[Made]:
    """The system and all that it was made from, as far as it is there, each once."""
    manifests = manifests_behind(system)[0]
    roles = {artifact.fingerprint: role for manifest in manifests for role, artifact in manifest.inputs.items()}
    return [
        Made(
            roles.get(made.artifact.fingerprint, made.artifact.kind),
            made.identity["stage"],
            made.artifact.uri,
            made.run_id,
        )
        for made in manifests
    ]


def training_pictures(system: Artifact, *, tracking_uri: str = "") -> list[Series]:
    """What validation recorded of every trained artifact behind a system, those nearest to it first.

    The runs are those of the MLflow at `tracking_uri`, by default of the one in each artifact's own store. Raises
    ValueError where it does not answer.
    """
    found: list[Series] = []
    for manifest in manifests_behind(system)[0]:
        store = manifest.artifact.uri.rpartition("/artifacts/")[0]
        if store:
            found += series_of(manifest, store=store, tracking_uri=tracking_uri or _own(store))
    return found


def _own(store: str) -> str:
    """The MLflow of a store: its SQLite file, if it has one."""
    folder = local_path(store)
    database = None if folder is None else Path(folder, "mlflow.db")
    return sqlite_uri(database) if database is not None and database.exists() else jsonl.URI
