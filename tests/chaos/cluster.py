"""A Ray cluster of two hosts on one machine: the second lives in a network namespace, behind a link that can be cut."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from chaos import processes
from hosts import Network
from seaweed import free_ports

from genpipe.launch.local_ray import TUNING, get

if TYPE_CHECKING:
    from chaos.lab import Case

START_SECONDS = 90.0
SCRIPT = 'import runpy; runpy.run_module("ray.scripts.scripts", run_name="__main__")'
START = [sys.executable, "-c", SCRIPT, "start", "--block"]
NOTICE = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is taken away"]
NOTICE_SECONDS = 20


class Hosts:
    """A head without room for ranks, and one node after the other that has it, each in a namespace of its own."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.network = Network(case.lab.begun)
        self.token = secrets.token_hex(32)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        port, dashboard = free_ports(2)
        self.gcs = f"{self.network.address}:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        options = {
            "port": port,
            "num-cpus": 1,
            "node-ip-address": self.network.address,
            "include-dashboard": "true",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": 0,
            "object-store-memory": 128 * 2**20,
            "temp-dir": case.folder / "t",
        }
        with (case.folder / "head.log").open("wb") as log:
            self.head = subprocess.Popen(
                [*START, "--head", *(f"--{name}={value}" for name, value in options.items())],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        processes.set_apart(self.head.pid)
        self._await(1)
        self.add_node()

    def add_node(self) -> None:
        """Add a host with the CPUs that two ranks need, and wait until Ray has it."""
        self.host = self.network.add_host()
        before = len(self._alive())
        options = ["--address", self.gcs, "--node-ip-address", self.host.address, "--num-cpus", "2"]
        node = self.host.start(
            [*START, *options, "--object-store-memory", str(128 * 2**20), "--dashboard-agent-listen-port=0"],
            environment=self._environment() | {"GLOO_SOCKET_IFNAME": "eth0"},
            log=self.case.folder / f"{self.host.name}.log",
        )
        processes.set_apart(node.pid)
        self._await(before + 1)

    def kill(self) -> None:
        """Kill every process of the newest host."""
        self.host.kill()

    def unplug(self) -> None:
        """Cut the newest host's link; what runs there runs on."""
        self.host.unplug()

    def preempt(self) -> None:
        """Give notice that the newest host goes, and take it away when the time is up."""
        [node] = [node["node_id"] for node in self._alive() if node["node_ip"] == self.host.address]
        drain(self.gcs, node, environment=self.case.environment)
        time.sleep(NOTICE_SECONDS)
        self.kill()

    def close(self) -> None:
        """Take down all hosts and what runs there."""
        for process in [*psutil.Process(self.head.pid).children(recursive=True), self.head]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.wait()
        self.network.close()

    def _environment(self) -> dict[str, str]:
        return self.case.environment | TUNING | self.environment

    def _alive(self) -> list[dict[str, str]]:
        try:
            answer = json.loads(get(f"{self.dashboard}/api/v0/nodes", token=self.token, timeout=10))
        except OSError:
            return []
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def _await(self, count: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while len(self._alive()) < count:
            assert time.monotonic() < deadline, f"Ray has {len(self._alive())} nodes, not {count}: {self.case.folder}"
            time.sleep(0.3)


def drain(gcs: str, node: str, *, environment: dict[str, str]) -> None:
    """Tell Ray that a node is about to be taken away."""
    command = [sys.executable, "-c", SCRIPT, "drain-node", "--address", gcs, "--node-id", node, *NOTICE]
    done = subprocess.run(
        [*command, "--deadline-remaining-seconds", str(NOTICE_SECONDS)], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout + done.stderr


def drain_head(case: Case) -> None:
    """Give the notice to the local Ray of a run, with the address and token that its raylet has."""
    [raylet] = processes.of_role("raylet")
    line = raylet.cmdline()
    options = dict(word[2:].split("=", 1) for word in line if word.startswith("--") and "=" in word)
    environment = Path(f"/proc/{raylet.pid}/environ").read_bytes().decode(errors="replace").split("\0")
    token = dict(entry.split("=", 1) for entry in environment if "=" in entry)["RAY_AUTH_TOKEN"]
    node = options.get("node_id") or options["node-id"]
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    drain(options["gcs-address"], node, environment=case.environment | access)
