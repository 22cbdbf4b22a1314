"""The reconciler on a real Prefect server: of runs that are killed, go on, or ended by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect_server import prefect_server
from toybox import TOYS

from flows import deployments
from flows.reconciler import reconcile
from genpipe.tracking.open_runs import all_open

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent

RUN = """
import sys, time
from pathlib import Path
from flows.pipeline import FLOW_RUN
from genpipe.tracking.recording import pipeline_run
from prefect import flow
from prefect.runtime import flow_run

@flow
def run(store, seconds):
    tags = {FLOW_RUN: str(flow_run.id)}
    there = {"uri": f"sqlite:///{store}/mlflow.db", "store": store, "experiment": "toy"}
    with pipeline_run(**there, name="a run", tags=tags) as opened:
        print(flow_run.id, opened.run_id, flush=True)
        sys.stdin.readline()

run(sys.argv[1], 600)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server"), prefect_home) as url:
        yield url


class Running:
    """A flow run in a process of its own, which ends once it is told to."""

    def __init__(self, store: Path, server: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(store)],
            env=os.environ | {"PREFECT_API_URL": server, "PYTHONPATH": f"{ROOT}:{TOYS}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.flow_run, self.run = self.process.stdout.readline().split()

    def end(self) -> None:
        self.process.communicate("\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def state_of(run: Running) -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(run.flow_run).state_name)  # type: ignore[arg-type]


def test_only_what_died_is_crashed_and_its_record_ended(server: str, tmp_path: Path) -> None:
    """Of a store that is named, and of that of a deployment; a store that is not there harms nothing."""
    (tmp_path / "pictures").mkdir()
    stages = {"shard": {"source": {"kind": "folder", "path": str(tmp_path / "pictures")}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "store": str(tmp_path / "s"), "stages": stages}))
    deployments.deploy(str(tmp_path / "p.yaml"))
    named = tmp_path / "named"
    dead, killed, alive, ended = (Running(store, server) for store in (tmp_path / "s", named, named, named))
    dead.kill()
    killed.kill()
    ended.end()
    found = reconcile([str(named), "/nonexistent/store"])
    assert sorted(found) == sorted([dead.flow_run, killed.flow_run])
    assert [state_of(run) for run in (dead, killed, alive, ended)] == ["Crashed", "Crashed", "Running", "Completed"]
    client = MlflowClient(f"sqlite:///{named}/mlflow.db")
    assert client.get_run(killed.run).info.status == "KILLED"
    assert "is gone" in client.get_run(killed.run).data.tags["genpipe.error"]
    assert client.get_run(alive.run).info.status == "RUNNING"
    assert [run.run_id for run in all_open(str(named))] == [alive.run]
    assert reconcile([str(named)]) == []
    alive.end()
    assert state_of(alive) == "Completed"
    deployments.remove("p")
