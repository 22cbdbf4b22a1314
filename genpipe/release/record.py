"""`release.json`: what a release holds, with what it was made, and how its grid is drawn again."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from pydantic import Field

from genpipe import __version__
from genpipe.artifacts import sha256_file
from genpipe.config import Config
from genpipe.models.precision import Products
from genpipe.revision import git_revision

RECORD_FILE, GRID_FILE = "release.json", "grid.png"
CPU_INFO = Path("/proc/cpuinfo")


class GridPrompt(Config):
    """What a row of the grid shows. `label` is the place of a class, -1 without one."""

    text: str
    label: int


class Grid(Config):
    """How the grid was drawn: row by row, each by a generator of its own."""

    prompts: tuple[GridPrompt, ...] = Field(min_length=1)
    each: int = Field(ge=1, description="pictures of a row")
    seed: int
    precision: Products = Field(description="of matrix products, as it was used")
    threads: int = Field(ge=1, description="of the CPU, which sums in another order with more")


class Machine(Config):
    """What computed the grid: the same one draws the same bits."""

    torch: str
    hardware: str


class ReleaseRecord(Config):
    """The whole of `release.json`. `files` has the sha256 of every other file but the store's own manifest.json."""

    format: int = 1
    system: str = Field(description="the fingerprint of the system")
    made_from: dict[str, tuple[str, ...]] = Field(description="fingerprints of all that is behind it, by kind")
    genpipe: str
    revision: str = Field(description="of genpipe's checkout; empty for an installed package")
    machine: Machine
    grid: Grid
    files: dict[str, str]


def write_record(
    folder: Path, *, system: str, made_from: dict[str, tuple[str, ...]], grid: Grid, device: torch.device
) -> ReleaseRecord:
    """Hash everything in `folder`, and write `release.json` there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    record = ReleaseRecord(
        system=system,
        made_from=made_from,
        genpipe=__version__,
        revision=git_revision(),
        machine=machine_of(device),
        grid=grid,
        files={path.relative_to(folder).as_posix(): sha256_file(path) for path in paths},
    )
    (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    return record


def machine_of(device: torch.device) -> Machine:
    """What computes on `device`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return Machine(torch=torch.__version__, hardware=name)


def _cpu() -> str:
    """The processor's name where the system tells it, and its architecture."""
    lines = CPU_INFO.read_text("utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or 'CPU'])[0]} ({platform.machine()})"
