"""`genpipe sample`: pictures of prompts, drawn with a trained system."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

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
)

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
) -> None:
    """Draw pictures of prompts with a trained system. The training data are not needed.

    Writes one PNG, a grid with a row for each prompt. With a folder as `--out` each picture is a file of its own, too,
    `00000.png` and so on, whose text fields have its prompt, seed and the system's fingerprint; the grid is then in the
    folder and shows the first 64 prompts.

    Examples: `genpipe sample configs/pipeline/demo.yaml "a red apple, drawn in twemoji style" --out apple.png`,
    `genpipe sample runs/demo --prompts prompts.txt --each 1 --out pictures`
    """
    folder = folder_of(out)
    texts = list(prompts or [])
    if prompt_file:
        from genpipe.generation.prompts import read_prompts

        texts += read_prompts(prompt_file, setting="--prompts")

    from genpipe import api
    from genpipe.loaded_system import BATCH_SIZE

    drawn = api.load(source, system=system).sample(
        texts,
        labels=labels or [],
        negative=negative,
        each=each,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        batch_size=batch_size or BATCH_SIZE,
        on_picture=None if folder is None else partial(write_numbered, folder=folder),
    )
    shown = drawn if folder is None else drawn[: GRID_ROWS * each]
    rows = [shown[i : i + each] for i in range(0, len(shown), each)]
    captions = [row[0].info.get("prompt", row[0].info.get("label", "")) for row in rows]
    grid = out if folder is None else folder / GRID
    write_grid(rows, grid, captions=captions, columns=[""] * each)
    say_written(grid, len(drawn) if folder else 0)
