"""`genpipe vary`, `blend`, `edit`, `components`, `signals` and `attack`: what a system does besides drawing prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genpipe.cli import console
from genpipe.cli.pictures import (
    BatchSize,
    Guidance,
    Negative,
    Out,
    PictureFile,
    Seed,
    Source,
    Steps,
    SystemName,
    folder_of,
    say_written,
    write_grid,
    write_row,
)
from genpipe.config import ConfigError

PICTURES = Path("pictures.png")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def vary(
    source: Source,
    picture: PictureFile,
    eta: Annotated[float, typer.Option(min=0, max=1, help="how much is new: at 0 the picture comes back")] = 1.0,
    each: Annotated[int, typer.Option("--each", min=1, help="how many variations")] = 4,
    system: SystemName = "",
    out: Out = PICTURES,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: BatchSize = None,
) -> None:
    """Draw variations of a picture: what CLIP sees of it stays (unCLIP, section 3.1). For systems of kind unclip.

    Example: `genpipe vary runs/demo pictures/00003.png --out variations.png`
    """
    from genpipe import api
    from genpipe.loaded_system import BATCH_SIZE

    folder = folder_of(out)
    drawn = api.load(source, system=system).vary(
        picture,
        eta=eta,
        each=each,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        batch_size=batch_size or BATCH_SIZE,
    )
    write_row(drawn, out, folder)


def blend(
    source: Source,
    first: Annotated[str, typer.Argument(metavar="FIRST", help="a picture's file, or a caption")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="another")],
    count: Annotated[int, typer.Option(min=2, help="how many pictures, both ends included")] = 5,
    system: SystemName = "",
    out: Out = PICTURES,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Draw what lies between two pictures or captions (unCLIP, section 3.2). For systems of kind unclip.

    An end whose name ends as those of pictures do, `.png` and so on, is a file.

    Example: `genpipe blend runs/demo cat.png "a red apple" --out between.png`
    """
    from genpipe import api

    folder = folder_of(out)
    ends = [Path(end) if end.lower().endswith(SUFFIXES) else end for end in (first, second)]
    drawn = api.load(source, system=system).blend(*ends, count=count, seed=seed, steps=steps, guidance_scale=guidance)
    write_row(drawn, out, folder)


def edit(
    source: Source,
    picture: PictureFile,
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="what the picture is to show")] = "",
    strength: Annotated[
        float | None, typer.Option(help="draw all of it anew from this time in (0, 1]; 0.6 changes details (SDEdit)")
    ] = None,
    mask: Annotated[
        str, typer.Option(metavar="FILE", help="draw anew where this picture is white, keep the rest (RePaint)")
    ] = "",
    transparent: Annotated[bool, typer.Option("--transparent", help="the same where the picture is clear")] = False,
    extend: Annotated[
        str, typer.Option(metavar="L,T,R,B", help="draw so many pixels more at left, top, right and bottom")
    ] = "",
    before: Annotated[
        str | None, typer.Option(help="what it shows now: change it by the difference of the captions (unCLIP, 3.3)")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="a class, by name or number")] = None,
    negative: Negative = "",
    each: Annotated[int, typer.Option("--each", min=1, help="how many pictures; not with --before")] = 1,
    system: SystemName = "",
    out: Out = PICTURES,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Change a picture, in one of five ways: `--strength`, `--mask`, `--transparent`, `--extend` or `--before`.

    All but the last are for systems of all kinds, told of the picture what they are told by `genpipe sample`; the last
    is for systems of kind unclip, and draws a picture for each of five distances.

    Examples: `genpipe edit runs/demo photo.png "a red apple" --mask mask.png`,
    `genpipe edit runs/demo apple.png "a green apple" --before "a red apple"`
    """
    ways = {
        "--strength": strength is not None,
        "--mask": bool(mask),
        "--transparent": transparent,
        "--extend": bool(extend),
        "--before": before is not None,
    }
    if sum(ways.values()) != 1:
        raise ConfigError(f"edit: say how, with one of {', '.join(ways)}")
    border, folder = _border(extend), folder_of(out)

    from genpipe import api

    loaded = api.load(source, system=system)
    drawing: dict[str, Any] = {"seed": seed, "steps": steps, "guidance_scale": guidance}
    if before is not None:
        if label is not None or negative or each != 1:
            raise ConfigError("--before: takes no --label, --negative and --each; leave them out")
        write_row(loaded.change(picture, prompt, before=before, **drawing), out, folder)
        return
    drawing |= {"label": label, "negative": negative, "each": each, **border}
    if strength is not None:
        drawn = loaded.redraw(picture, prompt, strength=strength, **drawing)
    elif border:
        drawn = loaded.outpaint(picture, prompt, **drawing)
    else:
        drawn = loaded.inpaint(picture, prompt, mask=mask or None, **drawing)
    write_row(drawn, out, folder)


def components(
    source: Source,
    picture: PictureFile,
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[OTHER]...", help="pictures to find the components in")
    ] = None,
    keep: Annotated[
        list[int] | None, typer.Option("--keep", min=0, help="how many; may be repeated. Default: 1, 2, 4, ... all")
    ] = None,
    system: SystemName = "",
    out: Out = PICTURES,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Draw what CLIP sees of a picture with ever more principal components (unCLIP, figure 7). For kind unclip.

    Without other pictures the components are those that an autoregressive prior was fitted with.

    Example: `genpipe components runs/demo apple.png pictures/*.png --out components.png`
    """
    from genpipe import api

    folder = folder_of(out)
    drawn = api.load(source, system=system).reconstruct(
        picture, components=keep, pictures=others or [], seed=seed, steps=steps, guidance_scale=guidance
    )
    write_row(drawn, out, folder)


