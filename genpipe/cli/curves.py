"""`genpipe curves`: held-out curves in a file, which goes where their store does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe.cli import console
from genpipe.cli.arguments import ConfigFile, Overrides
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from genpipe.pipeline.curves import KeptCurves
    from genpipe.pipeline.graph import Pipeline
    from genpipe.pipeline.spec import Curve

DIGITS = 5
"""What a band says of a number; the rest is noise that a diff would show."""


def curves(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="the file")] = Path("curves.json"),
) -> None:
    """Keep the held-out curves of a pipeline's trainings in a file that later trainings are held against.

    They are those in its store whose settings are the pipeline's but for `train.seed`, and those of the file that its
    setting `curves` names already. Put the file beside the pipeline's YAML file, and name it there.

    Example: `genpipe curves configs/pipeline/demo.yaml --out configs/pipeline/demo-curves.json`
    """
    from genpipe.pipeline.curves import kept_text
    from genpipe.pipeline.graph import load_pipeline

    pipeline = load_pipeline(config, overrides or [])
    kept = _kept(pipeline)
    if not kept:
        raise ConfigError(f"{pipeline.cfg.store}: has no held-out curve of {config}; train a stage of it first")
    out.write_text(kept_text(kept), encoding="utf-8")
    rows = [(name, str(len(of.curves)), _last(of)) for name, of in kept.items()]
    console.table(("stage", "runs", "at the end"), rows)
    console.out.print(f"wrote {out}", highlight=False, soft_wrap=True)


def _kept(pipeline: Pipeline) -> dict[str, KeptCurves]:
    """The curves of each training stage that has some, by its name: once for those that a matrix makes of one.

    How a stage is made says the plan, so that neither its inputs nor their data need be here.
    """
    from genpipe.pipeline.curves import KeptCurves, curves_alike, likeness, manifest_at
    from genpipe.pipeline.plan import plan
    from genpipe.stages import is_training

    plans = {planned.artifact.uri: planned for planned in plan(pipeline, sources=False)}
    known = {of.likeness: of.curves for of in pipeline.curves.values()}
    kept: dict[str, KeptCurves] = {}
    for planned in plans.values():
        alike = likeness(planned, lambda uri: plans.get(uri) or manifest_at(uri))
        if not is_training(planned.instance.stage) or alike in (of.likeness for of in kept.values()):
            continue
        found = known.get(alike, {}) | curves_alike(alike, pipeline.cfg.store, planned.artifact.kind)
        if found:
            headlines = planned.instance.stage.HEADLINES
            curves = {made: _short(found[made], headlines) for made in sorted(found)}
            kept[planned.name] = KeptCurves(likeness=alike, curves=curves)
    return kept


def _short(curve: Curve, headlines: Sequence[str]) -> Curve:
    """What trainings are held against of a curve: the numbers of the stage's summary."""
    return {
        samples: {name: float(f"{value:.{DIGITS}g}") for name, value in curve[samples].items() if name in headlines}
        for samples in sorted(curve)
    }


def _last(kept: KeptCurves) -> str:
    """The range of each number at the end of the curves."""
    ends = [curve[max(curve)] for curve in kept.curves.values()]
    ranges = {name: [end[name] for end in ends] for name in ends[0]}
    return "; ".join(f"{name} {min(values):.4g} to {max(values):.4g}" for name, values in ranges.items())
