"""The parts of a release as diffusers and transformers load them."""

from __future__ import annotations

from pathlib import Path


def write_elsewhere(folder: Path) -> dict[str, str]:
    """Write `diffusers/` into a release; where each part is found there, or why it is not."""
    return {}
