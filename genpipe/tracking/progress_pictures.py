"""The pictures that validation recorded while a stage was trained, in MLflow or in the files of the store."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from genpipe.artifacts import Manifest
from genpipe.storage import join, open_storage
from genpipe.tracking import jsonl

IN_MLFLOW = re.compile(r"images/(?P<name>.+?)[+%]step[+%](?P<step>\d+)[+%].*")
"""What MLflow calls a picture that was logged with a step: `images/NAME+step+STEP+timestamp+...`, `~` for `/`."""
IN_FILES = re.compile(r"images/(?P<name>.+)-(?P<step>\d{12})\.png")


Picture = tuple[str, int, Callable[[], bytes]]
"""Its name, the samples seen, and what reads its file."""


@dataclass(frozen=True)
class Series:
    """The pictures of one name in a stage's run, in the order of the samples that it had been trained on."""

    manifest: Manifest
    name: str
    pictures: dict[int, Callable[[], bytes]] = field(default_factory=dict)
    """By samples seen: what reads the file, a PNG."""


def series_of(manifest: Manifest, *, store: str, tracking_uri: str) -> list[Series]:
    """The pictures of the run that made an artifact, by name; none where nothing was recorded, or it is gone.

    Raises ValueError where MLflow does not answer.
    """
    found: dict[str, Series] = {}
    for name, step, read in (*_kept(manifest, store), *_recorded(manifest, tracking_uri)):
        found.setdefault(name, Series(manifest, name)).pictures[step] = read
    return [Series(manifest, name, dict(sorted(of.pictures.items()))) for name, of in sorted(found.items())]


def _kept(manifest: Manifest, store: str) -> list[Picture]:
    """Those of the store's own records."""
    storage = open_storage(join(store, "runs", manifest.artifact.name))
    matches = (IN_FILES.fullmatch(entry.key) for entry in storage.list())
    return [(each["name"], int(each["step"]), partial(storage.read, each[0])) for each in matches if each]


def _recorded(manifest: Manifest, tracking_uri: str) -> Iterator[Picture]:
    if not manifest.run_id or tracking_uri == jsonl.URI:
        return
    from mlflow.exceptions import MlflowException

    from genpipe.tracking.store import check, client_of

    check(tracking_uri)
    client = client_of(tracking_uri)
    try:
        files = client.list_artifacts(manifest.run_id, "images")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return
    for file in files:
        match = IN_MLFLOW.fullmatch(file.path)
        if match and file.path.endswith(".png"):
            read = partial(_read, tracking_uri, manifest.run_id, file.path)
            yield match["name"].replace("~", "/"), int(match["step"]), read


def _read(tracking_uri: str, run_id: str, path: str) -> bytes:
    from genpipe.tracking.store import client_of

    with tempfile.TemporaryDirectory() as folder:
        return Path(client_of(tracking_uri).download_artifacts(run_id, path, folder)).read_bytes()
