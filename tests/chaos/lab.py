"""Where the runs take place: what is made once for all of them, and the folder, settings and command of each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml
from chaos import processes
from chaos.services import S3, Clock, Disk, Mlflow
from PIL import Image
from seaweed import BUCKET

from genpipe.storage import Storage, open_storage

if TYPE_CHECKING:
    from chaos.cluster import Hosts

ROOT = Path(__file__).parent.parent.parent
Launcher = Literal["alone", "torchrun", "pipeline"]
WORKERS: dict[Launcher, int] = {"alone": 1, "torchrun": 2, "pipeline": 2}
SAMPLES = 4800
PRELIMINARIES = {
    "shard": {
        "source": {"kind": "folder", "label": "folder", "captions": "{label}"},
        "image_size": 16,
        "heldout_fraction": 0.2,
        "part_size": 16,
    },
    "toy_data": {"kind": "toys.toy_data", "parts": 6, "seconds": 0.3},
}
DECODER = {
    "kind": "pixel_decoder",
    "image_size": 16,
    "model": {"denoiser": {"kind": "dit", "patch_size": 4, "width": 32, "depth": 1, "heads": 2}},
    "train": {
        "samples": SAMPLES,
        "global_batch_size": 8,
        "optim": {"kind": "adamw", "lr": 3e-3},
        "ema_decay": 0.9,
        "precision": "fp32",
    },
    "observe": {
        "log_every": 5,
        "heldout_samples": 8,
        "validate_every": 1600,
        "pictures": 1,
        "sampler": {"kind": "heun", "steps": 1},
    },
}


class Point(NamedTuple):
    """A metric's value after so many samples."""

    name: str
    samples: int
    value: float


class Reference(NamedTuple):
    """What an undisturbed run makes: the digest of its weights, and its metrics by name and samples seen."""

    digest: str
    history: dict[tuple[str, int], float]


