"""The server that a run starts for itself: it ends with the run, and what a killed run left is told to the next one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from toy_project import Project
from toybox import survivors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent.parent


def test_a_home_that_cannot_be_written_is_named(project: Project) -> None:
    project.environment["HOME"] = "/nonexistent"
    del project.environment["PREFECT_HOME"]
    code, output = project.run(stage="toy_data")
    assert code == 2, output
    for named in ("PREFECT_HOME", "/nonexistent/.prefect", "HOME, which is /nonexistent"):
        assert named in output


@pytest.mark.parametrize(("wrong", "named"), [("newer", "is of a newer Prefect than"), ("damaged", "cannot be read")])
def test_a_database_on_which_no_server_starts_is_named(project: Project, wrong: str, named: str) -> None:
    path = Path(project.environment["PREFECT_HOME"], "prefect.db")
    if wrong == "newer":
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    else:
        path.write_bytes(b"no database" * 1000)
    code, output = project.run(stage="toy_data")
    assert code == 2 and f"PREFECT_HOME: the database {path} {named}" in output, output


def test_a_server_that_does_not_start_ends_the_run(project: Project) -> None:
    """It is given less time than its imports take."""
    project.environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "1"
    code, output = project.run(stage="toy_data")
    assert code == 2 and "Prefect's own server does not start" in output and "PREFECT_API_URL" in output, output
    assert not project.store.joinpath("artifacts").exists()


FLOW = """
import time
from flows import server
from prefect import flow, task
from prefect.runtime import flow_run
from prefect.client.orchestration import get_client

@task
def endless_task(id):
    with get_client(sync_client=True) as client:
        while not client.read_task_runs():  # its server hears of tasks with a delay
            time.sleep(0.2)
    print(id, flush=True)
    time.sleep(600)

@flow
def endless():
    endless_task(flow_run.id)

server.start()
endless()
"""
OUTLIVING = """
import sys, time
from pathlib import Path
from flows import server
from prefect import flow, task
from prefect.client.orchestration import get_client

@task
def patient(go):
    with get_client(sync_client=True) as client:
        while not client.read_task_runs():  # its server hears of tasks with a delay
            time.sleep(0.2)
    print("waiting", flush=True)
    while not Path(go).exists():
        time.sleep(0.2)

@task
def after():
    return 2

@flow
def outliving(go):
    patient(go)
    return after()

server.start()
print(outliving(sys.argv[1]), flush=True)
server.settle()
"""
NEXT = """
import sys
from flows import server
from prefect.client.orchestration import get_client

server.start()
for _ in range(2):
    server.crash_flow_runs([sys.argv[1], "", "00000000-0000-0000-0000-000000000000"])
with get_client(sync_client=True) as client:
    states = client.read_flow_run_states(sys.argv[1])
    tasks = client.read_task_runs()
print([state.name for state in states][-2:], [task.state.name for task in tasks])
"""


def test_a_killed_run_leaves_no_server_and_the_next_one_tells_that_it_crashed(project: Project, tmp_path: Path) -> None:
    environment = project.environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c"]
    process = subprocess.Popen([*command, FLOW], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    flow_run = process.stdout.readline().strip()
    [server] = psutil.Process(process.pid).children(recursive=True)
    assert "uvicorn" in " ".join(server.cmdline())
    process.kill()
    process.wait()
    assert survivors([server]) == []

    answer = subprocess.run([*command, NEXT, flow_run], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert answer.stdout.strip() == "['Running', 'Crashed'] ['Crashed']", answer.stderr


def test_a_server_that_dies_is_started_again_and_the_flow_goes_on(project: Project, tmp_path: Path) -> None:
    go = tmp_path / "go"
    command = [sys.executable, "-c", OUTLIVING, str(go)]
    flow = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=project.environment)
    assert flow.stdout is not None and "waiting" in flow.stdout.readline()
    children = psutil.Process(flow.pid).children(recursive=True)
    [server] = [process for process in children if any("create_app" in word for word in process.cmdline())]
    server.kill()
    go.touch()
    assert flow.stdout.read().strip() == "2"
    assert flow.wait(timeout=60) == 0
    assert not survivors(children)
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as database:
        assert database.execute("select state_type from task_run").fetchall() == [("COMPLETED",)] * 2
        assert database.execute("select state_type from flow_run").fetchall() == [("COMPLETED",)]
