"""What the commands that draw share: their options, and how pictures are written."""

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
GAP = 6

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="a pipeline's YAML file, a store with one system, a system's URI, a release, or models:/NAME@ALIAS",
    ),
]
PictureFile = Annotated[str, typer.Argument(metavar="PICTURE", help="a picture's file, may be under s3://")]
SystemName = Annotated[str, typer.Option("--system", help="which of the pipeline's systems, if it has several")]
Out = Annotated[
    Path, typer.Option("--out", help="a PNG for all pictures; or a folder for each picture by itself, and all")
]
Seed = Annotated[int, typer.Option(help="the same seed and settings give the same pictures")]
Steps = Annotated[int | None, typer.Option(min=1, help="of the decoder's sampler; default: as trained")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="the decoder's guidance scale, 1 for none; default: as trained")
]
Negative = Annotated[str, typer.Option("--negative", help="what the pictures shall not show; needs guidance")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="pictures drawn at a time")]


def folder_of(out: Path) -> Path | None:
    """The folder for single pictures, None for one PNG of all; made, as is that of the PNG. Raises ConfigError."""
    single = out.suffix.lower() == ".png" and not out.is_dir()
    if not single and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ConfigError(f"--out {out}: pictures are written as PNG; name a .png file, or a folder")
    try:
        (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: the folder cannot be made ({error}); name another") from None
    return None if single else out


def write_picture(picture: Image.Image, path: Path) -> None:
    """One picture, with what is known of it in the PNG's text fields."""
    from genpipe.generation.pictures import png_file

    path.write_bytes(png_file(picture))


def write_numbered(picture: Image.Image, folder: Path) -> None:
    """One picture as `00000.png` and so on, by its number."""
    write_picture(picture, folder / f"{int(picture.info['number']):05d}.png")


def write_row(pictures: Sequence[Image.Image], out: Path, folder: Path | None) -> None:
    """Pictures beside one another in a PNG, or in a folder each by itself and all; says where they are."""
    from PIL import Image

    if folder is not None:
        for picture in pictures:
            write_numbered(picture, folder)
    path = out if folder is None else folder / GRID
    if folder is None and len(pictures) == 1:
        write_picture(pictures[0], path)
    else:
        row = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, max(p.height for p in pictures)), "white")
        left = 0
        for picture in pictures:
            row.paste(picture, (left, 0))
            left += picture.width + GAP
        row.save(path)
    say_written(path, len(pictures) if folder else 0)


def write_grid(
    rows: Sequence[Sequence[Image.Image]], path: Path, *, captions: Sequence[str], columns: Sequence[str]
) -> None:
    """Square pictures of one size in a PNG, a row for each caption, columns with titles."""
    import numpy as np
    from PIL import Image

    from genpipe.evaluation.grids import labeled_grid

    arrays = [[np.asarray(picture) for picture in row] for row in rows]
    grid = labeled_grid(arrays, captions=captions, columns=columns, cell=len(arrays[0][0]))
    Image.fromarray(grid).save(path)


def say_written(path: Path, beside: int) -> None:
    """Tell where the pictures are, and how many there are beside that file."""
    many = f" and {beside} pictures beside it" if beside else ""
    console.out.print(f"wrote {path}{many}", highlight=False, soft_wrap=True)
