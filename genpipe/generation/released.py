"""A system in a folder of its own: `system.yaml` says how it draws and which folders below it hold its parts.

Nothing in the folder names anything outside of it, so it draws wherever it is copied to.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError

from genpipe.artifacts import ASIDE, Artifact, ManifestError, fetch, read_manifest
from genpipe.config import Config
from genpipe.storage import check_key

SYSTEM_FILE = "system.yaml"
PARTS = "parts"
LINE = 118


class ReleasedSystem(Config):
    """What `system.yaml` holds. The URIs of the parts are paths relative to it."""

    format: int = 1
    model: dict[str, Any] = Field(description="the system's kind and its samplers, as the stage system has them")
    parts: dict[str, Artifact] = Field(description="by role")


class Opened(NamedTuple):
    """A released system as it is loaded: its settings, and its parts where they are."""

    model: dict[str, Any]
    parts: dict[str, Artifact]


def copy_system(model: Mapping[str, Any], parts: Mapping[str, Artifact], folder: Path) -> None:
    """Write `system.yaml` and copies of the parts into `folder`.

    Their pictures, which are made for people, stay behind, and so does what lies aside, which nothing draws with.

    Raises ManifestError for a part that is not committed.
    """
    released: dict[str, Artifact] = {}
    for role, artifact in parts.items():
        manifest = read_manifest(artifact.uri)
        if manifest is None:
            raise ManifestError(f"{artifact.uri}: the system's {role} is not committed (any more); make it again")
        source, path = fetch(artifact), f"{PARTS}/{role}"
        for file in manifest.files:
            if not file.path.endswith(".png") and not file.path.startswith(ASIDE):
                target = folder / path / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file.path, target)
        released[role] = artifact.model_copy(update={"uri": path})
    record = ReleasedSystem(model=dict(model), parts=released).model_dump(mode="json")
    text = yaml.safe_dump(record, sort_keys=False, default_flow_style=None, width=LINE, allow_unicode=True)
    (folder / SYSTEM_FILE).write_text(text, encoding="utf-8")


def open_system(folder: Path) -> Opened:
    """The settings and parts of a system that `copy_system` wrote.

    Raises ManifestError where there is none, or where its file is damaged.
    """
    path = folder / SYSTEM_FILE
    try:
        record = ReleasedSystem.model_validate(yaml.safe_load(path.read_text("utf-8")))
        places = {role: folder / check_key(part.uri) for role, part in record.parts.items()}
    except FileNotFoundError:
        raise ManifestError(f"{path}: is missing; copy the whole release again") from None
    except (ValueError, ValidationError, yaml.YAMLError) as error:
        raise ManifestError(f"{path}: is damaged ({error}); copy the release again") from None
    parts = {role: part.model_copy(update={"uri": str(places[role])}) for role, part in record.parts.items()}
    return Opened(record.model, parts)
