"""What CLIP sees of a picture, component by component (Ramesh et al. 2022, section 4 and figure 7).

For systems of kind unclip whose decoder takes an image embedding. B pictures, D embedding width, K components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.representation import Representation, render
from genpipe.generation.systems.unclip import UnclipSystem
from genpipe.models.autoregressive_prior import AutoregressivePrior
from genpipe.models.pca_quantizer import principal_components


def basis_of(system: UnclipSystem, embeds: Iterable[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean [D] and principal components [K, D], orthonormal rows, of image embeddings: chunks [*, D].

    Without any, those that an autoregressive prior was fitted with. Raises ValueError where there are neither.
    """
    if embeds is not None:
        return principal_components(embeds, variance=1.0)
    if isinstance(system.prior, AutoregressivePrior):
        return system.prior.codes.mean_D, system.prior.codes.basis_KD
    raise ValueError(
        "the system has no principal components of image embeddings, as its prior is not autoregressive; give pictures "
        "to find them in"
    )


def doubling(components: int) -> list[int]:
    """1, 2, 4, ... and all of the components, as in figure 7."""
    return [*(2**i for i in range((components - 1).bit_length())), components]


def kept_components(image_embed: Tensor, mean: Tensor, basis: Tensor, *, counts: Sequence[int]) -> Tensor:
    """Unit image embeddings [B, D] with the first components of each count kept: unit vectors fp32 [B * counts, D].

    Those of a picture stand in a row. What is left out is as in the mean; 0 keeps the mean alone. Raises ValueError for
    more components than there are.
    """
    for count in counts:
        if not 0 <= count <= len(basis):
            raise ValueError(f"components: {count} cannot be kept of the {len(basis)} that there are")
    mean, basis = (part.to(image_embed.device, torch.float64) for part in (mean, basis))
    values_BK = (image_embed.double() - mean) @ basis.T
    of_counts = [values_BK[:, :count] @ basis[:count] + mean for count in counts]
    return F.normalize(torch.stack(of_counts, dim=1).flatten(0, 1), dim=-1).float()


def reconstruct(
    system: UnclipSystem,
    image_embed: Tensor,
    basis: tuple[Tensor, Tensor],
    *,
    counts: Sequence[int],
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """The decoder's pictures from each count of components of unit image embeddings [B, D], a picture's in a row.

    fp32 [B * counts, 3, S, S] in [-1, 1], all from the same noise.
    """
    embeds = kept_components(image_embed, *basis, counts=counts)
    noise = torch.randn((1, *system.grid), generator=generator, device=generator.device)
    return render(system, Representation(embeds, noise.expand(len(embeds), -1, -1, -1)), sampler=sampler)
