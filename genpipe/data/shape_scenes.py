"""Pictures of a few colored shapes on white, and what can be asked of them: a small world in which answers are exact.

The tasks are those of GenEval (Ghosh et al. 2023, sec. 3.1), with shapes for objects; color attribution has pairs of
one shape as well, with their places, which DALL-E 2 confuses ("a red cube on top of a blue cube"; Ramesh et al. 2022,
fig. 14). Lengths are shares of the picture's side, y downwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

Shape = Literal["circle", "square", "triangle", "cross"]
Color = Literal["red", "green", "blue", "yellow", "purple", "black"]
Relation = Literal["left", "right", "above", "below"]
Task = Literal["single_object", "two_objects", "counting", "colors", "position", "color_attribution"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
TASKS: tuple[Task, ...] = get_args(Task)
COLORS: dict[Color, tuple[int, int, int]] = {
    "red": (225, 20, 20),
    "green": (0, 190, 60),
    "blue": (20, 60, 230),
    "yellow": (240, 210, 0),
    "purple": (170, 30, 190),
    "black": (20, 20, 20),
}
"""As far from one another as possible in hue on white, where blur and JPEG leave it alone."""

NUMBERS = {"two": 2, "three": 3, "four": 4}
PLURALS: dict[Shape, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
}
RELATIONS: dict[Relation, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
OPPOSITES: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}

RADII = {1: (0.15, 0.3), 2: (0.12, 0.19), 3: (0.12, 0.17), 4: (0.11, 0.15)}
"""Half a shape's side, from and to, by the number of shapes: at 64 px no shape is smaller than 14."""

GAP = 0.06
"""What is left free between two shapes, and to the edge."""

SUPERSAMPLING = 4


class Thing(NamedTuple):
    """A shape that is asked for; of any color if none is named."""

    shape: Shape
    color: Color | None = None


class Asked(NamedTuple):
    """What a picture is to show: these things and no others; `relation` is that of the first to the second."""

    things: tuple[Thing, ...]
    relation: Relation | None = None


class Placed(NamedTuple):
    """A shape in a picture: its center, and half the side of the square around it."""

    shape: Shape
    color: Color
    x: float
    y: float
    radius: float


@cache
def askable(task: Task) -> tuple[Asked, ...]:
    """All that can be asked in a task, in a fixed order."""
    pairs, colors = list(permutations(SHAPES, 2)), list(permutations(COLORS, 2))
    relations: tuple[Relation, ...] = get_args(Relation)
    match task:
        case "single_object":
            return tuple(Asked((Thing(shape),)) for shape in SHAPES)
        case "two_objects":
            return tuple(Asked((Thing(one), Thing(other))) for one, other in pairs)
        case "counting":
            return tuple(Asked((Thing(shape),) * count) for shape, count in product(SHAPES, NUMBERS.values()))
        case "colors":
            return tuple(Asked((Thing(shape, color),)) for shape, color in product(SHAPES, COLORS))
        case "position":
            return tuple(Asked((Thing(one), Thing(other)), of) for (one, other), of in product(pairs, relations))
        case "color_attribution":
            of_two = (
                Asked((Thing(one, first), Thing(other, second)))
                for (one, other), (first, second) in product(pairs, colors)
            )
            of_one = (
                Asked((Thing(shape, first), Thing(shape, second)), of)
                for shape, (first, second), of in product(SHAPES, colors, relations)
            )
            return (*of_two, *of_one)


def caption_of(asked: Asked) -> str:
    """`a red circle`, `a circle to the left of a cross`, `three squares`."""
    first, *others = asked.things
    if others and asked.relation is None and set(others) == {first} and first.color is None:
        return f"{list(NUMBERS)[len(others) - 1]} {PLURALS[first.shape]}"
    words = [f"a {thing.shape}" if thing.color is None else f"a {thing.color} {thing.shape}" for thing in asked.things]
    return (" and " if asked.relation is None else f" {RELATIONS[asked.relation]} ").join(words)


