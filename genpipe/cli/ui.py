"""`genpipe ui`: MLflow's page with the runs of a pipeline."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Annotated

import typer

from genpipe.cli.pages import HOST, Port, listens

POLL_SECONDS = 0.2


def ui(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a pipeline's YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH=VALUE]...", help="settings that replace the file's")
    ] = None,
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
    while server.poll() is None and not listens(port):
        time.sleep(POLL_SECONDS)
    if server.poll() is None:
        print(f"MLflow is on http://{HOST}:{port}/{page} (Ctrl-C ends it)", flush=True)
    raise typer.Exit(server.wait())
