"""`genpipe gc`: what a store keeps for nothing, and its deletion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe.cli import console
from genpipe.storage import local_path

if TYPE_CHECKING:
    from genpipe.launch.garbage import Folder

DAY_SECONDS = 86400
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def gc(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE|CONFIG... [PATH=VALUE]...",
            help="a store, or pipelines' YAML files whose plans are kept; settings as they are run with",
        ),
    ],
    days: Annotated[float, typer.Option(min=0, help="what was written to since stays")] = 14,
    delete: Annotated[
        bool, typer.Option("--delete", help="delete what would go; otherwise nothing is touched")
    ] = False,
) -> None:
    """List what a store holds and why, and delete what nothing refers to.

    An artifact stays if it is registered as a model, in the plan of a CONFIG or of a deployment from this store, at
    work, or young, and if something that stays was made from it. Unfinished work and its checkpoints stay likewise.
    Artifacts that only pipelines of other stores name by their URI are not known here: give those CONFIGs, too.
    """
    from genpipe.launch import garbage
    from genpipe.pipeline.graph import load_pipeline

    named = [argument for argument in arguments if "=" not in argument]
    configs = [name for name in named if name.endswith((".yaml", ".yml"))]
    pipelines = [load_pipeline(name, [each for each in arguments if "=" in each]) for name in configs]
    store = _store([*(name for name in named if name not in configs), *(pipeline.cfg.store for pipeline in pipelines)])
    folders = garbage.survey(store, pipelines, days=days)
    rows = [
        (
            folder.path,
            _size(folder.size),
            _age(folder.age),
            "stays" if folder.stays else "goes",
            folder.stays or _why(folder),
        )
        for folder in folders
    ]
    console.table(("below the store", "size", "days", "", "why"), rows)
    going = [folder for folder in folders if not folder.stays]
    if delete:
        gone = []
        for folder, went in garbage.delete(store, going):
            gone += [folder] * went
            if not went:
                console.problem(f"{folder.path}: stays: somebody is at it now")
        going = gone
    sizes = [_size(sum(folder.size for folder in some)) for some in (going, folders)]
    total = f"{len(going)} of {len(folders)} folders, {sizes[0]} of {sizes[1]}"
    said = f"deleted {total}" if delete else f"would delete {total}; --delete does"
    console.out.print(said, highlight=False)


def _store(named: Sequence[str]) -> str:
    """The store that is meant: the first one. Raises ValueError where none is named, or none is there."""
    if not named:
        raise typer.BadParameter("give a store, or a pipeline's YAML file")
    here = local_path(named[0])
    if here is not None and not any((here / room).is_dir() for room in ("artifacts", "work", "runs")):
        raise ValueError(f"{named[0]}: no store is here (it has neither artifacts/ nor work/); correct the path")
    return named[0] if here is None else str(here.absolute())


def _why(folder: Folder) -> str:
    return "nothing refers to it" if folder.committed else "unfinished, or left over, and nobody is at it"


def _size(size: float) -> str:
    """Bytes as a person writes them."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{size} B"


def _age(seconds: float) -> str:
    return f"{seconds / DAY_SECONDS:.1f}" if seconds != float("inf") else ""
