"""Toy stages for tests of how stages are run: `toys/stages` become stages of genpipe, here and in every child."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

import genpipe.stages
from genpipe import artifacts, config
from genpipe.artifacts import Artifact
from genpipe.pipeline.spec import StageSpec
from genpipe.stages import load_stage

TOYS = Path(__file__).parent / "toys"
STAGES = ("toy_data", "toy_line", "toy_slow", "toy_end")


def install() -> None:
    """Make the toy stages known to this process and, through PYTHONPATH, to those that it starts."""
    if str(TOYS / "stages") not in genpipe.stages.__path__:
        genpipe.stages.__path__.append(str(TOYS / "stages"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TOYS), os.environ.get("PYTHONPATH")]))


class Toys:
    """Toy stages in one store, tracked in the store's own MLflow."""

    def __init__(self, store: Path) -> None:
        install()
        self.store = str(store)
        self.tracking_uri = f"sqlite:///{store}/mlflow.db"

    def spec(self, stage: str, inputs: dict[str, Artifact] | None = None, **settings: Any) -> StageSpec:
        module, inputs = load_stage(stage), inputs or {}
        cfg = module.Config.model_validate(settings)
        identity = config.resolved(cfg, without=frozenset({"resources"}))
        digest = artifacts.fingerprint(stage, version=module.VERSION, config=identity, inputs=inputs)
        uri = artifacts.artifact_uri(self.store, stage, digest)
        return StageSpec(
            stage=stage,
            config=config.resolved(cfg),
            inputs=inputs,
            target=Artifact(kind=stage, uri=uri, fingerprint=digest, meta=module.agree(cfg, inputs)),
            store=self.store,
            tracking_uri=self.tracking_uri,
            experiment="toys",
        )

    def line(self, data: Artifact, *, samples: int = 80, **settings: Any) -> StageSpec:
        optim = {"kind": "adamw", "lr": 0.05}
        train = {"samples": samples, "global_batch_size": 4, "log_every": 5, "optim": optim, "precision": "fp32"}
        return self.spec("toy_line", {"toy_data": data}, train=train | settings.pop("train", {}), **settings)


def artifact_of(spec: StageSpec) -> Artifact:
    found = artifacts.find(spec.target.uri)
    assert found is not None, f"{spec.stage} is not committed"
    return found


def wait_for(ready: Callable[[], Any], *, seconds: float = 60.0) -> Any:
    """What `ready()` gives once it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"not ready after {seconds} s"
        time.sleep(0.1)
    return found


def survivors(processes: Iterable[psutil.Process], *, seconds: float = 20.0) -> list[str]:
    """The command lines of those processes that are still there after `seconds`."""
    _, alive = psutil.wait_procs(list(processes), timeout=seconds)
    return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
