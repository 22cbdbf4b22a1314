"""`genpipe ema`: weights of another average, when the training is over."""

from __future__ import annotations

from typing import Annotated

import typer

from genpipe.cli import console


def ema(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="URI of what was trained with ema_snapshots")],
    sigma_rel: Annotated[
        list[float], typer.Option("--sigma-rel", metavar="WIDTH", help="in shares of the training; may be repeated")
    ],
) -> None:
    """Make the weights that an average of another width would have had, from the averages that were kept.

    Karras et al. 2024 (EDM2), section 3.2. Each is an artifact beside the first, for `inputs` of other stages.

    Example: `genpipe ema runs/demo/artifacts/decoder/0123456789abcdef --sigma-rel 0.08 --sigma-rel 0.15`
    """
    from genpipe.training.averages import reconstruct

    for width in sigma_rel:
        made, error = reconstruct(artifact, sigma_rel=width)
        console.out.print(f"{width:g} (profile met to {error:.1e}): {made.uri}", highlight=False, soft_wrap=True)
