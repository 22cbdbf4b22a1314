"""A real Prefect server that outlives the command that uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings
from seaweed import free_ports
from toybox import wait_for


@contextmanager
def prefect_server(folder: Path, home: Path) -> Iterator[str]:
    """The API of a server whose home, in `folder`, begins as a copy of `home`; Prefect here is led to it."""
    [port] = free_ports(1)
    log = folder / "log"
    shutil.copytree(home, folder / "prefect")
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | {"PREFECT_HOME": str(folder / "prefect")}, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: _answers(f"{url}/health"))
        with temporary_settings({PREFECT_API_URL: url, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}):
            yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False
