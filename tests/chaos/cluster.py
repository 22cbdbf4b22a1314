"""A Ray cluster of two hosts on one machine: the second lives in a network namespace, behind a link that can be cut."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from chaos import processes
from chaos.services import Missing
from seaweed import free_ports

from genpipe.launch.local_ray import TUNING, get

if TYPE_CHECKING:
    from chaos.lab import Case

START_SECONDS = 90.0
SCRIPT = 'import runpy; runpy.run_module("ray.scripts.scripts", run_name="__main__")'
NOTICE = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is taken away"]
NOTICE_SECONDS = 20


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"a second host needs `ip netns` with root's rights: {done.stderr.strip()}")


class Hosts:
    """A head without room for ranks, and one node after the other that has it, each in a namespace of its own."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.number = 1
        self.bridge = f"chaos{os.getpid() % 10000}"
        self.network = f"10.{77 + os.getpid() % 100}.{case.lab.begun % 250}"
        self.token = secrets.token_hex(32)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.started: list[subprocess.Popen[bytes]] = []
        self.nodes: list[subprocess.Popen[bytes]] = []
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.network}.1/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        port, dashboard = free_ports(2)
        self.gcs = f"{self.network}.1:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        options = {
            "port": port,
            "num-cpus": 1,
            "node-ip-address": f"{self.network}.1",
            "include-dashboard": "true",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": 0,
            "object-store-memory": 128 * 2**20,
            "temp-dir": case.folder / "t",
        }
        self._start("head", ["--head", *(f"--{name}={value}" for name, value in options.items())])
        self._await(1)
        self.add_node()

    def add_node(self) -> None:
        """Add a host with the CPUs that two ranks need, and wait until Ray has it."""
        self.number += 1
        name, link = f"{self.bridge}-{self.number}", f"{self.bridge}n{self.number}"
        address = f"{self.network}.{self.number}"
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self.bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        before = len(self._alive())
        options = ["--address", self.gcs, "--node-ip-address", address, "--num-cpus", "2"]
        self._start(
            f"node{self.number}",
            [*options, "--object-store-memory", str(128 * 2**20), "--dashboard-agent-listen-port=0"],
            within=["ip", "netns", "exec", name],
            environment={"GLOO_SOCKET_IFNAME": "eth0"},
        )
        self._await(before + 1)

    def kill(self) -> None:
        """Kill every process of the newest host."""
        for pid in self._pids(self.number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def unplug(self) -> None:
        """Cut the newest host's link; what runs there runs on."""
        _ip("link", "set", f"{self.bridge}n{self.number}", "down")

    def preempt(self) -> None:
        """Give notice that the newest host goes, and take it away when the time is up."""
        address = f"{self.network}.{self.number}"
        [node] = [node["node_id"] for node in self._alive() if node["node_ip"] == address]
        drain(self.gcs, node, environment=self.case.environment)
        time.sleep(NOTICE_SECONDS)
        self.kill()

    def close(self) -> None:
        """Take down all hosts and what runs there."""
        for process in self.started:
            family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            process.kill()
            process.wait()
        for number in range(2, self.number + 1):
            for pid in self._pids(number):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", f"{self.bridge}-{number}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)

    def _start(
        self,
        name: str,
        options: list[str],
        *,
        within: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        command = [*(within or ()), sys.executable, "-c", SCRIPT, "start", "--block", *options]
        whole = {**self.case.environment, **TUNING, **self.environment, **(environment or {})}
        with (self.case.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=whole, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        processes.set_apart(process.pid)
        self.started.append(process)

    def _pids(self, number: int) -> list[int]:
        answer = subprocess.run(
            ["ip", "netns", "pids", f"{self.bridge}-{number}"], capture_output=True, text=True, check=False
        )
        return [int(line) for line in answer.stdout.split()]

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
