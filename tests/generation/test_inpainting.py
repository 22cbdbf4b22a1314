"""Inpainting: what is kept, exactly; and what is drawn, against the conditional distribution of a Gaussian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from generation.gaussian_system import PIXELS, GaussianSystem, covariance

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.conditions import Conditions
from genpipe.generation.inpainting import inpaint, keep_cells, shrunk
from genpipe.generation.systems import load_system

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
COUNT = 2000


def test_the_rest_is_drawn_from_the_conditional_distribution() -> None:
    """The left half of a picture that is far from the mean is known; the right half follows it."""
    system = GaussianSystem(SamplerConfig(kind="ddpm", steps=100))
    keep = torch.tensor([True, True, False, False]).expand(1, 1, 4, 4)
    known = keep.expand(1, *system.grid).flatten()
    images = torch.full((COUNT, *system.grid), 0.7)
    generator = torch.Generator().manual_seed(0)
    found = inpaint(
        system, images, keep.expand(COUNT, -1, -1, -1), Conditions(COUNT), jump=10, resamples=10, generator=generator
    ).flatten(1)
    assert (found[:, known] == images.flatten(1)[:, known]).all()
    whole = covariance()
    gain = whole[~known][:, known] @ torch.linalg.inv(whole[known][:, known])
    mean = 0.2 + gain @ torch.full((PIXELS // 2,), 0.5).double()
    rest = whole[~known][:, ~known] - gain @ whole[known][:, ~known]
    drawn = found[:, ~known].double()
    assert mean.min() > 0.45, "far from the 0.2 of pictures of which nothing is known"
    assert (drawn.mean(0) - mean).abs().max() < 0.05
    torch.testing.assert_close(drawn.std(0), rest.diagonal().sqrt(), rtol=0.1, atol=0)
    between = torch.linalg.norm(torch.cov(drawn.T) - rest) / torch.linalg.norm(rest)
    assert between < 0.2


def test_what_is_kept_is_kept_through_latents_and_upsamplers(tiny: TinyPipeline) -> None:
    """unCLIP on latents, with an upsampler from 16 to 32 pixels; the mask cuts cells of the latents' grid."""
    system = load_system(tiny.run("system"), device=CPU)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    keep = torch.rand(1, 1, 32, 32, generator=generator) < 0.95
    keep[..., 16:] = False
    keep = keep.expand(2, -1, -1, -1)
    conditions = Conditions(2, texts=["a small red circle", "a large blue bar"])
    made = inpaint(system, images, keep, conditions, jump=1, resamples=2, generator=generator)
    assert made.shape == (2, 3, 32, 32) and made.abs().max() <= 1
    kept = keep.expand_as(images)
    assert torch.equal(made[kept], images[kept])
    assert (made[~kept] != images[~kept]).float().mean() > 0.9


def test_a_cell_is_known_if_all_of_it_is_kept() -> None:
    keep = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    keep[..., 3, 5] = False
    cells = keep_cells(keep, 2)
    assert cells.tolist() == [[[[True, False], [True, True]]]]
    assert torch.equal(keep_cells(keep, 8), keep)


@pytest.mark.parametrize("size", [8, 4, 3])
def test_pictures_are_shrunk_to_the_decoders_size(size: int) -> None:
    found = shrunk(torch.full((1, 3, 8, 8), 0.25), size)
    torch.testing.assert_close(found, torch.full((1, 3, size, size), 0.25))
