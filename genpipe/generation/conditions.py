"""What the samplers are conditioned on, and in which units.

Shape legend: B prompts, L tokens, W text width, D embedding width. Image embeddings are unit vectors wherever they
leave a function; inside the diffusion they are standardized with CLIP's statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.data.shards import NO_LABEL

TOKENIZER_FILE = "tokenizer.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Conditions:
    """What `count` pictures are asked to show: a text and a label each; None where there are none.

    Labels are places in the list of classes. `negative` are texts that guidance leads away from; None for from nothing.
    """

    count: int
    texts: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    negative: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for given in (self.texts, self.labels, self.negative):
            assert given is None or len(given) == self.count, "one for each picture"

    def at(self, rows: Sequence[int]) -> Conditions:
        """Those of the pictures at these places."""
        texts, labels, negative = _at(self.texts, rows), _at(self.labels, rows), _at(self.negative, rows)
        return Conditions(len(rows), texts=texts, labels=labels, negative=negative)

    def opposite(self) -> Conditions | None:
        """The negative texts as what is asked for, without labels; None where there are none."""
        if self.negative is None:
            return None
        labels = None if self.labels is None else [NO_LABEL] * self.count
        return Conditions(self.count, texts=self.negative, labels=labels)


def _at(given: Sequence[T] | None, rows: Sequence[int]) -> list[T] | None:
    return None if given is None else [given[row] for row in rows]


class Text(NamedTuple):
    """What a text encoder says of captions: embed fp32 [B, D], encodings fp32 [B, L, W], text_mask bool [B, L].

    D is 0 where the encoder has no pooled embedding. The mask is True at tokens that are not padding.
    """

    embed: Tensor
    encodings: Tensor
    text_mask: Tensor

    @classmethod
    def from_cache(cls, batch: Mapping[str, Tensor]) -> Text:
        """From a batch of cached features: `FeatureDataset.text`. Encodings are padded here, on the batch's device."""
        places = batch["text_places"]
        text_mask = places >= 0
        encodings = batch["text_encodings"].float()[places.clamp(min=0)]
        embed = batch["text_embeds"].float() if "text_embeds" in batch else encodings.new_empty(len(places), 0)
        return cls(embed, encodings * text_mask[..., None], text_mask)

    def repeated(self, times: int) -> Text:
        """The captions `times` times over, [times * B, ...]."""
        return Text(*(_repeated(part, times) for part in self))

    def followed_by(self, other: Text) -> Text:
        """These captions and then others, padded to the longest."""
        length = max(self.text_mask.shape[1], other.text_mask.shape[1])
        pairs = zip(self._padded(length), other._padded(length), strict=True)
        return Text(*(torch.cat(pair) for pair in pairs))

    def _padded(self, length: int) -> Text:
        missing = length - self.text_mask.shape[1]
        return Text(self.embed, F.pad(self.encodings, (0, 0, 0, missing)), F.pad(self.text_mask, (0, missing)))

    def first(self, count: int) -> Text:
        """The first captions."""
        return Text(*(part[:count] for part in self))


class Given(NamedTuple):
    """The conditions of B pictures as a decoder takes them; None for each that it was built without.

    image_embed: [B, D], standardized; labels: int64 [B], negative where there is none.
    """

    image_embed: Tensor | None = None
    text: Text | None = None
    labels: Tensor | None = None

    def repeated(self, times: int) -> Given:
        """The conditions `times` times over."""
        return Given(
            None if self.image_embed is None else _repeated(self.image_embed, times),
            None if self.text is None else self.text.repeated(times),
            None if self.labels is None else _repeated(self.labels, times),
        )

    def followed_by(self, other: Given) -> Given:
        """These conditions and then others of the same kinds."""
        return Given(
            _joined(self.image_embed, other.image_embed),
            None if self.text is None or other.text is None else self.text.followed_by(other.text),
            _joined(self.labels, other.labels),
        )

    def first(self, count: int) -> Given:
        """Those of the first pictures."""
        return Given(
            None if self.image_embed is None else self.image_embed[:count],
            None if self.text is None else self.text.first(count),
            None if self.labels is None else self.labels[:count],
        )


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.cat([one, other])


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.ndim - 1))


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
        """To mean 0 and deviation 1, in fp32."""
        return (x.float() - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `standardize`."""
        return x * self.std + self.mean


def latent_statistics(meta: Mapping[str, list[float]], device: torch.device) -> Statistics:
    """Those of latents, by channel: of features and decoders as they were trained on, of autoencoders of the means."""
    return Statistics.of(meta["latent_mean"], meta["latent_std"], axes=2, device=device)


def embed_statistics(
    meta: Mapping[str, list[float]], device: torch.device, *, scale: float | None = None
) -> Statistics:
    """Those of CLIP's image embeddings, by dimension, from a manifest's meta.

    With a `scale`, what stands for them: unit vectors are then multiplied by it, and not shifted.
    """
    if scale is not None:
        dim = len(meta["image_embed_mean"])
        return Statistics.of([0.0] * dim, [1 / scale] * dim, axes=0, device=device)
    return Statistics.of(meta["image_embed_mean"], meta["image_embed_std"], axes=0, device=device)
