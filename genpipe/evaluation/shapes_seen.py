"""Which colored shapes a picture shows, from its pixels alone, and whether they are what was asked for.

Shape legend: H height, W width, C = 3 channels; N colors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, starmap
from typing import NamedTuple

import numpy as np

from genpipe.data.shape_scenes import COLORS, SHAPES, Asked, Color, Relation, Shape, Thing, inside

LEAST_AREA = 0.008
"""Share of the picture below which something is a speck: a third of the smallest triangle that `scene_of` draws."""

LEAST_OVERLAP = 0.7
"""Intersection over union with a shape in the same box, from which on something is that shape."""

MOST_OBLONG = 1.5
"""How much longer one side of a shape's box may be than the other."""

TOWARDS = 0.1
"""How far centers must lie apart, in the sum of the boxes' sides, to be anywhere to one another (GenEval's rule)."""


class Seen(NamedTuple):
    """Something colored: its shape, None if it is no known one, and the box around it, in shares of the side."""

    shape: Shape | None
    color: Color
    x: float
    y: float
    width: float
    height: float


def seen_in(image_HWC: np.ndarray) -> list[Seen]:
    """All that a picture uint8 [H, W, C] shows on white, but for specks.

    A pixel has the color whose mixtures with white are nearest to it in direction, and is white where its share of
    that color is below a half. What hangs together and has one color is one thing.
    """
    height, width = image_HWC.shape[:2]
    colors = list(COLORS)
    found = []
    for color, rows, columns in _components(color_map(image_HWC)):
        if len(rows) < LEAST_AREA * height * width:
            continue
        top, left = int(rows.min()), int(columns.min())
        mask = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), bool)
        mask[rows - top, columns - left] = True
        (h, w) = mask.shape
        box = ((left + w / 2) / width, (top + h / 2) / height, w / width, h / height)
        found.append(Seen(shape_of(mask), colors[color], *box))
    return found


def color_map(image_HWC: np.ndarray) -> np.ndarray:
    """int64 [H, W]: the place of each pixel's color in COLORS, -1 for white."""
    ink_HWC = 255.0 - image_HWC.astype(np.float64)
    ink_NC = 255.0 - np.asarray(list(COLORS.values()), np.float64)
    length_N = np.linalg.norm(ink_NC, axis=1)
    along_HWN = ink_HWC @ (ink_NC / length_N[:, None]).T
    nearest = along_HWN.argmax(-1)
    share = np.take_along_axis(along_HWN / length_N, nearest[..., None], -1)[..., 0]
    return np.where(share >= 0.5, nearest, -1)


def shape_of(mask: np.ndarray) -> Shape | None:
    """The shape that a mask bool [H, W], cut to its box, is nearest to; None if it is far from all."""
    height, width = mask.shape
    if max(height, width) > MOST_OBLONG * min(height, width):
        return None
    u, v = (np.arange(width) + 0.5) / width * 2 - 1, (np.arange(height) + 0.5) / height * 2 - 1
    ideal = {shape: inside(shape, u[None], v[:, None]) for shape in SHAPES}
    overlap = {shape: (mask & of).sum() / (mask | of).sum() for shape, of in ideal.items()}
    best = max(SHAPES, key=lambda shape: float(overlap[shape]))
    return best if overlap[best] >= LEAST_OVERLAP else None


def shows(seen: Sequence[Seen], asked: Asked) -> bool:
    """Whether a picture shows what was asked for, and nothing else."""
    if len(seen) != len(asked.things):
        return False
    return any(
        all(starmap(_is, zip(order, asked.things, strict=True)))
        and (asked.relation is None or asked.relation in relations(*order))
        for order in permutations(seen)
    )


def _is(seen: Seen, thing: Thing) -> bool:
    return seen.shape == thing.shape and thing.color in (None, seen.color)


def relations(one: Seen, other: Seen) -> set[Relation]:
    """Where one thing is, as seen from another: by the rule of GenEval's code it may be left and above at once."""
    offset = np.array([one.x - other.x, one.y - other.y])
    slack = TOWARDS * np.array([one.width + other.width, one.height + other.height])
    across, down = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0) / max(float(np.linalg.norm(offset)), 1e-9)
    held: dict[Relation, bool] = {
        "left": across < -0.5,
        "right": across > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {relation for relation, holds in held.items() if holds}


def _components(colors_HW: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The color, rows and columns of the pixels of each 4-connected component of one color that is not -1.

    Runs of a row are joined with those of the row above that they touch.
    """
    joined: list[int] = []  # the run that each run hangs on; itself at first

    def root(run: int) -> int:
        while joined[run] != run:
            joined[run] = joined[joined[run]]
            run = joined[run]
        return run

    runs: list[tuple[int, int, int, int]] = []  # row, first column, column past the last, color
    above: list[int] = []
    for y, row in enumerate(colors_HW):
        here = []
        edges = np.flatnonzero(np.diff(row)) + 1
        for first, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(row)], strict=True):
            if row[first] < 0:
                continue
            run = len(runs)
            runs.append((y, first, stop, int(row[first])))
            joined.append(run)
            here.append(run)
            for other in above:
                if runs[other][1] < stop and runs[other][2] > first and runs[other][3] == row[first]:
                    joined[root(other)] = root(run)
        above = here
    by_root: dict[int, list[int]] = {}
    for run in range(len(runs)):
        by_root.setdefault(root(run), []).append(run)
    for of in by_root.values():
        rows = np.concatenate([np.full(runs[run][2] - runs[run][1], runs[run][0]) for run in of])
        columns = np.concatenate([np.arange(runs[run][1], runs[run][2]) for run in of])
        yield runs[of[0]][3], rows, columns
