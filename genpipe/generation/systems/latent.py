"""Latent diffusion without a prior (Rombach et al. 2022): from text, a class label or both to latents to a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.cascade import Cascade, CascadeConfig, check_cascade
from genpipe.generation.conditions import Conditions, Given, latent_statistics
from genpipe.generation.drawing import OnLatents, draw
from genpipe.generation.parts import (
    check_conditions,
    check_latents,
    check_part_sampler,
    classes_of,
    given_of,
    latent_shape,
    load_decoder,
    load_part,
    load_text_encoding,
)
from genpipe.models.autoencoder import Autoencoder


class LatentConfig(CascadeConfig):
    """Text, class label or nothing to latents to pixels.

    A decoder that was trained with image embeddings as well draws with its null embedding.
    """

    kind: Literal["latent"]
    decoder: SamplerConfig = Field(SamplerConfig(steps=25, guidance_scale=2.0), description="sampler of the decoder")

    def roles(self) -> dict[str, Role]:
        """The trained parts that it joins; the encoder that the decoder's text came from is one of two."""
        return {
            "autoencoder": Role("autoencoder"),
            "clip": Role("clip", optional=True),
            "text_encoder": Role("text_encoder", optional=True),
            "decoder": Role("decoder"),
            "upsamplers": Role("upsampler", optional=True, several=True),
        }

    def check(self, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Its `size`, `conditioned_on` and, where known, `classes`. Raises ValueError for parts that do not fit."""
        size = check_latents(parts)
        promised = check_conditions(parts)
        check_part_sampler(self.decoder, parts["decoder"], setting="model.decoder")
        return {"size": check_cascade(self, parts, size=size), **promised}

    def load(self, parts: Mapping[str, Artifact], *, device: torch.device) -> LatentSystem:
        """The system with its parts in memory."""
        return LatentSystem(self, parts, device=device)


class LatentSystem(OnLatents):
    """An autoencoder and a decoder of its latents, loaded, with what the decoder is told of the text."""

    def __init__(self, cfg: LatentConfig, parts: Mapping[str, Artifact], *, device: torch.device) -> None:
        self.cfg, self.device, self.decoder_sampler = cfg, device, cfg.decoder
        promised = cfg.check(parts)
        self.size: int = promised["size"]
        self.conditioned_on = frozenset(promised["conditioned_on"])
        self.classes = classes_of(parts["decoder"])
        self.base_size = check_latents(parts)
        self.grid = latent_shape(parts["autoencoder"])
        self.latent_statistics = latent_statistics(parts["decoder"].meta, device)
        self.autoencoder = cast(Autoencoder, load_part(parts["autoencoder"], device=device)[0])
        self.encode_text = load_text_encoding(parts, device=device) if "text" in self.conditioned_on else None
        self.decoder, self.decoder_diffusion = load_decoder(parts["decoder"], device=device)
        self.cascade = Cascade(cfg, parts, device=device, autoencoder=self.autoencoder)

    def sample(self, conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        """Pictures [B, 3, size, size] in [-1, 1]."""
        return self.stages(conditions, generator=generator)[-1]

    def stages(self, conditions: Conditions, *, generator: torch.Generator) -> list[Tensor]:
        """The pictures as the decoder and then each upsampler makes them, [B, 3, S, S] in [-1, 1]."""
        return draw(self, conditions, generator=generator)

    @torch.no_grad()
    def given(self, conditions: Conditions, *, generator: torch.Generator) -> Given:
        """What the decoder is told."""
        return given_of(conditions, self.conditioned_on, encode_text=self.encode_text, device=self.device)
