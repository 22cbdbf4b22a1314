"""The data stage of points with a worker that takes three parts at a time, and none before it has three.

It writes what begins and ends, and in which process, to the file `log`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpipe.artifacts import Artifact
from toys import toy_data
from toys.toy_data import HEADLINES, MAKES, VERSION, check_inputs, finalize, parts, roles

__all__ = ["HEADLINES", "MAKES", "VERSION", "Config", "Worker", "check_inputs", "finalize", "parts", "roles"]


class Config(toy_data.Config):
    log: str
    deadly_once: str = ""


class Worker(toy_data.Worker):
    parts_at_once = 3

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        super().__init__(cfg, inputs)
        self.log, self.once = Path(cfg.log), cfg.deadly_once

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        self._write("began", part)
        while self.log.read_text().count("began") < self.parts_at_once:
            time.sleep(0.02)
        once = part == self.once and self.log.read_text().count(f"began {part}\n") == 1
        if once or part == self.cfg.deadly:
            os.kill(os.getpid(), 9)
        stats = super().__call__(part, out)
        self._write("ended", part)
        return stats

    def _write(self, what: str, part: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {what} {part}\n")
