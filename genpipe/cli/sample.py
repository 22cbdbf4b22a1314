"""`genpipe sample`: pictures of prompts, drawn with a trained system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe.cli import console
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from PIL import Image

GRID = "grid.png"
GRID_ROWS = 64


def sample(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a pipeline's YAML file, a store with one system, a system's URI, or models:/NAME@ALIAS",
        ),
    ],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="what to draw")] = None,
    prompt_file: Annotated[
        str, typer.Option("--prompts", metavar="FILE", help="draw these as well, one a line; may be under s3://")
    ] = "",
    system: Annotated[str, typer.Option("--system", help="which of the pipeline's systems, if it has several")] = "",
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="a class to draw, by name or number; may be repeated")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="a PNG for the grid; or a folder for each picture by itself, and the grid")
    ] = Path(GRID),
    seed: Annotated[int, typer.Option(help="the same prompts, seed and batch size give the same pictures")] = 0,
    each: Annotated[int, typer.Option("--each", min=1, help="pictures of each prompt or class")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="of the decoder's sampler; default: as trained")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="the decoder's guidance scale, 1 for none; default: as trained")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="pictures drawn at a time")] = None,
) -> None:
    """Draw pictures of prompts with a trained system. The training data are not needed.

    Writes one PNG, a grid with a row for each prompt. With a folder as `--out` each picture is a file of its own, too,
    `00000.png` and so on, whose text fields have its prompt, seed and the system's fingerprint; the grid is then in the
    folder and shows the first 64 prompts.

    Examples: `genpipe sample configs/pipeline/demo.yaml "a red apple, drawn in twemoji style" --out apple.png`,
    `genpipe sample runs/demo --prompts prompts.txt --each 1 --out pictures`
    """
    folder = _folder(out)
    texts = list(prompts or [])
    if prompt_file:
        from genpipe.generation.prompts import read_prompts

        texts += read_prompts(prompt_file, setting="--prompts")

    from genpipe import api

    drawn = api.load(source, system=system).sample(
        texts,
        labels=labels or [],
        each=each,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        batch_size=batch_size or api.BATCH_SIZE,
        on_picture=None if folder is None else lambda picture: _write(picture, folder),
    )
    grid = out if folder is None else folder / GRID
    _write_grid(drawn if folder is None else drawn[: GRID_ROWS * each], grid, each=each)
    many = f" and {len(drawn)} pictures beside it" if folder else ""
    console.out.print(f"wrote {grid}{many}", highlight=False, soft_wrap=True)


def _folder(out: Path) -> Path | None:
    """The folder for single pictures, None for a grid alone; made, as is that of the grid. Raises ConfigError."""
    single = out.suffix.lower() == ".png" and not out.is_dir()
    if not single and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ConfigError(f"--out {out}: pictures are written as PNG; name a .png file, or a folder")
    try:
        (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: the folder cannot be made ({error}); name another") from None
    return None if single else out


def _write(picture: Image.Image, folder: Path) -> None:
    """One picture, with what is known of it in the PNG's text fields."""
    from PIL.PngImagePlugin import PngInfo

    fields = PngInfo()
    for name, text in picture.info.items():
        fields.add_text(str(name), text)
    picture.save(folder / f"{int(picture.info['number']):05d}.png", pnginfo=fields)


def _write_grid(pictures: Sequence[Image.Image], path: Path, *, each: int) -> None:
    import numpy as np
    from PIL import Image

    from genpipe.evaluation.grids import labeled_grid

    arrays = [np.asarray(picture) for picture in pictures]
    captions = [picture.info.get("prompt", picture.info.get("label", "")) for picture in pictures[::each]]
    rows = [arrays[i : i + each] for i in range(0, len(arrays), each)]
    grid = labeled_grid(rows, captions=captions, columns=[""] * each, cell=len(arrays[0]))
    Image.fromarray(grid).save(path)
