"""Text diffs: the embedding turns towards the difference of two captions, and by no more than it is asked to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import Representation, as_unclip, represent
from genpipe.generation.systems import load_system
from genpipe.generation.text_diffs import change, text_difference, turned

if TYPE_CHECKING:
    from conftest import TinyPipeline


def test_the_difference_is_a_direction() -> None:
    embeds = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(text_difference(embeds), F.normalize(torch.tensor([[-0.4, 0.8]]), dim=-1))
    with pytest.raises(ValueError, match="the same to CLIP"):
        text_difference(embeds[[0, 0]])


def test_theta_is_the_share_of_the_angle_to_the_difference() -> None:
    """An orthogonal direction: theta 0.5 is 45 degrees (unCLIP, section 3.3: z_theta = slerp(z_i, z_d, theta))."""
    represented = Representation(torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 2, 2, 2))
    found = turned(represented, torch.tensor([[0.0, 0.0, 1.0]]), [0.0, 0.25, 0.5])
    angles = [theta * math.pi / 2 for theta in (0.0, 0.25, 0.5)]
    expected = torch.tensor([[math.cos(a), 0.0, math.sin(a)] for a in angles])
    torch.testing.assert_close(found.image_embed, expected, atol=1e-6, rtol=0)
    assert torch.equal(found.noise, torch.ones(3, 2, 2, 2)), "the base noise is fixed"


def test_a_picture_is_itself_at_theta_0_and_leaves_with_theta(tiny: TinyPipeline) -> None:
    system = as_unclip(load_system(tiny.run("system"), device=torch.device("cpu")), use="test")
    sampler = SamplerConfig(steps=16)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    represented = represent(system, image, system.embed(image), sampler=sampler)
    captions = {"before": "a small red circle", "after": "a small blue circle"}
    made = change(system, represented, **captions, thetas=(0.0, 0.25, 0.5), sampler=sampler)
    gaps = (made - system.decode(system.encode(image))).square().mean((1, 2, 3))
    assert gaps[0] < 1e-4 and gaps[0] < gaps[1] < gaps[2] and gaps[2] > 1e-4
