"""`samples.html` of a release: pictures that its system drew, on a page that needs no server.

The pictures are files beside it, in `samples/`; what is known of them is in the page itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from genpipe.artifacts import Manifest
from genpipe.data.image_files import open_image
from genpipe.evaluation.drawn import Drawings, Drawn

SAMPLES_FILE, PICTURES = "samples.html", "samples"
TEMPLATE, PLACE = "samples.html", "{}/*the data*/"


def write_samples_page(
    folder: Path, drawings: Drawings, *, most: int, training: bool, about: Mapping[str, Any]
) -> None:
    """Write the page and its pictures into `folder`: of each split the first `most`.

    With `training` the training pictures nearest to them, too, where they are known; otherwise the page has only their
    keys. `about` is what it says of the system (`about_system`).
    """
    (folder / PICTURES).mkdir()
    shown = [_picture(folder, drawings, drawn, training=training) for drawn in _first(drawings.pictures, most)]
    text = files("genpipe.release").joinpath(TEMPLATE).read_text(encoding="utf-8")
    assert PLACE in text, "where the template takes the data"
    data = json.dumps({**about, "pictures": shown}, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends there
    (folder / SAMPLES_FILE).write_text(text.replace(PLACE, data), encoding="utf-8")


def about_system(title: str, system: Manifest, behind: Iterable[Manifest]) -> dict[str, Any]:
    """What the page says of a system: its title and fingerprint, its parts, and the shards that they learned from."""
    by_fingerprint = {manifest.artifact.fingerprint: manifest for manifest in behind}
    parts = {role: by_fingerprint[artifact.fingerprint] for role, artifact in system.inputs.items()}
    data = [
        manifest.artifact for manifest in by_fingerprint.values() if manifest.artifact.kind in ("shards", "samples")
    ]
    return {
        "title": title,
        "system": system.artifact.fingerprint,
        "parts": [_part(role, manifest) for role, manifest in parts.items()],
        "data": [{"kind": artifact.kind, "fingerprint": artifact.fingerprint} for artifact in data],
    }


def _part(role: str, manifest: Manifest) -> dict[str, str]:
    stage, run_id = manifest.identity["stage"], manifest.run_id
    return {"role": role, "stage": stage, "fingerprint": manifest.artifact.fingerprint, "run": run_id}


def _first(pictures: Sequence[Drawn], most: int) -> list[Drawn]:
    by_split = groupby(pictures, key=lambda drawn: drawn.split)
    return [drawn for _, of_split in by_split for drawn in list(of_split)[:most]]


def _picture(folder: Path, drawings: Drawings, drawn: Drawn, *, training: bool) -> dict[str, Any]:
    """Write a picture's file, and those of its neighbors; what the page knows of it."""
    name = f"{drawn.split}-{drawn.row:06d}"
    neighbors: list[dict[str, Any]] = [
        {"network": neighbor.network, "distance": neighbor.distance, "key": drawings.training_key(drawn.id, which)}
        for which, neighbor in enumerate(drawn.neighbors)
    ]
    if training:
        for which, neighbor in enumerate(neighbors):
            image, neighbor["caption"] = drawings.training(drawn.id, which)
            neighbor["file"] = _write(folder, f"{name}-training-{which}", image)
    return {
        "file": _write(folder, name, drawings.image(drawn.id)),
        "caption": drawn.caption,
        "split": drawn.split,
        "key": drawn.key,
        "seed": drawn.seed,
        "run": drawn.run_id,
        "values": {**drawn.values, **({} if drawn.p is None else {"p": drawn.p})},
        "neighbors": neighbors,
    }


def _write(folder: Path, name: str, image: bytes) -> str:
    """Write a picture as it is stored; its path below the release."""
    path = f"{PICTURES}/{name}.{(open_image(image).format or 'png').lower()}"
    (folder / path).write_bytes(image)
    return path
