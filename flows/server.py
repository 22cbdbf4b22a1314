"""The Prefect server that a run starts for itself where none is configured."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
import prefect
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Crashed
from pydantic import SecretStr

if TYPE_CHECKING:
    from prefect.server.api.server import SubprocessASGIServer

RESTART_SECONDS = 1.0
MOST_RESTARTS = 5
"""A server that dies more often in one run cannot work, and its clients are to say so."""
BACK_SECONDS = 60.0

_restarts: list[int] = []
_back = threading.Event()  # not set while a server that died is being started again
_back.set()

ENTRY = """
import os, runpy, sys, threading, time

def watch(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)

threading.Thread(target=watch, args=[int(sys.argv.pop(1))], daemon=True).start()
runpy.run_module("uvicorn", run_name="__main__")
"""


def described() -> str:
    """Which server a run uses."""
    settings = get_current_settings()
    return settings.api.url or f"a local one, with its database in {settings.home}"


def check_home() -> None:
    """Raise ValueError where a server of its own could not use its database, which it would try for minutes."""
    settings = get_current_settings()
    if settings.api.url is not None:
        return
    try:
        settings.home.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=settings.home).close()
    except OSError as error:
        raise ValueError(
            f"PREFECT_HOME: Prefect cannot write its database in {settings.home} ({error}); set PREFECT_HOME to a "
            f"writable folder (its default is .prefect in HOME, which is {os.environ.get('HOME', 'not set')}), or "
            "PREFECT_API_URL to a server"
        ) from None
    url = settings.server.database.connection_url
    address = url.get_secret_value() if isinstance(url, SecretStr) else url or ""
    if address.startswith("sqlite"):
        _check_database(Path(address.partition(":///")[2]))


def _check_database(path: Path) -> None:
    """Raise ValueError where a server would not start on the database: it is damaged, or of a newer Prefect."""
    versions = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = [revision for (revision,) in database.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.OperationalError:  # there is none yet, or it is just made
        return
    except sqlite3.DatabaseError as error:
        raise ValueError(f"PREFECT_HOME: the database {path} cannot be read ({error}); move it away") from None
    if versions.is_dir() and not all(any(versions.glob(f"*_{revision}_*.py")) for revision in found):
        raise ValueError(
            f"PREFECT_HOME: the database {path} is of a newer Prefect than {prefect.__version__}, which is installed "
            "here; set PREFECT_HOME to another folder, install that Prefect, or set PREFECT_API_URL to a server"
        )


def start() -> None:
    """Start a server for this process, unless PREFECT_API_URL names one.

    It does not hear Ctrl-C, and it ends with this process, even if that is killed. One that dies is started again, with
    its port and its database: Prefect's clients wait for it. Raises ValueError if it does not begin to answer.
    """
    from prefect.server.api.server import SubprocessASGIServer  # takes seconds

    if get_current_settings().api.url is None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; ours alone is to unwind
        server = SubprocessASGIServer()
        server._run_uvicorn_command = lambda: _run(server.port)
        ended, stop = threading.Event(), server.stop

        def stop_for_good() -> None:
            ended.set()
            stop()

        server.stop = stop_for_good  # which it has the interpreter call at the end
        try:
            server.start()
        except RuntimeError as error:
            raise ValueError(
                f"Prefect's own server does not start ({error}); `prefect server start` says why, or set "
                "PREFECT_API_URL to a server"
            ) from None
        threading.Thread(target=_keep, args=[server, ended], name="prefect-server-keeper", daemon=True).start()


def settle() -> None:
    """If the server has died, wait until it is back, for a minute at most, and have it told what it missed.

    Prefect's clients send that again with the next event that they send.
    """
    if _restarts and _back.wait(BACK_SECONDS):
        emit_event("genpipe.server.restarted", resource={"prefect.resource.id": f"genpipe.process.{os.getpid()}"})


def _keep(server: SubprocessASGIServer, ended: threading.Event) -> None:
    """Start the server's process again when it has died and nobody has stopped it, `MOST_RESTARTS` times."""
    while len(_restarts) < MOST_RESTARTS and (process := server.server_process) is not None:
        process.wait()
        _back.clear()
        if ended.wait(RESTART_SECONDS):
            return
        print("Prefect's server has died; it is started again", file=sys.stderr, flush=True)
        _restarts.append(process.returncode)
        server.server_process = process = _run(server.port)
        while process.poll() is None and not _answers(server.api_url) and not ended.wait(RESTART_SECONDS):
            pass
        _back.set()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=RESTART_SECONDS).status_code == 200
    except httpx.HTTPError:
        return False


def _run(port: int) -> subprocess.Popen[bytes]:
    """Prefect's own command for its temporary server, in a process that ends with this one."""
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    server = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    uvicorn = ["--factory", "prefect.server.api.server:create_app", "--lifespan", "on", "--log-level", "error"]
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, str(os.getpid()), *uvicorn, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, **server, **settings},
    )


def crash_flow_runs(ids: Sequence[str]) -> None:
    """Tell Prefect of flow runs whose process is gone, and of their tasks.

    Those that ended, or that it does not know, are passed over.
    """
    gone = Crashed(message="its process was killed, or its machine was lost")
    with get_client(sync_client=True) as client:
        for each in ids:
            try:
                flow_run = client.read_flow_run(UUID(each))
            except (ValueError, ObjectNotFound):
                continue
            if flow_run.state is None or not flow_run.state.is_final():
                of_it = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
                for task_run in client.read_task_runs(flow_run_filter=of_it):
                    if task_run.state is None or not task_run.state.is_final():
                        client.set_task_run_state(task_run.id, gone, force=True)
                client.set_flow_run_state(flow_run.id, gone, force=True)
