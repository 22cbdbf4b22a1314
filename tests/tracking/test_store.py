"""Addresses of MLflow: what works at once, and what is explained within seconds."""

from __future__ import annotations

import base64
import http.server
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toybox import free_port, talking_otherwise

from genpipe.pipeline.spec import sqlite_uri
from genpipe.tracking import store


def test_unusable_addresses_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REACH_SECONDS", 1.0)
    port = free_port()
    with pytest.raises(ValueError, match=rf"tracking.uri: no MLflow at http://127.0.0.1:{port} .*start it"):
        store.check(f"http://127.0.0.1:{port}")
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    with silent, pytest.raises(ValueError, match=r"tracking.uri: no MLflow at .* \(timed out\)"):
        store.check(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with talking_otherwise() as address, pytest.raises(ValueError, match=rf"no MLflow at {address} \(SSH-2"):
        store.check(address)
    monkeypatch.setitem(sys.modules, "psycopg2", types.ModuleType("psycopg2"))  # as if the driver were installed
    with pytest.raises(ValueError, match=rf"tracking.uri: no database at 127.0.0.1:{port}"):
        store.check(f"postgresql+psycopg2://user@127.0.0.1:{port}/mlflow")
    broken = tmp_path / "mlflow.db"
    broken.write_bytes(b"not a database, " * 100)
    with pytest.raises(ValueError, match=r"mlflow.db cannot be used as MLflow's SQLite file"):
        store.check(f"sqlite:///{broken}")
    with pytest.raises(ValueError, match=r"tracking.uri: 'localhost:5000' is not an MLflow tracking URI"):
        store.check("localhost:5000")


@pytest.mark.parametrize("name", ["with space", "100%", "feature%2Flogin", "a?mode=memory", "a#b", "ünï"])
def test_a_store_may_have_any_path(tmp_path: Path, name: str) -> None:
    """Database and files lie where the path says, and nowhere else."""
    uri = sqlite_uri(tmp_path / name / "mlflow.db")
    begun = time.monotonic()
    store.check(uri)
    client = store.client_of(uri)
    run = client.create_run(store.experiment_id_of(client, uri, "runs"))
    client.log_stream(run.info.run_id, io.BytesIO(b"x"), "file.txt")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["file.txt"]
    assert (tmp_path / name / "mlflow.db").stat().st_size > 0
    assert list((tmp_path / name).glob("mlartifacts/**/file.txt"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / name not in path.parents]
    assert time.monotonic() - begun < 60, "no retries"


class Guarded(http.server.BaseHTTPRequestHandler):
    """As much of an MLflow behind basic authentication as a check asks of one; /health asks for the login, too."""

    LOGIN = "Basic " + base64.b64encode(b"user:s3cret").decode()

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == self.LOGIN
        body = json.dumps({"experiments": []}).encode() if known else b"You are not authenticated."
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")  # so that what the test sets is undone, too
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    store.client_of.cache_clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    store.client_of.cache_clear()


def test_an_mlflow_behind_a_login_takes_it_from_the_environment_or_the_uri(
    guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"asks for another login; set MLFLOW_TRACKING_USERNAME and"):
        store.check(f"http://{guarded}")
    with pytest.raises(ValueError) as error:
        store.check(f"http://user:wr0ng@{guarded}")
    assert "wr0ng" not in str(error.value) and f"http://user:***@{guarded}" in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    store.check(f"http://{guarded}")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    store.check(f"http://user:s3cret@{guarded}")


def test_an_mlflow_behind_a_login_takes_it_from_netrc(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    store.check(f"http://{guarded}")


def test_no_message_shows_a_password() -> None:
    with pytest.raises(ValueError) as error:
        store.check(f"http://user:s3cret@127.0.0.1:{free_port()}")
    assert "s3cret" not in str(error.value)
    assert store.redacted("postgresql+psycopg2://me:s3cret@db:5432/x") == "postgresql+psycopg2://me:***@db:5432/x"
    assert store.redacted("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_database_without_its_driver_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # type: ignore[arg-type]  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs the Python package psycopg2-binary: pip install") as error:
        store.check("postgresql://me:s3cret@127.0.0.1:1/mlflow")
    assert "s3cret" not in str(error.value)
    with pytest.raises(ValueError, match="mysqlclient"):
        store.check("mysql://127.0.0.1/mlflow")
    with pytest.raises(ValueError, match="not a database's URI"):
        store.check("postgresq://127.0.0.1/mlflow")
    assert time.monotonic() - begun < 60, "before MLflow tries for minutes"


@pytest.mark.slow
def test_two_who_start_at_once_make_one_database(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path / "new" / "mlflow.db")
    code = f"""
import sys
from genpipe.tracking import store
store.check({uri!r})
client = store.client_of({uri!r})
print(client.create_run(store.experiment_id_of(client, {uri!r}, "runs")).info.experiment_id)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=240)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(answers)) == 1, "one experiment"


@pytest.mark.slow
@pytest.mark.parametrize("before", ["moved", "copied"])
def test_a_store_that_was_moved_takes_its_files_along(tmp_path: Path, before: str) -> None:
    old, new = tmp_path / "old store", tmp_path / "elsewhere" / "new store"
    uri = sqlite_uri(old / "mlflow.db")
    store.check(uri)
    client = store.client_of(uri)
    first = client.create_run(
        store.experiment_id_of(client, uri, "runs"), tags={"genpipe.artifact": f"{old}/artifacts/a"}
    )
    client.log_image(first.info.run_id, np.zeros((4, 4, 3), np.uint8), key="picture", step=1, synchronous=True)
    model = client.create_logged_model(
        first.info.experiment_id, name="m", tags={"genpipe.artifact": f"{old}/artifacts/a"}
    )
    store.client_of.cache_clear()
    shutil.copytree(old, new)
    if before == "moved":
        shutil.rmtree(old)
    files = sorted(tmp_path.glob("old*/**/*"))

    code = """
import io, sys
from genpipe.tracking import store
uri, first = sys.argv[1:]
store.check(uri)
client = store.client_of(uri)
second = client.create_run(store.experiment_id_of(client, uri, "runs")).info.run_id
for run_id in (first, second):
    client.log_stream(run_id, io.BytesIO(b"x"), "later.txt")
"""
    moved = sqlite_uri(new / "mlflow.db")
    subprocess.run([sys.executable, "-c", code, moved, first.info.run_id], check=True, timeout=240)
    assert sorted(tmp_path.glob("old*/**/*")) == files, "nothing is written there"
    assert len(list(new.glob("mlartifacts/**/later.txt"))) == 2
    client = store.client_of(moved)
    assert len([f for f in client.list_artifacts(first.info.run_id, "images") if f.path.endswith(".png")]) == 1
    run = client.get_run(first.info.run_id)
    assert run.info.artifact_uri.startswith((new / "mlartifacts").as_uri())
    assert run.data.tags["genpipe.artifact"] == f"{new}/artifacts/a"
    moved_model = client.get_logged_model(model.model_id)
    assert moved_model.tags["genpipe.artifact"] == f"{new}/artifacts/a"
    assert moved_model.artifact_location.startswith((new / "mlartifacts").as_uri())
