"""`genpipe sample`: pictures of prompts, drawn with a trained system."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe.cli.pictures import (
    GRID,
    BatchSize,
    Guidance,
    Negative,
    Source,
    Steps,
    SystemName,
    folder_of,
    say_written,
    write_grid,
    write_numbered,
    write_row,
)
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from PIL import Image

GRID_ROWS = 64


def sample(
    source: Source,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="what to draw")] = None,
    prompt_file: Annotated[
        str, typer.Option("--prompts", metavar="FILE", help="draw these as well, one a line; may be under s3://")
    ] = "",
    negative: Negative = "",
    system: SystemName = "",
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="a class to draw, by name or number; may be repeated")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="a PNG for the grid; or a folder for each picture by itself, and the grid")
    ] = Path(GRID),
    seed: Annotated[int, typer.Option(help="the same prompts, seed and batch size give the same pictures")] = 0,
    each: Annotated[int, typer.Option("--each", min=1, help="pictures of each prompt or class")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: BatchSize = None,
    draft: Annotated[bool, typer.Option("--draft", help="leave the pictures as the decoder makes them, small")] = False,
    pick: Annotated[
        list[int] | None,
        typer.Option("--pick", min=0, help="draw this picture alone, by its number in the grid; may be repeated"),
    ] = None,
    variations: Annotated[
        int | None, typer.Option("--vary", min=1, help="draw so many variations of the one that is picked instead")
    ] = None,
) -> None:
    """Draw pictures of prompts with a trained system. The training data are not needed.

    Writes one PNG, a grid with a row for each prompt. With a folder as `--out` each picture is a file of its own, too,
    `00000.png` and so on, whose text fields have its prompt, seed and the system's fingerprint; the grid is then in the
    folder and shows the first 64 prompts.

    Look at many as a `--draft`, without the upsamplers; then ask again with `--pick` and their numbers: the same
    pictures are drawn, enlarged, and no others. `--vary` draws variations of the picked one, as `genpipe vary` does.

    Examples: `genpipe sample configs/pipeline/demo.yaml "a red apple, drawn in twemoji style" --out apple.png`,
    `genpipe sample runs/demo --prompts prompts.txt --each 1 --out pictures`,
    `genpipe sample runs/demo "a red apple" --each 16 --draft`, then `... --each 16 --pick 3 --out apple.png`
    """
    if variations is not None and (len(pick or []) != 1 or draft):
        raise ConfigError("--vary: say of which picture, with one --pick, and leave out --draft")
    folder = folder_of(out)
    texts = list(prompts or [])
    if prompt_file:
        from genpipe.generation.prompts import read_prompts

        texts += read_prompts(prompt_file, setting="--prompts")

    from genpipe import api
    from genpipe.loaded_system import BATCH_SIZE

    loaded = api.load(source, system=system)
    drawn = loaded.sample(
        texts,
        labels=labels or [],
        negative=negative,
        each=each,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        batch_size=batch_size or BATCH_SIZE,
        numbers=pick or None,
        draft=draft or variations is not None,
        on_picture=None if folder is None or pick else partial(write_numbered, folder=folder),
    )
    if variations is not None:
        drawn = loaded.vary(drawn[0], each=variations, seed=seed, steps=steps, guidance_scale=guidance)
    if pick:
        write_row(drawn, out, folder)
        return
    shown = drawn if folder is None else drawn[: GRID_ROWS * each]
    rows = [shown[i : i + each] for i in range(0, len(shown), each)]
    grid = out if folder is None else folder / GRID
    write_grid(rows, grid, captions=[_caption(row) for row in rows], columns=[""] * each)
    say_written(grid, len(drawn) if folder else 0)


def _caption(row: Sequence[Image.Image]) -> str:
    """What a row of the grid shows, after the numbers of its pictures."""
    first, last = (row[place].info for place in (0, -1))
    numbers = first["number"] if len(row) == 1 else f"{first['number']} to {last['number']}"
    return ": ".join(filter(None, (numbers, first.get("prompt", first.get("label")))))
