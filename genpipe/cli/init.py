"""`genpipe init`: a pipeline's YAML file for one's own folder of images."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

import click
import typer

from genpipe.cli import console
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from genpipe.pipeline.graph import Pipeline

Machine = Literal["cpu", "gpu"]
Captions = Literal["files", "folders"]
Size = Literal["128", "256", "512"]

C = TypeVar("C", bound=str)
FILE = "pipeline.yaml"
SIZES: dict[str, Size] = {"cpu": "128", "gpu": "256"}
HELDOUT = 16
"""Images that are to be held out of a small folder, which is up to a fifth of it."""

CAPTIONS = {
    "files": "# captions: the .txt beside each image, or metadata.csv, .jsonl or .parquet (file_name, text)",
    "folders": 'label: folder  # the class of an image\n      captions: ["a photo of a {label}"]',
}


def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="where the file and all that is made go")] = Path(),
    images: Annotated[str, typer.Option("--images", help="your folder of images, or s3://bucket/prefix")] = "",
    captions: Annotated[
        Captions | None,
        typer.Option(help="in .txt or metadata files, or the names of the images' folders; default: as found"),
    ] = None,
    machine: Annotated[
        Machine | None, typer.Option(help="what it is to be trained on; default: a GPU, if there is one here")
    ] = None,
    size: Annotated[
        Size | None, typer.Option(help="pictures' side in pixels; default: 128 on a CPU, 256 on a GPU")
    ] = None,
) -> None:
    """Write a pipeline for your own images, FOLDER/pipeline.yaml, with a comment on each part, and check it.

    On a terminal it asks for what is not given; elsewhere it takes what it finds.

    Example: `genpipe init mine --images ~/pictures --machine cpu`
    """
    path = folder / FILE
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another folder, or delete it")
    images = _located(images or _ask("folder of images", option="--images"), folder)
    names = _files(images)
    machine = machine or _choose("machine", get_args(Machine), default=_machine_here())
    captions = captions or _choose("captions from", get_args(Captions), default=_captions_in(names))
    size = size or _choose("size in pixels", get_args(Size), default=SIZES[machine])
    count = sum(_is_image(name) for name in names)
    text = _filled(path, images=images, count=count, captions=captions, machine=machine, size=int(size))
    pipeline = _written(path, text)
    console.out.print(f"wrote {path}: {count} images, drawn at {size} px", highlight=False, soft_wrap=True)
    _tell_what_next(path, _first_caption(pipeline))


def _located(images: str, folder: Path) -> str:
    """The images as the YAML names them. Raises ConfigError where what is made would lie among them."""
    if "://" in images:
        return images
    root = Path(images).expanduser().absolute()
    if folder.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"{folder.absolute()}: lies in the folder of images, so what is made would be taken for more of them; name "
            f"another, such as `genpipe init ../{root.name}-system --images {shlex.quote(images)}`"
        )
    return str(root)


def _files(images: str) -> list[str]:
    """The names of the files in the folder of images. Raises ConfigError if it is not there or has no images."""
    from genpipe.data.sources.listing import IMAGE_SUFFIXES, is_hidden
    from genpipe.storage import local_path, open_storage

    root = local_path(images)
    if root is not None and not root.is_dir():
        raise ConfigError(f"--images {images}: there is no such folder; give the one that holds your images")
    names = [entry.key for entry in open_storage(images).list() if not is_hidden(entry.key)]
    if not any(map(_is_image, names)):
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ConfigError(f"--images {images}: no images in it or its subfolders (looked for {known})")
    return names


def _is_image(name: str) -> bool:
    from genpipe.data.sources.listing import IMAGE_SUFFIXES, suffix_of

    return suffix_of(name) in IMAGE_SUFFIXES


def _captions_in(names: Sequence[str]) -> Captions:
    """Where the captions are as it seems: in files, if there are such, or else all images lie in folders."""
    from genpipe.data.sources.folder import METADATA_NAMES

    if any(name.endswith(".txt") or name.rpartition("/")[2] in METADATA_NAMES for name in names):
        return "files"
    return "folders" if all("/" in name for name in names if _is_image(name)) else "files"


def _machine_here() -> Machine:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _ask(what: str, *, option: str) -> str:
    """What a person types. Raises ConfigError where nobody can."""
    if not sys.stdin.isatty():
        raise ConfigError(f"{option}: required; give the {what}")
    answer: str = typer.prompt(what)
    return answer


def _choose(what: str, choices: Sequence[C], *, default: C) -> C:
    """One of the choices: a person's, or the default where nobody can be asked."""
    if not sys.stdin.isatty():
        return default
    answer: C = typer.prompt(what, default=default, type=click.Choice(choices))
    return answer


def _filled(path: Path, *, images: str, count: int, captions: Captions, machine: Machine, size: int) -> str:
    """The text of the YAML file."""
    template = files("genpipe.cli").joinpath("templates", f"{machine}.yaml").read_text(encoding="utf-8")
    return Template(template).substitute(
        here=path,
        name=json.dumps(path.absolute().parent.name, ensure_ascii=False),
        images=json.dumps(images, ensure_ascii=False),
        captions=CAPTIONS[captions],
        size=size,
        base=size // 2,
        heldout=round(max(0.05, min(0.2, HELDOUT / count)), 2),
    )


def _written(path: Path, text: str) -> Pipeline:
    """The file, written and checked. Raises ConfigError, and leaves no file, if it does not fit the images."""
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.plan import plan

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        pipeline = load_pipeline(str(path))
        plan(pipeline)
    except ValueError as error:
        path.unlink()
        raise ConfigError(f"{error}\nnothing was written; --captions says where captions are") from None
    return pipeline


def _first_caption(pipeline: Pipeline) -> str:
    """That of the first image which has one."""
    from genpipe.data.samples import Sample
    from genpipe.data.sources import open_source

    cfg = pipeline.instances["shard"].cfg
    source = open_source(cfg.source, part_size=cfg.part_size)  # type: ignore[attr-defined]
    samples = (sample for part in source.parts() for sample in source.read(part) if isinstance(sample, Sample))
    first = next(samples, None)
    return first.captions[0] if first else "a prompt"


def _tell_what_next(path: Path, caption: str) -> None:
    file = shlex.quote(str(path))
    commands = {
        f"genpipe plan {file}": "what will run, and what it costs",
        f"genpipe run {file}": "trains it; after Ctrl-C the same command goes on",
        f"genpipe sample {file} {shlex.quote(caption)}": "draws, once it is trained",
    }
    console.out.print("next:", highlight=False)
    for command, meaning in commands.items():
        console.out.print(f"  {command}  # {meaning}", highlight=False, markup=False, soft_wrap=True)
