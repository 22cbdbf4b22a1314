"""Pictures between two (Ramesh et al. 2022, section 3.2), each end a picture or what the prior draws for a caption.

For systems of kind unclip whose decoder takes an image embedding. D embedding width, N pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import Representation, render, slerp
from genpipe.generation.systems.unclip import UnclipSystem


def from_caption(system: UnclipSystem, caption: str, *, generator: torch.Generator) -> Representation:
    """A caption as a picture of it would be represented: an embedding that the prior draws, and any noise."""
    embed = system.prior_embeds(system.encode_text([caption]), generator=generator)
    assert embed is not None, "a system whose decoder takes image embeddings has a prior"
    noise = torch.randn((1, *system.grid), generator=generator, device=generator.device)
    return Representation(embed, noise)


def between(first: Representation, second: Representation, *, count: int) -> Representation:
    """`count` representations from the first of one picture to that of another, both included.

    Embeddings and noise are interpolated on the sphere, evenly by angle. Raises ValueError for fewer than two.
    """
    if count < 2:
        raise ValueError(f"count is 2 or more, as both ends are among the pictures, not {count}")
    shares = torch.linspace(0, 1, count, dtype=torch.float64, device=first.noise.device)
    pairs = zip(first.repeated(count), second.repeated(count), strict=True)
    return Representation(*(slerp(one, other, shares) for one, other in pairs))


def interpolate(
    system: UnclipSystem,
    first: Representation,
    second: Representation,
    *,
    count: int,
    sampler: SamplerConfig,
) -> Tensor:
    """The decoder's pictures from one end to the other, fp32 [count, 3, S, S] in [-1, 1]; the ends come back."""
    return render(system, between(first, second, count=count), sampler=sampler)
