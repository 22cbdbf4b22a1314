"""Where MLflow keeps its records: a server, a database, or an SQLite file in the store.

MLflow is imported where it is used, because every worker imports this module.
"""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow reads these when it is imported: a silent server is given up after some seconds instead of minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

REACH_SECONDS = 5.0
LOCK_SECONDS = 300.0

FILES = "mlartifacts"
"""The folder beside an SQLite file where the files of its runs lie."""
FILE_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
ARTIFACT_COLUMNS = (("tags", "value"), ("logged_model_tags", "tag_value"))
"""Where MLflow's tables hold URIs of files, and genpipe's tags paths of artifacts."""


def check(uri: str) -> None:
    """Make sure that MLflow answers at `uri`, creating an SQLite store that is not there yet.

    A login comes from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, ~/.netrc or the
    URI, and is never printed. Raises ValueError with the remedy, after about 5 seconds at most.
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
            "or leave it empty for SQLite in the store (of jsonl, the records are in the store's folder runs/)"
        )
    from mlflow.exceptions import MlflowException

    try:
        client_of(uri).search_experiments(max_results=1)
    except MlflowException as error:
        where, said = redacted(uri), first_line(error)
        if getattr(error, "get_http_status_code", int)() in (401, 403) or " 401 " in said or " 403 " in said:
            raise ValueError(f"tracking.uri: MLflow at {where} asks for another login; {LOGIN}") from None
        raise ValueError(f"tracking.uri: MLflow at {where} does not work: {said}") from None


LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def redacted(text: str, *, of: str = "") -> str:
    """A URI, or a text about the URI `of`, without the password in it."""
    password = urlsplit(of or text).password
    return text.replace(f":{password}@", ":***@") if password else text


def page_of(experiment_id: str, run_id: str = "") -> str:
    """The address, relative to MLflow's root, of an experiment's table of runs, or of one of the runs.

    It asks for the pages for model training: by default MLflow opens those for agents, which show traces and no runs.
    """
    run = f"/{run_id}" if run_id else ""
    return f"#/experiments/{experiment_id}/runs{run}?workflowType=machine_learning"


def runs_page(uri: str, experiment: str) -> str:
    """The `page_of` an experiment; empty, for MLflow's first page, as long as there is none.

    Raises ValueError as `check` does.
    """
    check(uri)
    found = client_of(uri).get_experiment_by_name(experiment)
    return page_of(str(found.experiment_id)) if found is not None and found.lifecycle_stage == "active" else ""


def server_command(uri: str, *, port: int) -> list[str]:
    """The command line that serves MLflow's UI of a database on 127.0.0.1."""
    where = ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", uri, "--registry-store-uri", uri]
    return [sys.executable, "-m", "mlflow", "server", *where, "--workers", "1", "--uvicorn-opts", "--log-level=warning"]


@cache
def client_of(uri: str) -> MlflowClient:
    """The client of this process for the MLflow at `uri`.

    An SQLite file is made, or brought up to date, by one process at a time, and follows its folder if that was moved.
    A login in the URI of a server goes where MLflow looks for one otherwise, so that no message shows it.
    """
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.username:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
        uri = _without_login(uri)
    if parts.scheme != "sqlite":
        return MlflowClient(uri)
    path = _sqlite_path(uri).absolute()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)  # MLflow would take `file:` for the name of a folder
    if not os.access(path.parent, os.W_OK):
        return MlflowClient(uri)
    with _alone_with(path):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
        _follow_move(path)
    return client


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Hold an SQLite lock on a file beside the database: MLflow would make its tables twice at once, and fail."""
    connection = sqlite3.connect(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS, isolation_level=None)
    try:
        connection.execute("begin exclusive")
        yield
    finally:
        connection.close()


def _follow_move(path: Path) -> None:
    """Where the folder of an SQLite file was moved or copied, let its runs' files and artifacts be those beside it.

    MLflow holds the absolute location of files in each experiment, run and model; it would write those of later runs
    to the old place, made anew if it is gone.
    """
    here = path.parent / FILES
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as database, database:
        query = "select distinct artifact_location from experiments where artifact_location like ?"
        for (location,) in database.execute(query, (f"file:%/{FILES}",)).fetchall():
            there = Path(url2pathname(urlsplit(location).path))
            if there == here or (there.parent.exists() and there.parent.samefile(here.parent)):
                continue
            for table, column in FILE_COLUMNS:
                _replace_start(database, table, column, location, here.as_uri())
            for table, column in ARTIFACT_COLUMNS:
                _replace_start(database, table, column, str(there.parent), str(here.parent))


def _replace_start(database: sqlite3.Connection, table: str, column: str, before: str, after: str) -> None:
    database.execute(
        f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or substr({column}, 1, ?) = ?",
        (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
    )


def experiment_id_of(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created if need be; files of an SQLite store lie beside it."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        beside = _sqlite_path(uri).absolute().parent / FILES
        location = beside.as_uri() if uri.startswith("sqlite:") else None
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # some versions guess another
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
    bare = _without_login(uri)
    try:
        with urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=REACH_SECONDS) as response:
            response.read()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):  # the client has the login
            raise ValueError(f"tracking.uri: {bare} answers, but not as MLflow does ({error})") from None
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"tracking.uri: no MLflow at {bare} ({first_line(error)}); start it (mlflow server), correct the "
            "address, or leave tracking.uri empty for SQLite in the store"
        ) from None


def _without_login(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _sqlite_path(uri: str) -> Path:
    """The file of an SQLite URI: a path as it is, or after `file:` one in the syntax of URLs."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(unquote(name.removeprefix("file:")) if name.startswith("file:") else name)


def _check_sqlite(uri: str) -> None:
    path = _sqlite_path(uri)
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
    """Try what MLflow would try for two minutes: the driver, the address, and a connection."""
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import SQLAlchemyError

    where = redacted(uri)
    try:
        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise ValueError(
            f"tracking.uri: {where} needs the Python package {package}: pip install {package} (of PostgreSQL write "
            "postgresql+psycopg2://, which is what MLflow is tested with)"
        ) from None
    except SQLAlchemyError as error:
        raise ValueError(f"tracking.uri: {where} is not a database's URI: {first_line(error)}") from None
    if url.host and url.port:
        try:
            socket.create_connection((url.host, url.port), REACH_SECONDS).close()
        except OSError as error:
            raise ValueError(
                f"tracking.uri: no database at {url.host}:{url.port} ({error}); start it or correct the address"
            ) from None
    engine = create_engine(url)
    try:
        engine.connect().close()
    except SQLAlchemyError as error:
        said = redacted(first_line(error), of=uri)
        raise ValueError(f"tracking.uri: {where} cannot be used: {said}") from None
    finally:
        engine.dispose()


DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "MySQLdb": "mysqlclient"}
"""The package of a module where their names differ."""
