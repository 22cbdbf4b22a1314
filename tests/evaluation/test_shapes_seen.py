"""What is seen in pictures of shapes: what was drawn, whatever happens to the picture, and no contradiction of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter
from scipy import ndimage
from shapes import COLORS as OTHER_COLORS
from shapes import draw_shape

from genpipe.data.shape_scenes import (
    COLORS,
    OPPOSITES,
    SHAPES,
    TASKS,
    Asked,
    Relation,
    Thing,
    askable,
    render,
    scene_of,
)
from genpipe.evaluation.shapes_seen import _components, seen_in, shows

PROMPTS = st.sampled_from(TASKS).flatmap(lambda task: st.sampled_from(askable(task)))
SEEDS = st.integers(0, 2**32)


def drawn(asked: Asked, seed: int, *, size: int = 64) -> np.ndarray:
    return render(scene_of(asked, np.random.default_rng(seed)), size=size)


def contradictions(asked: Asked) -> Iterator[Asked]:
    """Other shapes, other colors, colors that are swapped, other numbers, and other relations."""
    things = asked.things
    for i, thing in enumerate(things):
        for shape in set(SHAPES) - {thing.shape}:
            yield asked._replace(things=(*things[:i], Thing(shape, thing.color), *things[i + 1 :]))
        for color in set(COLORS) - {thing.color} if thing.color else ():
            yield asked._replace(things=(*things[:i], Thing(thing.shape, color), *things[i + 1 :]))
    yield Asked((*things, things[0]))
    if len(things) > 1:
        yield Asked(things[:-1])
    if things[0].color and len(things) == 2:
        swapped = tuple(Thing(thing.shape, other.color) for thing, other in zip(things, things[::-1], strict=True))
        yield asked._replace(things=swapped)
    for relation in set(get_args(Relation)) - {asked.relation} if asked.relation else ():
        yield asked._replace(relation=relation)
        yield Asked(things[::-1], OPPOSITES[relation])


@given(PROMPTS, SEEDS, st.sampled_from([64, 96, 128]))
def test_a_picture_shows_what_it_was_drawn_for_and_no_contradiction(asked: Asked, seed: int, size: int) -> None:
    seen = seen_in(drawn(asked, seed, size=size))
    assert shows(seen, asked)
    for other in contradictions(asked):
        assert not shows(seen, other), other


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return Image.open(file).convert("RGB")


def blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(1.0))


def noisy(picture: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 12, (*picture.size[::-1], 3))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def halved(picture: Image.Image) -> Image.Image:
    return picture.resize((64, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("change", [jpeg, blurred, noisy, halved])
def test_small_pictures_are_seen_after_compression_blur_noise_and_resizing(
    change: Callable[[Image.Image], Image.Image],
) -> None:
    """Nearly all: half the resolution of JPEG's colors may cost the smallest triangles a corner."""
    right = []
    for seed in range(120):
        every = askable(TASKS[seed % len(TASKS)])
        asked = every[np.random.default_rng(seed).integers(len(every))]
        picture = Image.fromarray(drawn(asked, seed, size=128 if change is halved else 64))
        right.append(shows(seen_in(np.asarray(change(picture))), asked))
    assert np.mean(right) > 0.98


@pytest.mark.parametrize(
    ("shape", "radius"),
    [(shape, radius) for shape in ("circle", "square", "triangle") for radius in (8, 14)] + [("cross", 14)],
)
@pytest.mark.parametrize("color", OTHER_COLORS)
def test_shapes_that_others_draw_are_seen(shape: str, color: str, radius: int) -> None:
    """By Pillow, with hard edges, in other colors of the same names."""
    [found] = seen_in(np.asarray(draw_shape(shape, rgb=OTHER_COLORS[color], radius=radius)))
    assert (found.shape, found.color) == (shape, color)
    assert (found.x, found.y) == pytest.approx((0.5, 0.5), abs=0.03)
    assert (found.width, found.height) == pytest.approx((2 * radius / 40, 2 * radius / 40), abs=0.04)


def test_what_is_no_shape_is_seen_as_something_else() -> None:
    bar = np.asarray(draw_shape("bar", rgb=COLORS["red"], radius=14))
    [found] = seen_in(bar)
    assert found.shape is None and found.color == "red"
    assert not any(shows([found], asked) for task in TASKS for asked in askable(task))
    assert seen_in(np.full((64, 64, 3), 255, np.uint8)) == []
    assert seen_in(np.full((64, 64, 3), 235, np.uint8)) == [], "nearly white"


def test_specks_do_not_count_and_a_second_shape_does() -> None:
    asked = Asked((Thing("circle", "red"),))
    [placed] = scene_of(asked, np.random.default_rng(3))
    low = placed.x > 0.5 or placed.y > 0.5
    for side, right in ((4, True), (8, False)):
        picture = drawn(asked, 3)
        corner = slice(0, side) if low else slice(64 - side, 64)
        picture[corner, corner] = COLORS["blue"]
        assert shows(seen_in(picture), asked) == right


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(-1, 2)))
def test_components_are_scipys(colors: np.ndarray) -> None:
    found = [
        (color, sorted(zip(rows.tolist(), columns.tolist(), strict=True)))
        for color, rows, columns in _components(colors)
    ]
    expected = []
    for color in range(3):
        labels, count = ndimage.label(colors == color)
        expected += [(color, [tuple(at) for at in np.argwhere(labels == label + 1).tolist()]) for label in range(count)]
    assert sorted(found) == sorted(expected)
