"""`genpipe gallery`: a page to draw with a system, and to look at what its pipeline has drawn."""

from __future__ import annotations

from typing import Annotated

import typer

from genpipe.cli.pictures import Source, SystemName


def gallery(
    source: Source,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the page on 127.0.0.1")] = 5001,
    system: SystemName = "",
) -> None:
    """Serve a page to draw with a system, on this machine alone: prompts, variations, image to image, text diffs.

    It shows what the system's pipeline has drawn as well, each picture beside the training pictures nearest to it.

    Example: `genpipe gallery runs/demo`
    """
    from genpipe import api
    from genpipe.gallery.app import serve
    from genpipe.gallery.drawn import Drawings

    loaded = api.load(source, system=system)
    serve(loaded, Drawings.of(loaded.artifact), port=port)
