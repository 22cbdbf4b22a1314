"""Deployments on a real Prefect server that outlives the command, with a worker, and a Ray head of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect_server import prefect_server
from rich.console import Console
from toy_project import Project
from toybox import TOYS, wait_for

from flows import deployments
from genpipe.config import ConfigError
from genpipe.launch.jobs import connect
from genpipe.launch.local_ray import TUNING, local_head
from genpipe.pipeline.curves import KeptCurves, kept_text
from genpipe.pipeline.graph import load_pipeline

ROOT = Path(__file__).parent.parent.parent
GENPIPE = Path(sys.executable).with_name("genpipe")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server"), prefect_home) as url:
        yield url


def pipeline(folder: Path, **settings: Any) -> Path:
    path = folder / "emoji.yaml"
    stages = {"shard": {"source": {"kind": "folder", "path": str(folder / "pictures")}}}
    path.write_text(yaml.safe_dump({"name": "emoji", "store": str(folder / "store"), "stages": stages} | settings))
    return path


@pytest.mark.slow
def test_a_deployment_is_made_listed_changed_and_removed(server: str, tmp_path: Path) -> None:
    path = pipeline(tmp_path)
    made = deployments.deploy(str(path), ["stages.shard.split_seed=3"], cron="0 3 * * *", timezone="Europe/Berlin")
    assert (made.name, made.pool, made.paused) == ("emoji", "genpipe", False)
    assert made.schedule == "0 3 * * * Europe/Berlin"
    published = yaml.safe_load(Path(made.config).read_text())
    assert published["stages"]["shard"]["split_seed"] == 3 and published["store"] == str(tmp_path / "store")
    path.unlink()  # what was deployed no longer needs it
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("genpipe/emoji")
        [reconciler] = [each for each in client.read_deployments() if each.name == "reconciler"]
    assert found.global_concurrency_limit is not None and found.global_concurrency_limit.limit == 1
    assert [each.schedule.interval.total_seconds() for each in reconciler.schedules] == [300]
    assert load_flow_from_entrypoint(reconciler.entrypoint).name == "genpipe-reconciler"

    assert deployments.pause("emoji").paused
    assert [each.paused for each in deployments.deployments()] == [True]
    changed = deployments.deploy(str(pipeline(tmp_path)), cron="30 4 * * *", overlap="skip")
    assert (changed.schedule, changed.paused) == ("30 4 * * * UTC", False)
    assert changed.config != made.config

    deployments.remove("emoji")
    assert deployments.deployments() == []
    with get_client(sync_client=True) as client:
        assert client.read_deployments() == [], "the reconciler goes with the last one"
    with pytest.raises(ValueError, match="no deployment is named 'emoji'"):
        deployments.pause("emoji")


@pytest.mark.slow
def test_runs_of_a_schedule_are_made_by_the_server(server: str, tmp_path: Path) -> None:
    deployments.deploy(str(pipeline(tmp_path)), cron="0 3 * * *", timezone="UTC")
    [found] = wait_for(lambda: [each for each in deployments.deployments() if each.next_run])
    assert (found.next_run.hour, found.next_run.minute) == (3, 0)
    deployments.remove("emoji")


@pytest.mark.slow
def test_prefects_own_command_deploys_from_a_checkout(server: str, tmp_path: Path) -> None:
    said = Console(file=StringIO())
    found, actions = _load_deploy_configs_and_actions(ROOT / "prefect.yaml", console=said)
    assert said.file.getvalue() == "" and actions["pull"]  # type: ignore[attr-defined]
    assert [each["name"] for each in found] == ["demo", "reconciler"]
    with get_client(sync_client=True) as client:
        deployments._make_pool(client, "genpipe")
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            env=os.environ | {"PREFECT_API_URL": server, "GENPIPE_CHECKOUT": str(ROOT), "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made = {each.name: each for each in client.read_deployments()}
        [demo] = deployments.deployments()
        assert (demo.name, demo.config, demo.pool) == ("demo", "configs/pipeline/demo.yaml", "genpipe")
        for name, flow in {"demo": "genpipe", "reconciler": "genpipe-reconciler"}.items():
            assert load_flow_from_entrypoint(made[name].entrypoint).name == flow
            assert made[name].pull_steps == [
                {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
            ]
    deployments.remove("demo")


@pytest.mark.slow
def test_held_out_curves_go_along(server: str, tmp_path: Path) -> None:
    kept = {"line": KeptCurves(likeness="0", curves={"1": {100: {"loss": 0.5}}})}
    (tmp_path / "curves.json").write_text(kept_text(kept))
    made = deployments.deploy(str(pipeline(tmp_path, curves="curves.json")))
    (tmp_path / "curves.json").unlink()
    assert load_pipeline(made.config).curves == kept
    deployments.remove("emoji")


@pytest.mark.slow
def test_a_path_that_means_another_place_on_a_worker_is_refused(server: str, tmp_path: Path) -> None:
    path = pipeline(tmp_path, store="store")
    with pytest.raises(ConfigError, match=r"emoji\.yaml: store: .* s3://"):
        deployments.deploy(str(path))


def test_what_keeps_a_deployment_from_being_made_is_a_sentence(tmp_path: Path) -> None:
    path = pipeline(tmp_path)
    with pytest.raises(ValueError, match="Invalid cron string"):
        deployments.deploy(str(path), cron="at three")
    absent = "http://127.0.0.1:9/api"
    with (
        temporary_settings({PREFECT_API_URL: absent}),
        pytest.raises(ValueError, match=f"no Prefect server at {absent}"),
    ):
        deployments.deploy(str(path))
    assert not (tmp_path / "store").exists()


def test_without_a_server_there_is_a_sentence(tmp_path: Path) -> None:
    path = pipeline(tmp_path)
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(ValueError, match="PREFECT_API_URL"):
        deployments.deploy(str(path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_runs_a_deployment_and_a_cancel_stops_its_job(
    server: str, tmp_path: Path, prefect_home: Path, mlflow_tables: Path
) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with local_head(os.environ | TUNING | {"PATH": path, "PYTHONPATH": str(TOYS)}) as head:
        project = Project(tmp_path, prefect_home, mlflow_tables, ray={"address": head.address})
        project.make_data()
        environment = project.environment | {
            "PREFECT_API_URL": server,
            "PYTHONPATH": f"{TOYS}:{os.environ.get('PYTHONPATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": head.token,
        }
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "genpipe", "--type", "process"],
            env=environment | {"PREFECT_WORKER_QUERY_SECONDS": "1"},  # between two looks for runs; ten otherwise
            stdout=(tmp_path / "worker").open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            genpipe(environment, "deploy", str(project.config))
            first = end_of(genpipe(environment, "deploy", "--now", "toy").split()[-1])
            assert first.state_name == "Completed", (tmp_path / "worker").read_text()
            made = sorted(project.store.glob("artifacts/*/*/manifest.json"))
            assert len(made) == 4
            before = {manifest: manifest.stat().st_mtime_ns for manifest in made}
            assert end_of(deployments.start("toy")).state_name == "Completed"
            assert {manifest: manifest.stat().st_mtime_ns for manifest in made} == before, "nothing is made again"

            slow = ["stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=4000"]
            genpipe(environment, "deploy", str(project.config), *slow)
            with get_client(sync_client=True) as client:
                run = client.read_flow_run(deployments.start("toy"))
                ray = connect(head.address, token=head.token)
                wait_for(lambda: "toy_line" in running(ray))
                client.set_flow_run_state(run.id, Cancelling(), force=True)  # what the page's button does
                begun = datetime.now()
                wait_for(lambda: not running(ray))
                wait_for(lambda: client.read_flow_run(run.id).state_name == "Cancelled")
            print("cancelled after", datetime.now() - begun)
        finally:
            worker.kill()  # an orderly end waits for what Prefect does after a cancel
            worker.wait()


def genpipe(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "genpipe.cli.main", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def end_of(identity: UUID | str) -> FlowRun:
    """A flow run once it has ended."""
    with get_client(sync_client=True) as client:
        wait_for(lambda: _ended(client, identity))
        return client.read_flow_run(identity)  # type: ignore[arg-type]


def _ended(client: SyncPrefectClient, identity: UUID | str) -> bool:
    state = client.read_flow_run(identity).state  # type: ignore[arg-type]
    return state is not None and state.is_final()


def running(ray: Any) -> str:
    return " ".join(job.submission_id for job in ray.list_jobs() if not job.status.is_terminal() and job.submission_id)
