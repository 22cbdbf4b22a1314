"""Systems: trained parts joined to something that draws pictures of conditions. One file for each kind.

The config of a kind has `roles()`, the parts that it takes; `check(parts)`, what the system promises in `meta`, which
raises ValueError for parts that do not fit one another; and `load(parts, device=...)`, the `System`. A new kind is a
file with such a config and system, and an entry in `SystemConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Tag, TypeAdapter
from torch import Tensor

from genpipe.artifacts import Artifact, ManifestError, fetch, read_manifest
from genpipe.config import by_kind
from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import Drawing
from genpipe.generation.released import Opened, open_system
from genpipe.generation.systems.latent import LatentConfig
from genpipe.generation.systems.pixel import PixelConfig
from genpipe.generation.systems.unclip import UnclipConfig
from genpipe.lineage import check_lineage, check_made_from

__all__ = ["Conditions", "System", "SystemConfig", "check_system", "load_released", "load_system"]

RELEASE = "release"
"""The kind of artifact that is a system in a folder of its own (`generation.released`)."""

AnyConfig = UnclipConfig | LatentConfig | PixelConfig
SystemConfig = Annotated[
    Annotated[UnclipConfig, Tag("unclip")]
    | Annotated[LatentConfig, Tag("latent")]
    | Annotated[PixelConfig, Tag("pixel")],
    by_kind("unclip"),
]


class System(Drawing, Protocol):
    """Trained parts with their samplers, loaded: from conditions to pictures."""

    conditioned_on: frozenset[str]
    """What it must be told of each picture: some of "text" and "label"."""

    classes: tuple[str, ...]
    """The names of its classes, in the order of their labels; none unless it is conditioned on labels."""

    size: int
    """Side of its pictures, in pixels."""

    def sample(self, conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        """Pictures fp32 [B, 3, size, size] in [-1, 1]; the same conditions and seed give the same pictures."""
        ...


def check_system(cfg: AnyConfig, parts: Mapping[str, Artifact]) -> dict[str, Any]:
    """What a system of these parts promises in `meta`: kind, size, conditioned_on, and classes where it has some.

    Raises ValueError for parts that were not made for one another, by their fingerprints and sizes.
    """
    check_lineage(parts)
    return {"kind": cfg.kind, **cfg.check(parts)}


def load_system(artifact: Artifact, *, device: torch.device) -> System:
    """A committed system, or a release of one, with its parts in memory.

    Raises ManifestError if it is not there, and ValueError if its parts hold other content than it was made from.
    """
    if artifact.kind == RELEASE:
        return load_released(fetch(artifact), device=device)
    manifest = read_manifest(artifact.uri)
    if manifest is None:
        raise ManifestError(f"{artifact.uri}: no manifest.json here, so nothing was committed")
    check_made_from({**manifest.inputs, "system": manifest.artifact})
    return _loaded(Opened(manifest.config["model"], manifest.inputs), device=device)


def load_released(folder: Path, *, device: torch.device) -> System:
    """The system of a release's folder. Raises ManifestError where it holds none."""
    return _loaded(open_system(folder), device=device)


def _loaded(opened: Opened, *, device: torch.device) -> System:
    adapter: TypeAdapter[AnyConfig] = TypeAdapter(SystemConfig)
    return adapter.validate_python(opened.model).load(opened.parts, device=device)
