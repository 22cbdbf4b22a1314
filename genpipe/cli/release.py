"""`genpipe verify`: whether a release is what was made. `genpipe promote`: which one of a model is used."""

from __future__ import annotations

from typing import Annotated

import typer

from genpipe.cli import console
from genpipe.config import ConfigError


def verify(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="a release's folder, may be under s3://")],
    tolerance: Annotated[
        float, typer.Option(min=0, max=255, help="largest difference of a pixel of the grid, in levels of 0 to 255")
    ] = 2.0,
) -> None:
    """Say whether a release is what was made: hash every file, and draw its grid once more.

    On the machine that drew it, with the same torch, the grid is the same bit for bit. Elsewhere sums are rounded
    otherwise, and a system may make more of that than `--tolerance` allows; the files' hashes then speak alone. Exits 1
    if a file differs, or the grid by more than the tolerance.
    """
    import torch

    from genpipe.release.verify import verify as verify_release

    verdict = verify_release(release, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for sentence in verdict.damaged:
        console.problem(sentence)
    if not verdict.damaged:
        _say(f"{verdict.files} files: each is as it was made")
    for sentence in verdict.elsewhere:
        _say(f"another machine: {sentence}")
    if verdict.largest is None or verdict.mean is None:
        console.problem(verdict.fault)
    elif verdict.largest == 0:
        _say("the grid: the same bit for bit")
    else:
        tell = _say if verdict.largest <= tolerance else console.problem
        tell(f"the grid: a pixel differs by up to {verdict.largest} of 255 levels, by {verdict.mean:.3g} on average")
    if not verdict.holds(tolerance=tolerance):
        raise typer.Exit(1)


def promote(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a registered model's name")],
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help="its number, or an alias")] = "candidate",
    tracking_uri: Annotated[
        str,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI", help="the MLflow that has it, such as sqlite:///STORE/mlflow.db of a store"
        ),
    ] = "",
) -> None:
    """Make a release the champion of its model: what `models:/MODEL@champion` stands for.

    Every release that a pipeline makes is registered, and is the model's candidate until a newer one is.

    Example: `genpipe promote apples 3`, then `genpipe sample models:/apples@champion "a red apple"`
    """
    from genpipe.tracking.registry import CHAMPION
    from genpipe.tracking.registry import promote as promote_version

    if not tracking_uri:
        raise ConfigError(f"{model}: in which MLflow? Give --tracking-uri, or set MLFLOW_TRACKING_URI")
    artifact = promote_version(model, version, tracking_uri=tracking_uri)
    _say(f"models:/{model}@{CHAMPION} is {artifact.uri}")


def _say(text: str) -> None:
    console.out.print(text, highlight=False, markup=False, soft_wrap=True)
