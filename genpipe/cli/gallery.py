"""`genpipe gallery`: a page to draw with a system, and to look at what its pipeline has drawn."""

from __future__ import annotations

from typing import Annotated

import typer

from genpipe.cli import console
from genpipe.cli.arguments import Port
from genpipe.cli.pictures import Source, SystemName


def gallery(
    source: Source,
    port: Port = 5001,
    system: SystemName = "",
    tracking_uri: Annotated[
        str,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="the MLflow that has the runs; default: the pipeline's"),
    ] = "",
) -> None:
    """Serve a page to draw with a system, on this machine alone: prompts, variations, image to image, text diffs.

    It shows what the system's pipeline has drawn as well, each picture beside the training pictures nearest to it, and
    what its parts drew while they were trained.

    Example: `genpipe gallery runs/demo`
    """
    from genpipe import api
    from genpipe.evaluation.drawn import Drawings
    from genpipe.gallery.app import serve
    from genpipe.gallery.history import training_pictures
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.systems import is_pipeline

    loaded = api.load(source, system=system)
    where = tracking_uri or (load_pipeline(source).tracking_uri if is_pipeline(source) else "")
    try:
        training = training_pictures(loaded.artifact, tracking_uri=where)
    except ValueError as error:
        console.problem(f"what was drawn in training is not shown: {error}")
        training = []
    serve(loaded, Drawings.of(loaded.artifact), training, port=port)
