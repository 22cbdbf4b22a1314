"""genpipe compare: measured systems side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe.cli import console
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from genpipe.artifacts import Artifact
    from genpipe.evaluation.comparison import Interval
    from genpipe.pipeline.comparing import Measured, Row

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CURVES, PICTURES = "curves.svg", "pictures.png"


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="a pipeline's YAML file, a store with scores, the URI of scores, or the id of a run in MLflow",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="a folder for held-out curves and for pictures of the same prompts")
    ] = None,
    scores: Annotated[str, typer.Option("--scores", help="which of a pipeline's instances, if several measure")] = "",
    rows: Annotated[int, typer.Option(min=1, help="prompts of each split in the picture")] = 12,
    tracking_uri: Annotated[
        str, typer.Option("--tracking-uri", help="the MLflow that run ids are of; default: MLFLOW_TRACKING_URI")
    ] = "",
) -> None:
    """Compare measured systems: their numbers, and the settings that are different.

    Differences to the first have 95 % intervals where both drew the same prompts with the same seed: by the bootstrap
    over prompts, picture by picture. A star marks those that do not hold 0. Settings are those that decide what comes
    out.

    Example: `genpipe compare runs/demo runs/wider --out comparison`
    """
    from genpipe.pipeline.comparing import Measured, settings

    if not 2 <= len(sources) <= len(LABELS):
        raise ConfigError(f"compare: takes 2 to {len(LABELS)} runs, not {len(sources)}")
    found = [_scores(source, scores, tracking_uri) for source in sources]
    runs = [Measured.at(artifact, label=label) for label, artifact in zip(LABELS, found, strict=False)]
    names = {run.label: source for run, source in zip(runs, sources, strict=True)}
    legend = [(run.label, names[run.label], run.manifest.created, run.manifest.artifact.uri) for run in runs]
    console.table(("", "run", "measured", "scores"), legend)
    _numbers(runs)
    differing = settings(runs)
    if differing:
        console.table(("stage", "setting", *names), [(stage, name, *told) for stage, name, told in differing])
    else:
        _say("no setting differs")
    if out is not None:
        _pictures(runs, names, out, rows=rows)


def _say(text: str) -> None:
    console.out.print(text, highlight=False, markup=False, soft_wrap=True)


def _scores(source: str, name: str, tracking_uri: str) -> Artifact:
    from genpipe.pipeline.systems import find_made, is_pipeline
    from genpipe.tracking.lookup import RUN_ID, scores_of_run

    if not RUN_ID.fullmatch(source):
        return find_made(source, "scores", name=name if is_pipeline(source) else "")
    where = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not where:
        raise ConfigError(f"{source}: in which MLflow? Give --tracking-uri, or set MLFLOW_TRACKING_URI")
    return scores_of_run(source, tracking_uri=where)


def _numbers(runs: Sequence[Measured]) -> None:
    """The table of numbers, and why some differences have no interval."""
    from genpipe.pipeline.comparing import numbers, unpaired_runs

    first, *others = runs
    columns = [column for run in others for column in (run.label, f"{run.label} - {first.label}")]
    rows = numbers(runs)
    differing = [row for row in rows if len(set(row.values)) > 1]
    if differing:
        console.table(("number", first.label, *columns), [_row(row) for row in differing])
    _say(f"{len(rows) - len(differing)} of {len(rows)} numbers are the same in all")
    for label, why in unpaired_runs(runs).items():
        _say(f"{label} has other pictures than {first.label}: {why}")


def _row(row: Row) -> list[str]:
    told = [row.number, _value(row.values[0]) + (_ends(row.first, "") if row.first else "")]
    for value, difference in zip(row.values[1:], row.differences, strict=True):
        told += [_value(value), _told(difference)]
    return told


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _told(difference: Interval | float | None) -> str:
    if difference is None:
        return ""
    if isinstance(difference, float):
        return f"{difference:+.4g}"
    sure = " *" if difference.low > 0 or difference.high < 0 else ""
    return f"{difference.value:+.4g}{_ends(difference, '+')}{sure}"


def _ends(of: Interval, sign: str) -> str:
    return f" [{of.low:{sign}.3g}, {of.high:{sign}.3g}]"


def _pictures(runs: Sequence[Measured], names: dict[str, str], out: Path, *, rows: int) -> None:
    """Write the curves, and the pictures of the same prompts, as far as there are some."""
    from PIL import Image

    from genpipe.evaluation.side_by_side import side_by_side
    from genpipe.pipeline.comparing import curves
    from genpipe.pipeline.curve_drawing import draw_curves

    out.mkdir(parents=True, exist_ok=True)
    if of_stages := curves(runs):
        draw_curves(of_stages, out / CURVES, names=names)
        _say(f"wrote {out / CURVES}")
    else:
        _say("no held-out curves: what was trained is the same in all, or kept none")
    samples = {run.label: run.manifest.inputs["sample"] for run in runs if "sample" in run.manifest.inputs}
    drawn = side_by_side(samples, rows=rows) if len(samples) == len(runs) else None
    if drawn is not None:
        Image.fromarray(drawn).save(out / PICTURES)
        _say(f"wrote {out / PICTURES}")
    else:
        _say("no pictures: there is no prompt that all runs have drawn")
