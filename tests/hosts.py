"""Hosts on one machine: network namespaces with an address each, joined by a bridge, with links that can be cut."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class Missing(Exception):
    """This machine cannot have what a test needs; the text says why."""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"hosts need `ip netns` with root's rights: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A network namespace with an address, and the processes that were started there."""

    def __init__(self, name: str, link: str, bridge: str, address: str) -> None:
        self.name, self.link, self.address = name, link, address
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")

    def within(self) -> list[str]:
        """What is put before a command to run it on this host; the process is the command's own."""
        return ["ip", "netns", "exec", self.name]

    def start(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on this host, in a session of its own; what it says goes to the end of `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self.within(), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill every process of the host: it lost its power."""
        for pid in _ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def unplug(self) -> None:
        """Cut the link; what runs there runs on."""
        _ip("link", "set", self.link, "down")

    def plug(self) -> None:
        """Mend the link."""
        _ip("link", "set", self.link, "up")

    def close(self) -> None:
        """Kill what runs there, and delete the namespace."""
        self.kill()
        _ip("netns", "delete", self.name)


class Network:
    """A bridge with hosts; this process stands at `address`, and reaches every host."""

    def __init__(self, number: int) -> None:
        """`number` tells networks of one machine apart."""
        self.bridge = f"gp{os.getpid() % 10000}x{number}"
        self.prefix = f"10.{77 + os.getpid() % 100}.{number % 250}"
        self.address = f"{self.prefix}.1"
        self.hosts: list[Host] = []
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add_host(self) -> Host:
        """One more host."""
        number = len(self.hosts) + 2
        host = Host(f"{self.bridge}-{number}", f"{self.bridge}n{number}", self.bridge, f"{self.prefix}.{number}")
        self.hosts.append(host)
        return host

    def close(self) -> None:
        """Take down all hosts and the bridge."""
        for host in self.hosts:
            with suppress(Missing):
                host.close()
        with suppress(Missing):
            _ip("link", "delete", self.bridge)
