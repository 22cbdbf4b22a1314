"""Whether a release is what was made: every file by its sha256, and the grid by drawing it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError

from genpipe.artifacts import MANIFEST, Manifest, ManifestError, added_files, damaged_files, fetch, read_manifest
from genpipe.generation.systems import RELEASE, load_released
from genpipe.release.grid import draw_grid
from genpipe.release.record import GRID_FILE, RECORD_FILE, ReleaseRecord, machine_of


@dataclass(frozen=True)
class Verdict:
    """What was found. `largest` and `mean` are absolute differences of the grid's pixels, in levels of 0 to 255.

    Both are None, and `fault` says why, where the grid could not be drawn or compared.
    """

    files: int
    damaged: tuple[str, ...]
    elsewhere: tuple[str, ...]  # what differs between the machine that drew the grid and this one
    largest: int | None = None
    mean: float | None = None
    fault: str = ""

    def holds(self, *, tolerance: float) -> bool:
        """Whether every file is as it was made, and no pixel of the grid differs by more than `tolerance` levels."""
        return not self.damaged and self.largest is not None and self.largest <= tolerance


def verify(uri: str, *, device: torch.device) -> Verdict:
    """Hash every file of the release at `uri`, and draw its grid once more.

    Raises ManifestError where no release is, or where its manifest is damaged.
    """
    manifest = read_manifest(uri, check_files=False)
    if manifest is None:
        raise ManifestError(f"{uri}: no {MANIFEST} here, so it is not a release, or not the whole of one")
    if manifest.artifact.kind != RELEASE:
        raise ManifestError(f"{uri}: is an artifact of kind {manifest.artifact.kind}, not a release")
    damaged = (*damaged_files(uri), *added_files(manifest, uri))
    try:
        folder = fetch(manifest.artifact)
        record = ReleaseRecord.model_validate_json((folder / RECORD_FILE).read_text("utf-8"))
    except (OSError, ValidationError, ManifestError) as error:
        return Verdict(len(manifest.files), damaged, (), fault=f"{RECORD_FILE} cannot be read: {error}")
    damaged = (*damaged, *_disagreeing(manifest, record))
    here, there = machine_of(device), record.machine
    pairs = ((there.hardware, here.hardware), (f"torch {there.torch}", f"torch {here.torch}"))
    elsewhere = tuple(f"{then} then, {now} now" for then, now in pairs if then != now)
    try:
        largest, mean = _difference(folder, record, device)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Verdict(len(manifest.files), damaged, elsewhere, fault=f"the grid cannot be drawn: {error}")
    return Verdict(len(manifest.files), damaged, elsewhere, largest, mean)


def _disagreeing(manifest: Manifest, record: ReleaseRecord) -> list[str]:
    """A sentence for each file of which the two lists do not say the same."""
    listed = {file.path: file.sha256 for file in manifest.files if file.path != RECORD_FILE}
    return [
        f"{path}: {RECORD_FILE} and {MANIFEST} name other contents"
        for path in sorted(listed.keys() | record.files.keys())
        if listed.get(path) != record.files.get(path)
    ]


def _difference(folder: Path, record: ReleaseRecord, device: torch.device) -> tuple[int, float]:
    """The largest and the mean absolute difference between the grid as it lies there and as it is drawn now."""
    with Image.open(folder / GRID_FILE) as picture:
        kept = np.asarray(picture.convert("RGB")).astype(np.int16)
    drawn = draw_grid(load_released(folder, device=device), record.grid, device=device).astype(np.int16)
    if kept.shape != drawn.shape:
        raise ValueError(f"{GRID_FILE} is {kept.shape[1]} x {kept.shape[0]} pixels, not as it was recorded")
    difference = np.abs(kept - drawn)
    return int(difference.max()), float(difference.mean())
