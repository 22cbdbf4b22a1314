"""text_encoder: a published text encoder's files to an artifact, so that what is made with it needs nothing else.

A data stage: the parts are the files, each copied by one call of `Worker` and compared with its digest.
`genpipe.models.text_encoders.load_text_encoder` loads the artifact's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from genpipe.artifacts import Artifact, Role
from genpipe.models.text_encoders import CONFIG, TextEncoderConfig, check_network, write_record
from genpipe.pinned_files import copy_pinned
from genpipe.stage_config import StageConfig
from genpipe.storage import join

VERSION = 1
MAKES = "text_encoder"
HEADLINES = ("bytes",)


class Config(StageConfig):
    """Which encoder, and its files."""

    model: TextEncoderConfig = Field(description="the encoder")


def roles(cfg: Config) -> dict[str, Role]:
    """None: it reads files from outside the pipeline."""
    return {}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The width and the greatest length of its encodings."""
    return {"text_width": cfg.model.width, "context_length": cfg.model.context_length}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """The files."""
    return sorted(cfg.model.sha256)


class Worker:
    """A call copies one file. Raises ValueError where its content is not what the configuration asks for."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """The size of file `part` in bytes, after it has been copied to the folder `out`."""
        model = self.cfg.model
        copy_pinned(join(model.folder, part), out / part, sha256=model.sha256[part])
        if part == CONFIG:
            check_network(out, model)
        return {"bytes": (out / part).stat().st_size}


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The encoder's meta and metrics; beside its files stands what they are loaded with."""
    write_record(cfg.model, out)
    return check_inputs(cfg, inputs), {"bytes": float(sum(result["bytes"] for result in results))}
