"""A picture changed by the difference of two captions (Ramesh et al. 2022, section 3.3, text diffs).

For systems of kind unclip whose decoder takes an image embedding. D embedding width, N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import Representation, render, slerp
from genpipe.generation.systems.unclip import UnclipSystem

THETAS = (0.25, 0.3125, 0.375, 0.4375, 0.5)
"""How far a picture is changed: the paper's range is from 0.25 to 0.5."""


def text_difference(text_embeds: Tensor) -> Tensor:
    """norm(z_t - z_t0), the direction [1, D] from the first to the second of two text embeddings [2, D].

    Raises ValueError for two captions that CLIP does not tell apart.
    """
    difference = text_embeds[1:] - text_embeds[:1]
    if difference.norm() < 1e-6:
        raise ValueError("the captions before and after are the same to CLIP; say what is to change")
    return F.normalize(difference, dim=-1)


def turned(represented: Representation, difference: Tensor, thetas: Sequence[float]) -> Representation:
    """A picture's representation, [1, ...], turned towards the difference by each theta: slerp(z_i, z_d, theta).

    The noise stays. Theta 0 is the picture, 1 the difference alone.
    """
    count = len(thetas)
    many = represented.repeated(count)
    shares = torch.tensor(thetas, dtype=torch.float64, device=difference.device)
    return Representation(slerp(many.image_embed, difference.expand(count, -1), shares), many.noise)


def change(
    system: UnclipSystem,
    represented: Representation,
    *,
    before: str,
    after: str,
    thetas: Sequence[float] = THETAS,
    sampler: SamplerConfig,
) -> Tensor:
    """The decoder's pictures with each theta, fp32 [N, 3, S, S] in [-1, 1].

    `before` says what the picture shows, or "" or "a photo" as the paper has it; `after` what it is to show.
    """
    text = system.encode_text([before, after])
    return render(system, turned(represented, text_difference(text.embed), thetas), sampler=sampler)
