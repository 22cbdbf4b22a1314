"""Toy stages for tests of how stages are run: a package outside of genpipe, here and in every child process."""

from __future__ import annotations

import os
import secrets
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from genpipe import artifacts, config
from genpipe.artifacts import Artifact
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import UNFINGERPRINTED
from genpipe.stages import load_stage
from genpipe.storage import join
from genpipe.training.checkpoint_store import CheckpointStore, samples_of

TOYS = Path(__file__).parent / "toys"


def install() -> None:
    """Make the package `toys` known to this process and, through PYTHONPATH, to those that it starts."""
    if str(TOYS) not in sys.path:
        sys.path.append(str(TOYS))
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(TOYS) not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, inherited), str(TOYS)])


class Toys:
    """Toy stages in one store, tracked in the store's own MLflow."""

    def __init__(self, store: Path) -> None:
        install()
        self.store = str(store)
        self.tracking_uri = f"sqlite:///{store}/mlflow.db"

    def spec(self, stage: str, inputs: dict[str, Artifact] | None = None, **settings: Any) -> StageSpec:
        kind = f"toys.{stage}"
        module, inputs = load_stage(kind), inputs or {}
        cfg = module.Config.model_validate(settings)
        settings = config.changed(cfg, without=UNFINGERPRINTED)
        identity = artifacts.identity(kind, version=module.VERSION, settings=settings, inputs=inputs)
        fingerprint = artifacts.fingerprint(identity)
        uri = artifacts.artifact_uri(self.store, module.MAKES, fingerprint)
        meta = module.check_inputs(cfg, inputs)
        return StageSpec(
            name=stage,
            stage=kind,
            config=config.resolved(cfg),
            inputs=inputs,
            identity=identity,
            target=Artifact(kind=module.MAKES, uri=uri, fingerprint=fingerprint, meta=meta),
            store=self.store,
            tracking_uri=self.tracking_uri,
            experiment="toys",
        )

    def line(self, data: Artifact, *, samples: int = 80, **settings: Any) -> StageSpec:
        optim = {"kind": "adamw", "lr": 0.05}
        train = {"samples": samples, "global_batch_size": 4, "optim": optim, "precision": "fp32"}
        observe = {"log_every": 5} | settings.pop("observe", {})
        train |= settings.pop("train", {})
        return self.spec("toy_line", {"toy_data": data}, train=train, observe=observe, **settings)


def artifact_of(spec: StageSpec) -> Artifact:
    found = artifacts.find(spec.target.uri)
    assert found is not None, f"{spec.stage} is not committed"
    return found


def saved(spec: StageSpec) -> int:
    """The samples seen of a training's newest checkpoint; all that was logged up to there is on record."""
    names = CheckpointStore(join(spec.work, "checkpoints")).names()
    return samples_of(names[0]) if names else 0


def wait_for(ready: Callable[[], Any], *, seconds: float = 240.0) -> Any:
    """What `ready()` gives once it is true; fails after `seconds`, by default what a Ray job takes at a load of ten."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"not ready after {seconds} s"
        time.sleep(0.1)
    return found


def survivors(processes: Iterable[psutil.Process], *, seconds: float = 20.0) -> list[str]:
    """The command lines of those processes that are still there after `seconds`."""
    _, alive = psutil.wait_procs(list(processes), timeout=seconds)
    return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    """A port of this machine that nobody listens on.

    It is below those that clients are given: one who looks whether a server has started may connect to itself.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@contextmanager
def talking_otherwise() -> Iterator[str]:
    """The URL of a server that does not speak HTTP."""

    class Greeting(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-OpenSSH\r\n")
            self.request.shutdown(socket.SHUT_WR)
            while self.request.recv(4096):  # to be closed with something unread would take the greeting back
                pass

    with socketserver.TCPServer(("127.0.0.1", 0), Greeting) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
