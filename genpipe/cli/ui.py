"""`genpipe ui`: MLflow's page with the runs of a pipeline."""

from __future__ import annotations

import os
import socket
import subprocess
import time

import typer

from genpipe.cli.arguments import HOST, ConfigFile, Overrides, Port

POLL_SECONDS = 0.2


def ui(
    config: ConfigFile,
    overrides: Overrides = None,
    port: Port = 5000,
) -> None:
    """Serve MLflow's UI on this machine alone, and say where this pipeline's runs are in it; Ctrl-C ends it.

    Where `tracking.uri` names a server, only say where they are.
    """
    from genpipe.launch.supervise import supervised
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.tracking.store import redacted, runs_page, server_command

    pipeline = load_pipeline(config, overrides or [])
    uri = pipeline.tracking_uri
    page = runs_page(uri, pipeline.experiment)
    if uri.startswith("http"):
        print(f"the runs are at {redacted(uri).rstrip('/')}/{page}")
        return
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # about what MLflow itself uses
    server = subprocess.Popen(supervised(server_command(uri, port=port)), env=quiet)
    while server.poll() is None and not _listens(port):
        time.sleep(POLL_SECONDS)
    if server.poll() is None:
        print(f"MLflow is on http://{HOST}:{port}/{page} (Ctrl-C ends it)", flush=True)
    raise typer.Exit(server.wait())


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0
