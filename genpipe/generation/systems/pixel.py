"""Diffusion on pixels: class-conditional (Dhariwal & Nichol 2021; Karras et al. 2022) or unconditional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.cascade import Cascade, CascadeConfig, check_cascade
from genpipe.generation.conditions import Conditions, Given
from genpipe.generation.drawing import draw
from genpipe.generation.parts import check_conditions, check_part_sampler, classes_of, given_of, load_decoder


class PixelConfig(CascadeConfig):
    """A class label, or nothing, to pixels."""

    kind: Literal["pixel"]
    decoder: SamplerConfig = Field(SamplerConfig(kind="heun", steps=18), description="sampler of the decoder")

    def roles(self) -> dict[str, Role]:
        """The trained parts that it joins."""
        return {"decoder": Role("decoder"), "upsamplers": Role("upsampler", optional=True, several=True)}

    def check(self, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Its `size`, `conditioned_on` and, where known, `classes`. Raises ValueError for parts that do not fit."""
        size = _size(parts["decoder"])
        promised = check_conditions(parts)
        check_part_sampler(self.decoder, parts["decoder"], setting="model.decoder")
        return {"size": check_cascade(self, parts, size=size), **promised}

    def load(self, parts: Mapping[str, Artifact], *, device: torch.device) -> PixelSystem:
        """The system with its parts in memory."""
        return PixelSystem(self, parts, device=device)


class PixelSystem:
    """A decoder of pixels, loaded, and its upsamplers."""

    def __init__(self, cfg: PixelConfig, parts: Mapping[str, Artifact], *, device: torch.device) -> None:
        self.cfg, self.device, self.decoder_sampler = cfg, device, cfg.decoder
        promised = cfg.check(parts)
        self.size: int = promised["size"]
        self.conditioned_on = frozenset(promised["conditioned_on"])
        self.classes = classes_of(parts["decoder"])
        self.base_size = _size(parts["decoder"])
        self.grid = (3, self.base_size, self.base_size)
        self.decoder, self.decoder_diffusion = load_decoder(parts["decoder"], device=device)
        self.cascade = Cascade(cfg, parts, device=device)

    def sample(self, conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        """Pictures [B, 3, size, size] in [-1, 1]."""
        return self.stages(conditions, generator=generator)[-1]

    def stages(self, conditions: Conditions, *, generator: torch.Generator) -> list[Tensor]:
        """The pictures as the decoder and then each upsampler makes them, [B, 3, S, S] in [-1, 1]."""
        return draw(self, conditions, generator=generator)

    def given(self, conditions: Conditions, *, generator: torch.Generator) -> Given:
        """What the decoder is told."""
        return given_of(conditions, self.conditioned_on, device=self.device)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures as the decoder draws them, which is as they are."""
        return images.float()

    def decode(self, x0: Tensor) -> Tensor:
        """What the decoder drew, in [-1, 1]."""
        return x0.clamp(-1, 1)


def _size(decoder: Artifact) -> int:
    """The side of what a decoder of pixels draws. Raises ValueError for a decoder of latents."""
    if "image_size" not in decoder.meta:
        raise ValueError("inputs.decoder draws an autoencoder's latents, not pixels; set model.kind to latent")
    size: int = decoder.meta["image_size"]
    return size
