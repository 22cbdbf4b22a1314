"""Variations on the tiny pipeline: none at eta 0, and at eta 1 what CLIP sees is all that stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import as_unclip, represent
from genpipe.generation.systems import load_system
from genpipe.generation.variations import vary

if TYPE_CHECKING:
    from conftest import TinyPipeline

SAMPLER = SamplerConfig(steps=16)


def test_variations_leave_the_picture_as_eta_grows(tiny: TinyPipeline) -> None:
    system = as_unclip(load_system(tiny.run("system"), device=torch.device("cpu")), use="variations")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    represented = represent(system, images, system.embed(images), sampler=SAMPLER)

    def varied(eta: float, *, noise: torch.Tensor = represented.noise) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = represented._replace(noise=noise)
        return vary(system, given, each=3, eta=eta, sampler=SAMPLER, generator=generator)

    itself = system.decode(system.encode(images)).repeat_interleave(3, dim=0)
    assert (varied(0.0) - itself).abs().max() < 1e-2
    gaps = [(varied(eta) - itself).square().mean().item() for eta in (0.3, 0.6, 1.0)]
    assert 1e-4 < gaps[0] < gaps[1] < gaps[2]
    assert (varied(1.0)[0] - varied(1.0)[1]).abs().mean() > 0.01, "each has noise of its own"
    # On a schedule that ends in pure noise the first step of ancestral sampling forgets where it began.
    swapped = [(varied(eta) - varied(eta, noise=represented.noise.flip(0))).abs().mean() for eta in (0.0, 1.0)]
    assert swapped[1] < 0.05 * swapped[0]
