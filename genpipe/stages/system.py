"""system: trained parts joined to something that draws pictures, with the samplers that it draws with.

A data stage of one part. The artifact holds no weights: its inputs are its parts, and `system.json` names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from genpipe.artifacts import Artifact, Role
from genpipe.generation.systems import SystemConfig, check_system
from genpipe.generation.systems.unclip import UnclipConfig
from genpipe.lineage import check_made_from, clips_behind, content_digest
from genpipe.stage_config import StageConfig

VERSION = 2
MAKES = "system"
HEADLINES = ("size", "parts")

FILE = "system.json"


class Config(StageConfig):
    """Which kind of system, and its samplers."""

    model: SystemConfig = Field(UnclipConfig(), description="the kind of system, and its samplers")


def roles(cfg: Config) -> dict[str, Role]:
    """The parts of a system of this kind."""
    return cfg.model.roles()


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The system's kind, size, conditions and classes, the fingerprints of its parts and of the CLIPs behind them.

    Raises ValueError for parts that were not made for one another.
    """
    fingerprints = {role: artifact.fingerprint for role, artifact in inputs.items()}
    return {**check_system(cfg.model, inputs), "parts": fingerprints, "clips": sorted(clips_behind(*inputs.values()))}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """One: the whole."""
    return ["system"]


class Worker:
    """Compares what the parts were made from with what is here, and writes `system.json`."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg, self.inputs = cfg, inputs

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """The content digest of each part. Raises ValueError if one was made from another content of the others."""
        check_made_from(self.inputs)
        digests = {role: content_digest(artifact) for role, artifact in self.inputs.items()}
        record = {
            **check_inputs(self.cfg, self.inputs),
            "model": self.cfg.model.model_dump(mode="json"),
            "made_from": digests,
        }
        (out / FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        return {"made_from": digests}


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The system's meta, with the content digests of its parts."""
    meta = {**check_inputs(cfg, inputs), **results[0]}
    return meta, {"size": float(meta["size"]), "parts": float(len(inputs))}