def signals(
    source: Source,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="captions, a row each")],
    system: SystemName = "",
    out: Annotated[Path, typer.Option("--out", help="a PNG for the figure")] = Path("signals.png"),
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Draw captions by what of them the decoder is told (unCLIP, figure 8). For systems of kind unclip.

    Nothing; the caption; with it CLIP's text embedding where the image embedding is expected; with it the prior's.

    Example: `genpipe signals runs/demo "a red apple" "a green pear" --out signals.png`
    """
    from genpipe import api
    from genpipe.generation.signals import SIGNALS

    _check_figure(out)
    rows = api.load(source, system=system).signals(prompts, seed=seed, steps=steps, guidance_scale=guidance)
    write_grid(rows, out, captions=prompts, columns=SIGNALS)
    say_written(out, 0)


def attack(
    source: Source,
    picture: PictureFile,
    labels: Annotated[
        list[str], typer.Argument(metavar="LABEL...", help="what the picture shows, then what is written on it")
    ],
    caption: Annotated[str, typer.Option(help="what CLIP is told of a label, which stands at the {}")] = "{}",
    each: Annotated[int, typer.Option("--each", min=1, help="how many variations")] = 4,
    system: SystemName = "",
    out: Annotated[Path, typer.Option("--out", help="a PNG for the figure")] = Path("attack.png"),
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Write words on a picture: what CLIP takes it for, and what the decoder draws (unCLIP, figure 6). For kind unclip.

    Each label but the first is written on the picture, and CLIP chooses among all of them.

    Example: `genpipe attack runs/demo apple.png apple clock --caption "an emoji of a {}" --out attack.png`
    """
    from genpipe import api

    _check_figure(out)
    loaded = api.load(source, system=system)
    found = loaded.attack(picture, labels, caption=caption, each=each, seed=seed, steps=steps, guidance_scale=guidance)
    shares = [[f"{share:.3f}" for share in of.probabilities.values()] for of in found]
    console.table(("written", *labels), [(of.words or "nothing", *row) for of, row in zip(found, shares, strict=True)])
    told = [", ".join(map(" ".join, zip(labels, row, strict=True))) for row in shares]
    captions = [f"{of.words or 'nothing'}: {of_it}" for of, of_it in zip(found, told, strict=True)]
    columns = ("written on it", *("a variation",) * each)
    write_grid([[of.picture, *of.variations] for of in found], out, captions=captions, columns=columns)
    say_written(out, 0)


def _check_figure(out: Path) -> None:
    """Raise ConfigError unless the figure can be written there."""
    if folder_of(out) is not None:
        raise ConfigError(f"--out {out}: the figure is one picture; name a .png file")


def _border(extend: str) -> dict[str, int]:
    """The border that `--extend` asks for. Raises ConfigError."""
    if not extend:
        return {}
    numbers = extend.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"--extend {extend}: give four numbers of pixels, as 64,0,64,0 for left and right")
    return dict(zip(("left", "top", "right", "bottom"), map(int, numbers), strict=True))
