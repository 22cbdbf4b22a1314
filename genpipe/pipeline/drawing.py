"""The graph of a plan as a picture: which instances take what, what is cached and what would run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from genpipe.pipeline.graph import is_uri
from genpipe.pipeline.plan import Planned

WIDTH, HEIGHT = 2.0, 0.62
"""Of a box, in inches."""

COLUMN, ROW = 3.0, 1.0
"""Distances between the centers of boxes, in inches."""

COLORS = {"cached": ("#e6f4ea", "#34a853"), "run": ("#fef7e0", "#f9ab00"), "given": ("#f1f3f4", "#80868b")}
"""Fill and border, by status."""

Place = tuple[float, float]


def draw(plans: Sequence[Planned], path: Path, *, title: str) -> None:
    """Draw the graph of `plans` into a file, whose suffix names the format.

    Raises ValueError for a suffix other than .svg, .png and .pdf.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--graph {path}: write it as .svg, .png or .pdf")
    edges = [(source, planned.name, role) for planned in plans for source, role in _edges(planned)]
    given = [source for source, _, _ in edges if is_uri(source)]
    layers = _layers([*dict.fromkeys(given), *(planned.name for planned in plans)], edges)
    places = _places(layers, edges)
    width = COLUMN * len(layers)
    height = ROW * max(len(layer) for layer in layers) + 0.8
    figure = Figure(figsize=(width, height), dpi=150)
    axes: Axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    axes.text(0.2, height - 0.25, title, fontsize=11, fontweight="bold", va="center")
    for source, target, role in edges:
        faint = _implied(source, target, edges)
        named = faint or role.startswith(source.partition("@")[0])  # by its source, or not worth it
        _arrow(axes, places[source], places[target], label="" if named else role, faint=faint)
    for planned in plans:
        kind = planned.instance.kind
        cells = ", ".join(f"{path}={value}" for path, value in planned.instance.cells.items())
        note = cells or ("" if kind == planned.name else kind)
        _box(axes, places[planned.name], planned.name, note=note, status=planned.status)
    for uri in given:
        _box(axes, places[uri], uri.rstrip("/").rsplit("/", 1)[-1], note="given", status="given")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none"}):  # text that can be searched for
        figure.savefig(path)


def _edges(planned: Planned) -> list[tuple[str, str]]:
    """(what is taken, its role) for everything that an instance takes."""
    return [(ref, role) for role, references in planned.instance.inputs.items() for ref in references]


def _implied(source: str, target: str, edges: Sequence[tuple[str, str, str]]) -> bool:
    """Whether `target` depends on `source` by way of others, too, so that the arrow says little."""
    queue = [via for via, end, _ in edges if end == target and via != source]
    for name in queue:
        queue += [via for via, end, _ in edges if end == name and via not in queue]
    return source in queue


def _layers(names: Sequence[str], edges: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    """The names by their distance to the end: everything stands left of what takes it, and as near as it can."""
    after: dict[str, int] = {}
    for name in reversed(names):  # they are in an order that runs
        after[name] = 1 + max((after[target] for source, target, _ in edges if source == name), default=-1)
    return [[name for name in names if after[name] == layer] for layer in range(max(after.values()), -1, -1)]


def _places(layers: Sequence[Sequence[str]], edges: Sequence[tuple[str, str, str]]) -> dict[str, Place]:
    """The center of each box, in inches: each layer in the order of what its boxes take, so that few edges cross."""
    tallest = max(len(layer) for layer in layers)
    places: dict[str, Place] = {}

    def above(name: str) -> float:
        taken = [places[source][1] for source, target, _ in edges if target == name]
        return -sum(taken) / len(taken) if taken else 0.0

    for i, layer in enumerate(layers):
        top = ROW * (tallest + len(layer) - 1) / 2 + 0.3
        for j, name in enumerate(sorted(layer, key=above)):
            places[name] = (COLUMN * (i + 0.5), top - ROW * j)
    return places


def _box(axes: Axes, place: Place, name: str, *, note: str, status: str) -> None:
    x, y = place
    fill, border = COLORS[status]
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    shape = FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc=fill, ec=border, lw=1.4)
    axes.add_patch(shape)
    lines: Mapping[str, float] = {name: 0.12, note: -0.06, status: -0.2} if note else {name: 0.09, status: -0.14}
    for i, (text, offset) in enumerate(lines.items()):
        size, color = (10, "black") if i == 0 else (7, border if text == status else "#5f6368")
        axes.text(x, y + offset, text, fontsize=size, color=color, ha="center", va="center", clip_on=True)


def _arrow(axes: Axes, source: Place, target: Place, *, label: str, faint: bool) -> None:
    start, end = (source[0] + WIDTH / 2, source[1]), (target[0] - WIDTH / 2, target[1])
    bend = 0.0 if target[0] - source[0] < 1.5 * COLUMN else 0.12  # around the boxes between
    arrow = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=9,
        color="#dadce0" if faint else "#80868b",
        lw=1.0,
        connectionstyle=f"arc3,rad={bend}",
    )
    axes.add_patch(arrow)
    if label:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.08)
        axes.text(*middle, label, fontsize=6.5, color="#5f6368", ha="center", va="bottom")
