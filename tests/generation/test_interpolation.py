"""Between two pictures: the ends come back, and what lies between is evenly spaced on the sphere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.interpolation import between, from_caption, interpolate
from genpipe.generation.representation import Representation, as_unclip, represent
from genpipe.generation.systems import load_system
from genpipe.generation.systems.unclip import UnclipSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
SAMPLER = SamplerConfig(steps=16)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> UnclipSystem:
    return as_unclip(load_system(tiny.run("system"), device=CPU), use="test")


def test_both_ends_come_back(system: UnclipSystem) -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded(0)) * 2 - 1
    represented = represent(system, images, system.embed(images), sampler=SAMPLER)
    first, second = (Representation(*(part[i : i + 1] for part in represented)) for i in (0, 1))
    made = interpolate(system, first, second, count=5, sampler=SAMPLER)
    assert made.shape == (5, 3, 16, 16)
    ends = system.decode(system.encode(images))
    assert (made[[0, -1]] - ends).abs().max() < 1e-2
    gaps = [(made[i] - made[0]).square().mean().item() for i in range(5)]
    assert gaps == sorted(gaps)


def test_embeddings_turn_evenly_and_noise_keeps_its_size() -> None:
    first, second = (
        Representation(
            F.normalize(torch.randn(1, 16, generator=seeded(n)), dim=-1),
            torch.randn(1, 4, 16, 16, generator=seeded(n + 2)),
        )
        for n in (0, 1)
    )
    many = between(first, second, count=6)
    torch.testing.assert_close(many.image_embed.norm(dim=-1), torch.ones(6))
    steps = (many.image_embed[1:] * many.image_embed[:-1]).sum(-1).acos()
    whole = (first.image_embed * second.image_embed).sum().acos()
    torch.testing.assert_close(steps, (whole / 5).expand(5), atol=1e-4, rtol=0)
    assert ((many.noise.flatten(1).std(1) - 1).abs() < 0.06).all()
    with pytest.raises(ValueError, match="count is 2 or more"):
        between(first, second, count=1)


def test_a_caption_is_what_the_prior_draws_for_it(system: UnclipSystem) -> None:
    caption = "a small red circle"
    found = from_caption(system, caption, generator=seeded(3))
    expected = system.prior_embeds(system.encode_text([caption]), generator=seeded(3))
    assert expected is not None and torch.equal(found.image_embed, expected)
    assert found.noise.shape == (1, *system.grid)
    assert not torch.equal(found.image_embed, from_caption(system, "a large blue bar", generator=seeded(3)).image_embed)
