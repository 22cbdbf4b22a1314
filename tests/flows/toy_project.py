"""A pipeline of toy stages that is run as a user does: by a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from toybox import TOYS, Toys

from genpipe.launch.local import run_local

LINE = {
    "train": {"samples": 80, "global_batch_size": 4, "precision": "fp32"},
    "observe": {"log_every": 5},
}


class Project:
    """A pipeline of toys in a folder, with a Prefect home and an MLflow of its own, which begin as copies."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []
    """By all projects: a test that fails leaves its run to `conftest.py`."""

    def __init__(self, folder: Path, prefect_home: Path, mlflow_tables: Path, **settings: object) -> None:
        self.folder = folder
        self.config = folder / "toy.yaml"
        self.store = folder / "store"
        self.output = folder / "output"
        lines = {name: {"kind": f"toys.{name}"} | LINE for name in ("toy_line", "toy_slow", "toy_end")}
        stages = {"toy_data": {"kind": "toys.toy_data", "parts": 2}} | lines
        self.config.write_text(yaml.safe_dump({"name": "toy", "store": str(self.store), "stages": stages} | settings))
        shutil.copytree(prefect_home, folder / "prefect")
        self.store.mkdir()
        shutil.copy(mlflow_tables, self.store / "mlflow.db")
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder / "prefect"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def make_data(self) -> None:
        """Commit `toy_data` beforehand, without Ray, for tests of what comes after it."""
        run_local(Toys(self.store).spec("toy_data", parts=2))

    def start(self, *overrides: str, stage: str = "all") -> subprocess.Popen[bytes]:
        command = [sys.executable, str(TOYS / "run_toys.py"), stage, str(self.config), *overrides]
        process = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, as a terminal gives one to a command
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # even under a `&` of a script
        )
        self.started.append(process)
        return process

    def run(self, *overrides: str, stage: str = "all") -> tuple[int, str]:
        code = self.start(*overrides, stage=stage).wait(550)
        return code, self.output.read_text()

    def mlflow(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.store}/mlflow.db")

    def runs(self, name: str) -> list[Run]:
        """The MLflow runs of a stage, or of the pipeline (`parent`), the newest first."""
        client = self.mlflow()
        experiment = client.get_experiment_by_name("toy")
        if experiment is None:
            return []
        query = f"tags.`genpipe.instance` = '{name}'"
        runs = client.search_runs([experiment.experiment_id], query if name != "parent" else "")
        return [run for run in runs if name != "parent" or "genpipe.instance" not in run.data.tags]

    def progress(self, stage: str) -> list[Path]:
        return list((self.store / "work" / stage).glob("*/progress.json"))


def results(output: str) -> dict[str, str]:
    return dict(re.findall(r"^RESULT (\w+) (\w+)", output, re.MULTILINE))
