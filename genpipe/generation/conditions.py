"""What the samplers are conditioned on, and in which units.

Shape legend: B prompts, L tokens, W text width, D embedding width. Image embeddings are unit vectors wherever they
leave a function; inside the diffusion they are standardized with CLIP's statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOKENIZER_FILE = "tokenizer.json"


class Text(NamedTuple):
    """What CLIP's text tower says of captions: embed [B, D], encodings [B, L, W], mask bool [B, L]."""

    embed: Tensor
    encodings: Tensor
    mask: Tensor

    @classmethod
    def from_cache(cls, batch: Mapping[str, Tensor]) -> Text:
        """From a batch of cached features: `FeatureDataset.text`. Encodings are padded here, on the batch's device."""
        places = batch["text_places"]
        mask = places >= 0
        encodings = batch["text_encodings"].float()[places.clamp(min=0)]
        return cls(batch["text_embeds"].float(), encodings * mask[..., None], mask)

    def repeated(self, times: int) -> Text:
        return Text(*(part.repeat(times, *[1] * (part.ndim - 1)) for part in self))


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation by channel or dimension: how latents and embeddings are standardized."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], *, axes: int, device: torch.device) -> Statistics:
        """From a manifest's lists, with `axes` trailing axes to broadcast over."""
        shape = (-1, *[1] * axes)
        return cls(torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape))

    def standardize(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def latent_statistics(meta: Mapping[str, list[float]], device: torch.device) -> Statistics:
    """Of the autoencoder's latents, by channel, from a manifest's meta."""
    return Statistics.of(meta["latent_mean"], meta["latent_std"], axes=2, device=device)


def embed_statistics(meta: Mapping[str, list[float]], device: torch.device) -> Statistics:
    """Of CLIP's image embeddings, by dimension, from a manifest's meta."""
    return Statistics.of(meta["image_embed_mean"], meta["image_embed_std"], axes=0, device=device)
