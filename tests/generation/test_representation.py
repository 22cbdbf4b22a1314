"""Pictures as embedding and noise: the decoder brings them back, and interpolation stays on the sphere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import Representation, as_ddim, as_unclip, render, represent, slerp
from genpipe.generation.systems import load_system
from genpipe.generation.systems.unclip import UnclipSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> UnclipSystem:
    return as_unclip(load_system(tiny.run("system"), device=CPU), use="test")


@pytest.fixture(scope="module")
def images(system: UnclipSystem) -> Tensor:
    """Two pictures of the base size, of smooth colors."""
    coarse = torch.rand(2, 3, 4, 4, generator=seeded(0)) * 2 - 1
    return F.interpolate(coarse, (16, 16), mode="bilinear")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_picture_comes_back_the_closer_the_more_steps(
    system: UnclipSystem, images: Tensor, guidance_scale: float
) -> None:
    """As the autoencoder reconstructs it. The inversion is of first order: four times the steps, a quarter the gap."""
    embeds = system.embed(images)
    reconstructed = system.decode(system.encode(images))

    def gap(steps: int, refinements: int) -> float:
        sampler = SamplerConfig(steps=steps, guidance_scale=guidance_scale)
        represented = represent(system, images, embeds, sampler=sampler, refinements=refinements)
        return (render(system, represented, sampler=sampler) - reconstructed).square().mean().sqrt().item()

    assert gap(64, 0) < 0.4 * gap(16, 0)
    assert gap(16, 3) < 0.1 * gap(16, 0) and gap(16, 3) < 1e-2


def test_the_embedding_and_the_noise_both_matter(system: UnclipSystem, images: Tensor) -> None:
    sampler = SamplerConfig(steps=16)
    represented = represent(system, images, system.embed(images), sampler=sampler)
    whole = render(system, represented, sampler=sampler)
    for changed in (
        represented._replace(image_embed=represented.image_embed.flip(0)),
        represented._replace(noise=represented.noise.flip(0)),
    ):
        assert (render(system, changed, sampler=sampler) - whole).abs().mean() > 0.02


def test_any_sampler_becomes_ddim_with_its_times_and_guidance() -> None:
    sampler = SamplerConfig(
        kind="heun", steps=9, shift=2.0, s_churn=3.0, s_tmin=0.1, guidance_scale=4.0, threshold="static"
    )
    expected = SamplerConfig(kind="ddim", eta=0.5, steps=9, shift=2.0, guidance_scale=4.0, threshold="static")
    assert as_ddim(sampler, eta=0.5) == expected
    assert as_ddim(SamplerConfig(kind="ddpm", variance="large")) == SamplerConfig(kind="ddim")


def test_systems_without_image_embeddings_are_refused(pixel_tiny: TinyPipeline) -> None:
    pixels = load_system(pixel_tiny.run("system"), device=CPU)
    with pytest.raises(ValueError, match="variations: needs a system of kind unclip"):
        as_unclip(pixels, use="variations")


def test_slerp_turns_by_the_share_of_the_angle() -> None:
    one, other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    found = slerp(one, other, torch.tensor([1 / 3, 0.5]))
    expected = torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)], [0.0, 3.0]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(one, other, 0.0), one)
    torch.testing.assert_close(slerp(one, other, 1.0), other)


def test_slerp_of_noise_is_as_large_as_noise() -> None:
    """Which a straight line between them would not be: half-way its deviation is 0.71."""
    one, other = (torch.randn(4, 8, 16, 16, generator=seeded(n)) for n in (0, 1))
    assert slerp(one, other, 0.5).std().item() == pytest.approx(1.0, abs=0.03)


def test_a_representation_is_repeated_picture_by_picture() -> None:
    represented = Representation(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    assert represented.repeated(2).image_embed.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]
