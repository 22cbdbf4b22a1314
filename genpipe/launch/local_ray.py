"""A Ray of one's own: a head node on this machine that ends with whoever started it."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from genpipe.launch.supervise import supervised

START_SECONDS = 120.0
END_SECONDS = 15.0
POLL_SECONDS = 0.3
OBJECT_STORE_BYTES = 256 * 2**20
LONGEST_PARENT = 17
"""A socket's path has 107 bytes at most, and what Ray puts below this folder takes up to 89."""

# Ray Train's own pauses, which would otherwise stand in every stage; a group waits in line for CPUs for a week.
TUNING = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(7 * 24 * 3600),
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "10",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_worker_niceness": "0",  # Ray would have training give way to every other process
}
ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Of a node that nobody but its own run can take away, which saves an actor for each stage."""


class Head(NamedTuple):
    """A head node: its dashboard's URL, the token that it asks for, its CPUs and GPUs, and its process."""

    address: str
    token: str
    capacity: dict[str, float]
    process: subprocess.Popen[bytes]

    @property
    def is_alive(self) -> bool:
        """Whether it runs; when a part of it dies, all of it ends within seconds."""
        return self.process.poll() is None


@contextmanager
def local_head(environment: Mapping[str, str]) -> Iterator[Head]:
    """Start a head node on loopback, with ports, files and a token of its own, and kill it when the block ends.

    All its processes, jobs included, end with this one, whatever ends it.
    """
    token = secrets.token_hex(32)  # other users of this machine can reach loopback, too
    authenticated = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with tempfile.TemporaryDirectory(prefix="genpipe-ray-", dir=_parent(), ignore_cleanup_errors=True) as folder:
        process, address = _start(Path(folder), authenticated)
        try:
            capacity = _await_capacity(process, address, Path(folder), token=token)
            yield Head(address, token, capacity, process)
        finally:
            _end(process)


def _parent() -> str:
    """The folder of temporary files, unless paths below it would be too long for Ray's sockets."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_PARENT else "/tmp"


def get(url: str, *, token: str, timeout: float) -> bytes:
    """The body of what a dashboard answers. Raises OSError (of which HTTPError is one)."""
    request = urllib.request.Request(url, headers=authorization(token))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            body: bytes = response.read()
    except HTTPException as error:  # where nobody listens yet, a connection may have been made to itself
        raise ConnectionError(f"{url}: the answer is not HTTP ({error})") from error
    return body


def authorization(token: str) -> dict[str, str]:
    """The HTTP headers that carry a token; none for an empty one."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def _start(folder: Path, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "port": 0,
        "node-ip-address": "127.0.0.1",
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": 0,  # its default is one fixed port, which allows one Ray a machine
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": folder,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            supervised([sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *arguments]),
            env={**environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the parent, which stops the jobs first
        )
    return process, f"http://127.0.0.1:{port}"


def _await_capacity(process: subprocess.Popen[bytes], address: str, folder: Path, *, token: str) -> dict[str, float]:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            answer = json.loads(get(f"{address}/api/v0/nodes?detail=true", token=token, timeout=START_SECONDS))
        except OSError:  # not listening yet, or not all of it
            answer = None
        nodes = answer["data"]["result"]["result"] if answer else []
        if nodes:
            return {kind: sum(node["resources_total"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        time.sleep(POLL_SECONDS)
    said = (folder / "head.log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the local Ray did not start; it said:\n{said}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the head and all that it started: the jobs have ended, so nothing there is worth an orderly end."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
