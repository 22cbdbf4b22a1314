"""Sampling a decoder: from conditions to latents, or to pixels. B pictures, D embedding width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpipe.data.shards import NO_LABEL
from genpipe.diffusion.noise import normal
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, sample, with_guidance
from genpipe.generation.conditions import Given, Text
from genpipe.models.decoder import Decoder


@dataclass(frozen=True)
class Dropped:
    """Where a learned null, or that of the encoder, takes a condition's place: bool [B] each, independent."""

    image: Tensor
    text: Tensor
    label: Tensor

    @classmethod
    def everywhere(cls, dropped: Tensor) -> Dropped:
        """All conditions of the same pictures."""
        return cls(dropped, dropped, dropped)


def decoder_model(
    decoder: Decoder, given: Given, dropped: Dropped, *, generator: torch.Generator | None = None
) -> Model:
    """The decoder with its conditions bound; `generator` is training's, for the network's own dropout.

    A decoder that takes an image embedding, a caption or a label and is given none gets its null everywhere, and so
    does one that takes labels where a label is negative.
    """
    image_embed, drop_image = given.image_embed, dropped.image
    if decoder.embed_dim and image_embed is None:
        image_embed = drop_image.new_zeros((len(drop_image), decoder.embed_dim), dtype=torch.float32)
        drop_image = torch.ones_like(drop_image)
    text, drop_text = given.text, dropped.text
    if decoder.text_width and text is None:
        text, drop_text = _no_text(decoder, drop_text), torch.ones_like(drop_text)
    labels, drop_label = given.labels, dropped.label
    if decoder.classes and labels is None:
        labels = torch.full_like(drop_label, NO_LABEL, dtype=torch.int64)
    if labels is not None:
        drop_label = drop_label | (labels < 0)
    return lambda x, t: decoder(
        x,
        t,
        image_embed=image_embed,
        text_encodings=None if text is None else text.encodings,
        text_mask=None if text is None else text.text_mask,
        labels=labels,
        drop_image=drop_image,
        drop_text=drop_text,
        drop_label=drop_label,
        generator=generator,
    )


def _no_text(decoder: Decoder, dropped: Tensor) -> Text:
    """As many captions as `dropped` [B], as long as the null that takes their place."""
    shape = len(dropped), len(torch.atleast_2d(decoder.null_encoding_W)), decoder.text_width
    encodings = torch.zeros(shape, device=dropped.device)
    return Text(encodings[:, 0, :0], encodings, dropped.new_ones(shape[:2]))


def guided_decoder(
    decoder: Decoder,
    given: Given,
    *,
    count: int,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    device: torch.device,
    negative: Given | None = None,
) -> Model:
    """The decoder with the conditions of `count` pictures bound, and the sampler's guidance.

    Guidance leads away from `negative`, conditions of the same kinds, or from the decoder without conditions.
    """
    keep = torch.zeros(count, dtype=torch.bool, device=device)
    both = given.repeated(2) if negative is None else given.followed_by(negative)
    dropped = torch.cat([keep, ~keep if negative is None else keep])
    return with_guidance(
        decoder_model(decoder, given, Dropped.everywhere(keep)),
        decoder_model(decoder, both, Dropped.everywhere(dropped)),
        cfg=sampler,
        steps=diffusion.steps,
    )


def sample_latents(
    decoder: Decoder,
    given: Given,
    *,
    shape: tuple[int, int, int, int],
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    generator: torch.Generator,
    negative: Given | None = None,
) -> Tensor:
    """What the decoder was trained on, standardized latents or pixels, of `shape` [B, C, H, W], for B conditions."""
    model = guided_decoder(
        decoder,
        given,
        count=shape[0],
        diffusion=diffusion,
        sampler=sampler,
        device=generator.device,
        negative=negative,
    )
    noise = normal(shape, generator, device=generator.device)
    return sample(denoiser(model, diffusion), noise, sampler, diffusion=diffusion, generator=generator)