def parse(caption: str) -> Asked | None:
    """What a caption asks for, the inverse of `caption_of`; None for one of other words."""
    if many := _MANY.fullmatch(caption):
        [shape] = (shape for shape, plural in PLURALS.items() if plural == many["plural"])
        return Asked((Thing(shape),) * NUMBERS[many["number"]])
    if (found := _PAIR.fullmatch(caption)) is None:
        return None
    named = (found.group(1, 2), found.group(4, 5))
    things = tuple(Thing(cast(Shape, shape), cast(Color | None, color)) for color, shape in named if shape)
    return Asked(things, {words: of for of, words in RELATIONS.items()}.get(found[3]))


_ONE = rf"a (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_PAIR = re.compile(rf"{_ONE}(?: (and|{'|'.join(RELATIONS.values())}) {_ONE})?")
_MANY = re.compile(rf"(?P<number>{'|'.join(NUMBERS)}) (?P<plural>{'|'.join(PLURALS.values())})")


def task_of(asked: Asked) -> Task:
    """The task that a prompt belongs to."""
    several, colored = len(asked.things) > 1, any(thing.color for thing in asked.things)
    if several and colored:
        return "color_attribution"
    if asked.relation is not None:
        return "position"
    if several:
        return "counting" if len(set(asked.things)) == 1 else "two_objects"
    return "colors" if colored else "single_object"


def subject_of(asked: Asked) -> str:
    """The same text for all that mean the same: `a cross below a circle` and `a circle above a cross`."""
    if asked.relation in ("right", "below"):
        return caption_of(Asked(asked.things[::-1], OPPOSITES[asked.relation]))
    if asked.relation is None:
        return caption_of(Asked(tuple(sorted(asked.things, key=str))))
    return caption_of(asked)


def scene_of(asked: Asked, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Places, sizes and, where none are named, colors for what is asked for, drawn at random."""
    low, high = RADII[len(asked.things)]
    colors = [thing.color or list(COLORS)[rng.integers(len(COLORS))] for thing in asked.things]
    while True:  # the boxes are small enough that a few dozen tries do
        radii = rng.uniform(low, high, len(colors))
        x, y = rng.uniform(radii + GAP, 1 - radii - GAP, (2, len(colors)))
        placed = tuple(
            Placed(thing.shape, color, float(at_x), float(at_y), float(radius))
            for thing, color, at_x, at_y, radius in zip(asked.things, colors, x, y, radii, strict=True)
        )
        apart = all(_apart(one, other) for i, one in enumerate(placed) for other in placed[:i])
        if apart and (asked.relation is None or _clearly(asked.relation, *placed)):
            return placed


def _apart(one: Placed, other: Placed) -> bool:
    return max(abs(one.x - other.x), abs(one.y - other.y)) > one.radius + other.radius + GAP


def _clearly(relation: Relation, one: Placed, other: Placed) -> bool:
    """Whether nobody would call it another relation: within some 27 degrees of its axis."""
    across, down = other.x - one.x, other.y - one.y
    along = {"left": across, "right": -across, "above": down, "below": -down}[relation]
    return along > 2 * min(abs(across), abs(down)) and along == max(abs(across), abs(down))


def inside(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape, bool: u to the right, v downwards, -1 to 1 across the square around it."""
    across, down = np.abs(u), np.abs(v)
    within = (across <= 1) & (down <= 1)
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return within
        case "triangle":
            return within & (across <= (v + 1) / 2)
        case "cross":
            return within & (np.minimum(across, down) <= 1 / 3)


def render(scene: Sequence[Placed], *, size: int) -> np.ndarray:
    """The picture, uint8 [size, size, 3], with smooth edges."""
    fine = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING)
    picture = np.full((size, size, 3), 255.0)
    for shape, color, x, y, radius in scene:
        covered = inside(shape, (fine[None] - x) / radius, (fine[:, None] - y) / radius)
        share = covered.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))[..., None]
        picture = (1 - share) * picture + share * np.asarray(COLORS[color])
    return picture.round().astype(np.uint8)