class Lab:
    """Pictures, committed inputs, references and services, made when they are first wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = 0
        self.references: dict[int, Reference] = {}
        rng = np.random.default_rng(0)
        (folder / "pictures/noise").mkdir(parents=True)
        for number in range(64):
            picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            picture.save(folder / f"pictures/noise/{number:02}.png")

    @cached_property
    def inputs(self) -> Path:
        """A store in which everything before the training is committed."""
        case = self.case("alone", Random(0))
        for stage in PRELIMINARIES:
            case.command = [sys.executable, "-m", "genpipe.launch.local", str(case.config), stage]
            assert case.start().wait() == 0, case.output()
        return case.folder / "store"

    @cached_property
    def prefect_home(self) -> Path:
        """A Prefect home whose database has its tables, which take a server seconds to make."""
        home = self.folder / "prefect"
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(command, env=os.environ | {"PREFECT_HOME": str(home)}, check=True, capture_output=True)
        return home

    @cached_property
    def s3(self) -> S3:
        return S3(self.folder / "s3")

    @cached_property
    def mlflow(self) -> Mlflow:
        return Mlflow(self.folder / "mlflow")

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.folder / "clock")

    def reference(self, workers: int) -> Reference:
        """The undisturbed run of as many ranks, which no fault is injected into."""
        if workers not in self.references:
            case = self.case("alone" if workers == 1 else "torchrun", Random(0)).with_inputs()
            assert case.start().wait() == 0, case.output()
            assert case.committed(), case.output()
            history = {(name, samples): value for name, samples, value in points_of(case.jsonl())}
            self.references[workers] = Reference(case.digest(), history)
        return self.references[workers]

    def case(self, launcher: Launcher, random: Random) -> Case:
        """A new run, in a folder of its own."""
        self.begun += 1
        return Case(self, self.folder / f"{self.begun:03}", launcher, random)

    def close(self) -> None:
        """End the services that were started."""
        for service in ("s3", "mlflow", "clock"):
            if service in self.__dict__:
                self.__dict__[service].close()


class Case:
    """One run of the pipeline: its store, its settings, and the command that a user would give, again and again."""

    def __init__(self, lab: Lab, folder: Path, launcher: Launcher, random: Random) -> None:
        self.lab, self.folder, self.launcher, self.random = lab, folder, launcher, random
        self.store = str(folder / "store")
        self.config = folder / "chaos.yaml"
        self.started: list[subprocess.Popen[bytes]] = []
        self.closers: list[Callable[[], object]] = []
        self.disk: Disk | None = None
        self.hosts: Hosts | None = None
        (folder / "t").mkdir(parents=True)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/toys'}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "prefect"),
            "GENPIPE_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "t"),
            "OMP_NUM_THREADS": "1",
        }
        self.settings: dict[str, Any] = {
            "name": f"chaos-{folder.name}",
            "store": self.store,
            "stages": json.loads(json.dumps(PRELIMINARIES | {"decoder": DECODER})),
        }
        self.settings["stages"]["shard"]["source"]["path"] = str(lab.folder / "pictures")
        self.settings["stages"]["decoder"]["resources"] = {
            "checkpoint_seconds": 0.2,
            "hang_seconds": 30.0,
            "workers": WORKERS[launcher],
        }
        if launcher == "pipeline":
            self.command = [sys.executable, "-m", "genpipe.cli.main", "run", str(self.config)]
            shutil.copytree(lab.prefect_home, folder / "prefect")
        else:
            self.settings["tracking"] = {"uri": "jsonl"}
            start = [sys.executable]
            if launcher == "torchrun":
                start = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
            self.command = [*start, "-m", "genpipe.launch.local", str(self.config), "decoder"]
        self.write_settings()

    def write_settings(self) -> None:
        """Write the pipeline's file anew, after a change of `settings`."""
        self.config.write_text(yaml.safe_dump(self.settings))

    def with_inputs(self, *stages: str) -> Case:
        """Put what stands before the training into the store (all of it, or the artifacts of some stages)."""
        kinds = {"shard": "shards", "toy_data": "toy_data"}
        source = open_storage(str(self.lab.inputs))
        for stage in stages or tuple(kinds):
            for entry in source.list(f"artifacts/{kinds[stage]}/"):
                self.storage().write(entry.key, source.read(entry.key))
        return self

    def move_to(self, store: str, environment: Mapping[str, str] | None = None) -> None:
        """Keep the store elsewhere; `environment` is what reaching it takes."""
        self.store = self.settings["store"] = store
        self.environment |= environment or {}
        self.write_settings()

    def move_to_s3(self) -> None:
        """Keep the store under S3, which the run reaches through the proxy."""
        self.move_to(f"s3://{BUCKET}/{self.folder.name}", self.lab.s3.environment())

    def track_on_server(self) -> None:
        """Keep the records in the MLflow server."""
        self.settings["tracking"] = {"uri": self.lab.mlflow.uri}
        self.write_settings()

    def tracking_uri(self) -> str:
        """Where the harness finds the records, also while the server is away."""
        given = self.settings.get("tracking", {}).get("uri", "")
        return self.lab.mlflow.database if given else f"sqlite:///{self.store}/mlflow.db"

    def start(self) -> subprocess.Popen[bytes]:
        """Give the command, in a process group of its own, as a terminal does."""
        path = self.folder / f"output-{len(self.started)}"
        with path.open("wb") as output:
            process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def output(self, number: int = -1) -> str:
        """What a command has said: the last one, or the given one."""
        number %= len(self.started)
        return (self.folder / f"output-{number}").read_text(errors="replace")

    def running(self) -> bool:
        """Whether one of the commands has not ended."""
        return any(process.poll() is None for process in self.started)

    def storage(self) -> Storage:
        return open_storage(self.store)

    def progress(self) -> int | None:
        """Samples trained on, as the work folder says; None before training."""
        for entry in self.keys("work/decoder/"):
            if entry.endswith("/progress.json"):
                try:
                    return int(json.loads(self.storage().read(entry))["done"])
                except FileNotFoundError:
                    return None
        return None

    def checkpoints(self) -> list[str]:
        """The keys of the folders of checkpoints, whole or not, the oldest first."""
        keys = self.keys("work/decoder/")
        return sorted({"/".join(key.split("/")[:5]) for key in keys if key.split("/")[3:4] == ["checkpoints"]})

    def committed(self) -> list[str]:
        """The keys of the manifests of the trained artifact: one, if all is well."""
        return [key for key in self.keys("artifacts/decoder/") if key.endswith("/manifest.json")]

    def keys(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.storage().list(prefix)]

    def digest(self) -> str:
        """sha256 over the names and contents of the artifact's files of weights."""
        total = hashlib.sha256()
        for key in sorted(key for key in self.keys("artifacts/decoder/") if key.endswith(".safetensors")):
            total.update(key.rpartition("/")[2].encode() + self.storage().read(key))
        return total.hexdigest()

    def jsonl(self) -> list[dict[str, Any]]:
        """The lines of the records that are kept in the store; what a kill or a full disk cut short is none."""
        keys = [key for key in self.keys("runs/decoder/") if key.endswith("/metrics.jsonl")]
        found = []
        for line in (line for key in keys for line in self.storage().read(key).splitlines()):
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def wait(self, *, seconds: float) -> bool:
        """Whether every command ended within the time; what is left after it is killed."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self.running():
            return True
        processes.kill_all()
        for process in self.started:
            process.wait()
        return False

    def close(self, *, keep: bool) -> None:
        """Undo what was mounted or started for this run alone, and delete its folder unless it is to be kept."""
        if keep and self.disk is not None:
            shutil.copytree(self.disk.folder, self.folder / "disk-copy")
        for close in reversed(self.closers):
            close()
        if self.store.startswith("s3://"):
            self.storage().delete_all()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def points_of(lines: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The metrics that stand in the lines of a `metrics.jsonl`."""
    return [
        Point(name, line["samples_seen"], value) for line in lines for name, value in line.get("metrics", {}).items()
    ]
