"""From image embeddings and captions to latents: sampling the decoder. B prompts, D embedding width."""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, sample, with_guidance
from genpipe.generation.conditions import Statistics, Text
from genpipe.models.decoder import Decoder


def decoder_model(
    decoder: Decoder,
    image_embed: Tensor,
    text: Text,
    *,
    drop_image: Tensor,
    drop_text: Tensor,
    generator: torch.Generator | None = None,
) -> Model:
    """The decoder with its conditions bound; `image_embed` [B, D] is standardized; `generator` is training's."""
    return lambda x, t: decoder(
        x,
        t,
        image_embed=image_embed,
        text_encodings=text.encodings,
        text_mask=text.mask,
        drop_image=drop_image,
        drop_text=drop_text,
        generator=generator,
    )


def sample_latents(
    decoder: Decoder,
    image_embed: Tensor,
    text: Text,
    *,
    shape: tuple[int, int, int],
    statistics: Statistics,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """Standardized latents [B, *shape] for unit image embeddings [B, D] and their captions."""
    embed = statistics.standardize(image_embed)
    keep = torch.zeros(len(embed), dtype=torch.bool, device=embed.device)
    drop = torch.cat([keep, ~keep])
    model = with_guidance(
        decoder_model(decoder, embed, text, drop_image=keep, drop_text=keep),
        decoder_model(decoder, embed.repeat(2, 1), text.repeated(2), drop_image=drop, drop_text=drop),
        cfg=sampler,
        steps=diffusion.steps,
    )
    noise = torch.randn((len(embed), *shape), generator=generator, device=embed.device)
    return sample(denoiser(model, diffusion), noise, sampler, diffusion=diffusion, generator=generator)
