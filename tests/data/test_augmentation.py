"""Views of images, against slices, mirrors, and Pillow's own resizing of boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genpipe.data.augmentation import Augmentation, seen


def view(left: float, top: float, side: float, mirror: bool = False) -> torch.Tensor:
    return torch.tensor([[left, top, side, float(mirror)]])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_whole_is_the_image_and_its_mirror_the_mirrored(image: torch.Tensor) -> None:
    torch.testing.assert_close(seen(image, view(0, 0, 1)), image)
    torch.testing.assert_close(seen(image, view(0, 0, 1, mirror=True)), image.flip(-1))


@pytest.mark.parametrize(("left", "top"), [(0.0, 0.0), (0.5, 0.25), (0.25, 0.5)])
def test_a_part_is_what_pillow_enlarges(image: torch.Tensor, left: float, top: float) -> None:
    found = seen(image, view(left, top, 0.5))[0, 0]
    box = (16 * left, 16 * top, 16 * left + 8, 16 * top + 8)
    plane = Image.fromarray(image[0, 0].numpy())
    expected = np.asarray(plane.resize((16, 16), Image.Resampling.BILINEAR, box=box))
    inner = slice(1, -1)  # Pillow does not look beyond the box, bilinear sampling does
    np.testing.assert_allclose(found.numpy()[inner, inner], expected[inner, inner], atol=1e-5)


def test_each_image_has_a_view_of_its_own(image: torch.Tensor) -> None:
    views = torch.cat([view(0, 0, 1), view(0.5, 0, 0.5), view(0, 0, 1, mirror=True)])
    together = seen(image.expand(3, -1, -1, -1), views)
    for one, single in zip(together, views, strict=True):
        torch.testing.assert_close(one, seen(image, single[None])[0])


@given(st.floats(0.05, 1.0), st.booleans(), st.integers(0, 2**40), st.integers(0, 2**31))
def test_views_lie_in_the_image_and_follow_from_the_position(area: float, flip: bool, first: int, seed: int) -> None:
    augmentation, positions = Augmentation(least_area=area, flip=flip), np.arange(first, first + 32)
    views = augmentation.views(positions, seed=seed)
    left, top, side, mirrored = views.double().unbind(1)
    assert (side**2 >= area - 1e-5).all() and (side <= 1 + 1e-6).all()
    for start in (left, top):
        assert (start >= 0).all() and (start + side <= 1 + 1e-6).all()
    assert set(mirrored.tolist()) <= ({0.0, 1.0} if flip else {0.0})
    torch.testing.assert_close(augmentation.views(positions[7:9], seed=seed), views[7:9], rtol=0, atol=0)


def test_areas_places_and_mirrors_are_uniform() -> None:
    left, _, side, mirrored = (
        Augmentation(least_area=0.36, flip=True).views(np.arange(20_000), seed=3).double().unbind(1)
    )
    for uniform in ((side**2 - 0.36) / 0.64, left[side < 0.99] / (1 - side[side < 0.99])):
        shares = torch.histc(uniform, bins=10, min=0, max=1) / len(uniform)
        assert (shares - 0.1).abs().max() < 5 * (0.09 / len(uniform)) ** 0.5  # five deviations of a share
    assert abs(mirrored.mean() - 0.5) < 5 * (0.25 / 20_000) ** 0.5
