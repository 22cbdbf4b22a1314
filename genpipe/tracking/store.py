"""Where MLflow keeps its records: a server, a database, or an SQLite file in the store.

MLflow is imported where it is used, because every worker imports this module.
"""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow reads these when it is imported: a silent server is given up after some seconds instead of minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

REACH_SECONDS = 5.0


def check(uri: str) -> None:
    """Make sure that MLflow answers at `uri`, creating an SQLite store that is not there yet.

    Raises ValueError with the remedy after about 5 seconds at most.
    """
    scheme = uri.split(":", 1)[0]
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    elif "://" in uri:
        _check_database(uri)
    else:
        raise ValueError(
            f"tracking.uri: {uri!r} is not an MLflow tracking URI; write http://host:5000, sqlite:///path/mlflow.db "
            "or leave it empty for SQLite in the store"
        )
    from mlflow.exceptions import MlflowException

    try:
        client_of(uri).search_experiments(max_results=1)
    except MlflowException as error:
        raise ValueError(f"tracking.uri: MLflow at {uri} does not work: {first_line(error)}") from error


def serve_ui(uri: str, *, port: int) -> None:
    """Serve MLflow's UI on 127.0.0.1 until interrupted; where `uri` is a server, only say where it is."""
    if uri.startswith("http"):
        print(f"the runs are at {uri}")
        return
    check(uri)
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    subprocess.run([*command, "--backend-store-uri", uri], env=environment, check=True)


@cache
def client_of(uri: str) -> MlflowClient:
    """The client of this process for the MLflow at `uri`."""
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(uri)


def experiment_id_of(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created if need be; files of an SQLite store lie beside it."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        beside = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts"
        location = beside.as_uri() if uri.startswith("sqlite:") else None
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # opens the UI's pages for model training
            return str(client.create_experiment(name, artifact_location=location, tags=kind))
        except MlflowException:  # another process was first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise ValueError(
            f"tracking.experiment: {name!r} was deleted in MLflow; restore it "
            f"(mlflow experiments restore -x {experiment.experiment_id}) or choose another name"
        )
    return str(experiment.experiment_id)


def is_refused(error: Exception) -> bool:
    """Whether MLflow answered that it does not want this record, now or later."""
    return getattr(error, "error_code", "") in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
        "BAD_REQUEST",
    )


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_SECONDS) as response:
            response.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"tracking.uri: {uri} answers, but not as MLflow does ({error})") from None
    except OSError as error:
        raise ValueError(
            f"tracking.uri: no MLflow at {uri} ({first_line(error)}); start it (mlflow server), correct the "
            "address, or leave tracking.uri empty for SQLite in the store"
        ) from None


def _check_sqlite(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=REACH_SECONDS)
        try:
            connection.execute("select count(*) from sqlite_master").fetchone()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise ValueError(
            f"tracking.uri: {path} cannot be used as MLflow's SQLite file ({error}); "
            "name a writable path, or move the file away to start a new one"
        ) from None


def _check_database(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.hostname is None or parts.port is None:
        return
    try:
        socket.create_connection((parts.hostname, parts.port), REACH_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"tracking.uri: no database at {parts.hostname}:{parts.port} ({error}); start it or correct the address"
        ) from None
