"""Variations of a picture: what CLIP sees of it stays, the rest is drawn anew (Ramesh et al. 2022, section 3.1).

For systems of kind unclip whose decoder takes an image embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import Representation, render
from genpipe.generation.systems.unclip import UnclipSystem


def vary(
    system: UnclipSystem,
    represented: Representation,
    *,
    each: int,
    eta: float,
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """`each` variations of each picture in a row, the decoder's, fp32 [B * each, 3, S, S] in [-1, 1].

    `eta` in [0, 1] is DDIM's share of fresh noise: at 0 every variation is the picture itself, at 1 all but the image
    embedding is forgotten.
    """
    return render(system, represented.repeated(each), sampler=sampler, eta=eta, generator=generator)
