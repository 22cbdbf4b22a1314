"""Sampling a decoder: from conditions to latents, or to pixels. B pictures, D embedding width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, sample, with_guidance
from genpipe.generation.conditions import Given
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

    A decoder that takes an image embedding and is given none gets its learned null everywhere, and so does one that
    takes labels where a label is negative.
    """
    image_embed, drop_image = given.image_embed, dropped.image
    if decoder.embed_dim and image_embed is None:
        image_embed = drop_image.new_zeros((len(drop_image), decoder.embed_dim), dtype=torch.float32)
        drop_image = torch.ones_like(drop_image)
    drop_label = dropped.label
    if given.labels is not None:
        drop_label = drop_label | (given.labels < 0)
    return lambda x, t: decoder(
        x,
        t,
        image_embed=image_embed,
        text_encodings=None if given.text is None else given.text.encodings,
        text_mask=None if given.text is None else given.text.text_mask,
        labels=given.labels,
        drop_image=drop_image,
        drop_text=dropped.text,
        drop_label=drop_label,
        generator=generator,
    )


def sample_latents(
    decoder: Decoder,
    given: Given,
    *,
    shape: tuple[int, int, int, int],
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """What the decoder was trained on, standardized latents or pixels, of `shape` [B, C, H, W], for B conditions."""
    keep = torch.zeros(shape[0], dtype=torch.bool, device=generator.device)
    model = with_guidance(
        decoder_model(decoder, given, Dropped.everywhere(keep)),
        decoder_model(decoder, given.repeated(2), Dropped.everywhere(torch.cat([keep, ~keep]))),
        cfg=sampler,
        steps=diffusion.steps,
    )
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return sample(denoiser(model, diffusion), noise, sampler, diffusion=diffusion, generator=generator)
