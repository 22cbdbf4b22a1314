"""What a cluster consists of, each service on a host of its own: storage, MLflow, Prefect, Ray, a worker.

They are started as infra/ starts them, with its files where it has any, on addresses instead of names.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from hosts import Host, Missing, Network
from seaweed import Seaweed

from genpipe.launch.local_ray import authorization

ROOT = Path(__file__).parent.parent.parent
IMAGES, COMPOSE = ROOT / "infra/images", ROOT / "infra/compose"
BIN = Path(sys.executable).parent
START_SECONDS = 180.0
NODES = 3
NODE_CPUS = 1


class Cluster:
    """The whole of it; `laptop` is what a person's environment holds who may use it, and where this process stands."""

    def __init__(self, folder: Path) -> None:
        for command in ("rclone", "chromium"):
            if not shutil.which(command):
                raise Missing(f"the rehearsal needs {command}: install Debian's package `{command}`")
        self.folder = folder
        self.network = Network(0)
        self.ray_folder = folder / "r"
        self.ray_folder.mkdir()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.database_host, s3_host, self.mlflow_host, self.prefect_host, self.ray_host = (
            self.network.add_host() for _ in range(5)
        )
        self.s3 = Seaweed(self.folder / "s3", host=s3_host)
        self.aws = self.s3.environment()
        self._start_storage()
        self.mlflow_url = f"http://{self.mlflow_host.address}:5000"
        self.prefect_url = f"http://{self.prefect_host.address}:4200/api"
        self.ray_url = f"http://{self.ray_host.address}:8265"
        self.gcs = f"{self.ray_host.address}:6379"
        self.mlflow_login = ("admin", secrets.token_hex(16))
        self.prefect_login = ("genpipe", secrets.token_hex(16))
        self.token = secrets.token_hex(32)
        self.laptop = self.aws | {
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": self.mlflow_login[0],
            "MLFLOW_TRACKING_PASSWORD": self.mlflow_login[1],
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_API_AUTH_STRING": ":".join(self.prefect_login),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        self._start_records()
        head = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--num-cpus=0"]
        self._ray(self.ray_host, [*head, f"--temp-dir={self.ray_folder}"])
        wait_until(lambda: self.answers(f"{self.ray_url}/api/version", self.ray_access()), "Ray's dashboard")
        self.nodes = [self.add_node() for _ in range(NODES)]
        self._await_records()
        wait_until(lambda: len(self.alive_nodes()) == NODES + 1, "Ray's nodes")
        self.worker_host = self.start_worker()

    def lose_disks(self) -> None:
        """PostgreSQL and S3 lose all that they hold, and come back empty; MLflow, Prefect and the worker are down."""
        for host in (self.worker_host, self.prefect_host, self.mlflow_host, self.database_host):
            host.kill()
        self.s3.lose()
        shutil.rmtree(self.postgres.folder)
        self._start_storage()

    def start_again(self) -> None:
        """Start MLflow, Prefect and a worker on what PostgreSQL and S3 hold."""
        self._start_records()
        self._await_records()
        self.worker_host = self.start_worker()

    def _start_storage(self) -> None:
        """What `infra/compose` begins with: databases and buckets with nothing in them."""
        self.postgres = Postgres(self.folder / "postgres", self.database_host)
        self.s3.start()
        buckets = [str(BIN / "python"), str(IMAGES / "make_buckets.py"), "mlflow"]
        subprocess.run(buckets, env=os.environ | self.aws, check=True)

    def _start_records(self) -> None:
        mlflow = [str(BIN / "mlflow"), "server", "--app-name", "basic-auth", "--host", "0.0.0.0", "--port", "5000"]
        self.run_on(self.mlflow_host, [*mlflow, "--workers", "1"], self._mlflow_settings(), name="mlflow")
        prefect = [str(BIN / "prefect"), "server", "start", "--host", "0.0.0.0", "--port", "4200"]
        self.run_on(self.prefect_host, prefect, self._prefect_settings(), name="prefect")

    def _await_records(self) -> None:
        wait_until(lambda: self.answers(f"{self.mlflow_url}/health"), "MLflow")
        wait_until(lambda: self.answers(f"{self.prefect_url}/health", auth=self.prefect_login), "Prefect")

    def add_node(self) -> Host:
        """Give Ray one more node."""
        host = self.network.add_host()
        self._ray(host, [f"--address={self.gcs}", f"--num-cpus={NODE_CPUS}"])
        return host

    def start_worker(self) -> Host:
        """Start a Prefect worker on a new host."""
        host = self.network.add_host()
        command = [str(BIN / "prefect"), "worker", "start", "--pool", "genpipe", "--type", "process"]
        self.run_on(host, command, self.laptop, name="worker")
        return host

    def run_on(self, host: Host, command: list[str], settings: Mapping[str, str], *, name: str) -> None:
        """Start a service on a host, in a home of its own; its log is named after it."""
        host.start(command, environment=self.environment(host.name) | settings, log=self.folder / f"{name}.log")

    def environment(self, name: str) -> dict[str, str]:
        """That of a machine that shares nothing with others but the installed package."""
        home = self.folder / name
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        kept = {key: os.environ[key] for key in ("LANG", "LC_ALL") if key in os.environ}
        return kept | {
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "GENPIPE_CACHE": str(home / "cache"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def genpipe(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What a person types on a laptop."""
        done = subprocess.run(
            [str(BIN / "genpipe"), *arguments],
            env=self.environment("laptop") | self.laptop,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise AssertionError(f"genpipe {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done

    def administer(self, commands: str, folder: Path) -> None:
        """What an administrator types in a folder, with PostgreSQL and S3 within reach."""
        path = f"{self.postgres.bin}:{os.environ['PATH']}"
        settings = self.aws | self.postgres.environment | {"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8"}
        done = subprocess.run(["bash", "-euxc", commands], env=settings, cwd=folder, capture_output=True, text=True)
        assert not done.returncode, done.stderr

    def ray_access(self) -> dict[str, str]:
        """The headers that Ray's dashboard asks for."""
        return authorization(self.token)

    def answers(self, url: str, headers: Mapping[str, str] | None = None, **options: Any) -> bool:
        """Whether a service answers, and lets this request in."""
        try:
            return httpx.get(url, headers=dict(headers or {}), timeout=10, **options).is_success
        except httpx.HTTPError:
            return False

    def alive_nodes(self) -> dict[str, str]:
        """Ray's nodes that are alive: their addresses by their ids."""
        found = self._state("nodes")
        return {node["node_id"]: node["node_ip"] for node in found if node["state"] == "ALIVE"}

    def rank_addresses(self) -> list[str]:
        """The addresses of the nodes on which training ranks run."""
        nodes = self.alive_nodes()
        actors = self._state("actors", detail="true", limit="1000")
        ranks = [a for a in actors if a["state"] == "ALIVE" and "RayTrainWorker" in a["class_name"]]
        return sorted(nodes.get(actor["node_id"], "?") for actor in ranks)

    def jobs(self) -> list[dict[str, Any]]:
        """All Ray jobs, of which the ones of genpipe have an id that names the kind of stage."""
        answer = httpx.get(f"{self.ray_url}/api/jobs/", headers=self.ray_access(), timeout=30).raise_for_status()
        return [job for job in answer.json() if job["submission_id"]]

    def _state(self, what: str, **query: str) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"{self.ray_url}/api/v0/{what}", headers=self.ray_access(), params=query, timeout=30)
        except httpx.HTTPError:
            return []
        found: list[dict[str, Any]] = answer.json()["data"]["result"]["result"] if answer.is_success else []
        return found

    def _ray(self, host: Host, options: list[str]) -> None:
        memory = f"--object-store-memory={192 * 2**20}"
        ray = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}", memory, *options]
        own = self.folder / host.name / "r"  # Ray's sockets lie at one path on every node, and this is one file system
        own.mkdir(parents=True)
        mounted = f'mount --bind {own} {self.ray_folder} && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mounted, "sh", *ray]
        settings = self.laptop | {
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_JOB_STOP_WAIT_TIME_S": "30",
            "RAY_worker_niceness": "0",  # Ray would have training give way to every other process of this machine
        }
        self.run_on(host, command, settings, name=f"ray-{host.address}")

    def _mlflow_settings(self) -> dict[str, str]:
        address = self.mlflow_url.removeprefix("http://")
        return (
            self.aws
            | self.postgres.environment
            | {
                "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2:///mlflow",
                "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
                "MLFLOW_AUTH_CONFIG_PATH": str(IMAGES / "mlflow_auth.ini"),
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.mlflow_login[1],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
                "MLFLOW_SERVER_ALLOWED_HOSTS": f"{address},localhost:5000,127.0.0.1:5000",
                "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": self.mlflow_url,
            }
        )

    def _prefect_settings(self) -> dict[str, str]:
        return self.postgres.environment | {
            "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg:///prefect",
            "PREFECT_SERVER_API_AUTH_STRING": ":".join(self.prefect_login),
        }

    def close(self) -> None:
        """Kill everything and take the network down."""
        self.network.close()


class Postgres:
    """PostgreSQL with a password, and the databases that infra/compose makes."""

    def __init__(self, folder: Path, host: Host) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
            Path(path).parent for path in [shutil.which("initdb")] if path
        ]
        if not found:
            raise Missing("MLflow's and Prefect's database needs PostgreSQL: install Debian's package `postgresql`")
        self.bin, self.folder = found[-1], folder
        folder.mkdir()
        shutil.chown(folder, "postgres", "postgres")
        password = secrets.token_hex(16)
        (folder / "password").write_text(password)
        shutil.chown(folder / "password", "postgres", "postgres")
        self.environment = {"PGHOST": host.address, "PGUSER": "genpipe", "PGPASSWORD": password}
        data = str(folder / "data")
        login = ["--username=genpipe", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256"]
        self._run(["initdb", f"--pgdata={data}", "--encoding=UTF8", "--no-locale", "--no-sync", *login])
        with Path(data, "pg_hba.conf").open("a") as access:
            access.write("host all all 10.0.0.0/8 scram-sha-256\n")
        start = ["postgres", "-D", data, "-h", host.address, "-k", str(folder), "-c", "fsync=off"]
        host.start(self._as_postgres(start), environment={"LANG": "C.UTF-8"}, log=folder.with_suffix(".log"))
        wait_until(lambda: not self._psql("select 1").returncode, "PostgreSQL")
        for statement in (COMPOSE / "postgres.sql").read_text().splitlines():
            if not statement.startswith("--"):
                done = self._psql(statement)
                assert not done.returncode, done.stderr

    def refuses(self, password: str) -> bool:
        """Whether this password is not let in."""
        return "authentication failed" in self._psql("select 1", PGPASSWORD=password).stderr

    def _psql(self, statement: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / "psql"), "--dbname=postgres", "--no-password", "--command", statement]
        environment = {"LANG": "C.UTF-8", **self.environment, **settings}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(self._as_postgres(command), capture_output=True, text=True, cwd="/")
        assert not done.returncode, done.stdout + done.stderr

    def _as_postgres(self, command: list[str]) -> list[str]:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        return [*user, str(self.bin / command[0]), *command[1:]]


def wait_until(ready: Callable[[], Any], what: str, *, seconds: float = START_SECONDS) -> Any:
    """What `ready()` gives once it is true. Raises AssertionError, with `what` was awaited, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.3)
    return found
