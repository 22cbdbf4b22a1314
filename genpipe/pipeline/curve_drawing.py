"""Held-out curves of several runs over each other, as a picture: a panel for each metric of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from genpipe.pipeline.spec import Curve

COLUMNS = 3
WIDTH, HEIGHT = 4.2, 2.8
"""Of a panel, in inches."""


def draw_curves(curves: Mapping[str, Mapping[str, Curve]], path: Path, *, names: Mapping[str, str]) -> None:
    """Draw curves by stage and label into a file, whose suffix names the format; `names` has the legend of a label."""
    panels = [
        (stage, metric, of_stage)
        for stage, of_stage in curves.items()
        for metric in dict.fromkeys(name for curve in of_stage.values() for found in curve.values() for name in found)
    ]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(WIDTH * min(COLUMNS, len(panels)), HEIGHT * rows + 0.4), dpi=150, layout="constrained")
    lines = {}
    for number, (stage, metric, of_stage) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, min(COLUMNS, len(panels)), number)
        axes.set_title(f"{stage}: held-out {metric}", fontsize=9)
        axes.set_xlabel("samples", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        for place, label in enumerate(names):
            curve = of_stage.get(label, {})
            if at := [samples for samples in sorted(curve) if metric in curve[samples]]:
                values = [curve[samples][metric] for samples in at]
                [lines[label]] = axes.plot(at, values, color=f"C{place}", marker="o", ms=3, lw=1.4)
    told = [f"{label}: {names[label]}" for label in lines]
    figure.legend(list(lines.values()), told, loc="outside upper left", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none"}):  # text that can be searched for
        figure.savefig(path)
