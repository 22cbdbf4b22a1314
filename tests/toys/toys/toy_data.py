"""A data stage: each part is a file of points on a line with noise."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genpipe.artifacts import Artifact, Role
from genpipe.stage_config import StageConfig

VERSION = 1
MAKES = "toy_data"
HEADLINES = ("samples",)


class Config(StageConfig):
    parts: int = 3
    slope: float = 2.0
    seconds: float = 0.0
    fail: str = ""
    die_once: str = ""
    deadly: str = ""
    wait_while: str = ""


def roles(cfg: Config) -> dict[str, Role]:
    return {}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    return {"width": 1}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    return [f"part-{n}" for n in range(cfg.parts)]


class Worker:
    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        time.sleep(self.cfg.seconds)
        while self.cfg.wait_while and os.path.exists(self.cfg.wait_while):
            time.sleep(0.1)
        if self.cfg.fail == part:
            raise ValueError(f"{part} cannot be read; replace the file")
        if self.cfg.deadly == part:
            os.kill(os.getpid(), 9)
        if self.cfg.die_once and not Path(self.cfg.die_once).exists():
            Path(self.cfg.die_once).touch()
            os.kill(os.getpid(), 9)
        x = np.random.default_rng(int(part.split("-")[1])).normal(size=100).astype(np.float32)
        np.save(out / f"{part}.npy", np.stack([x, self.cfg.slope * x], axis=1))
        return {"samples": len(x), "pid": os.getpid()}


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    Image.new("RGB", (8, 8), "red").save(out / "preview.png")
    return {"samples": sum(r["samples"] for r in results)}, {"samples": float(sum(r["samples"] for r in results))}
