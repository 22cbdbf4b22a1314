"""What the uses of a system share: its decoder with conditions bound, and the way from pictures to latents and back.

Shape legend: B pictures, C channels, H and W grid of what the decoder draws, S the side of its pictures in pixels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from genpipe.diffusion.noise import restarted
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig
from genpipe.generation.cascade import Cascade
from genpipe.generation.conditions import Conditions, Given, Statistics
from genpipe.generation.latents import guided_decoder, sample_latents
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.decoder import Decoder


class Drawing(Protocol):
    """What every use needs of a system: a decoder, what it is told, and what its drawings are as pictures."""

    device: torch.device

    decoder: Decoder

    decoder_sampler: SamplerConfig
    """How its decoder draws: as it was configured, unless it is replaced."""

    decoder_diffusion: DiffusionConfig
    """What its decoder was trained for, which says which samplers fit."""

    grid: tuple[int, int, int]
    """(C, H, W) of what its decoder draws: latents, or pixels."""

    base_size: int
    """Side of the decoder's pictures in pixels, before the upsamplers."""

    cascade: Cascade

    def given(self, conditions: Conditions, *, generator: torch.Generator) -> Given:
        """What the decoder is told of conditions."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] as the decoder draws them, fp32 [B, C, H, W]."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [-1, 1]."""
        ...


class OnLatents:
    """The half of it for systems whose decoder draws standardized latents of an autoencoder."""

    autoencoder: Autoencoder

    latent_statistics: Statistics

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] as standardized latents, fp32 [B, C, H, W]."""
        return self.latent_statistics.standardize(self.autoencoder.encode(images)[0])

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Pictures in [-1, 1] of standardized latents."""
        return self.autoencoder.decode(self.latent_statistics.restore(x0), fp32=True).clamp(-1, 1)


@torch.no_grad()
def told(system: Drawing, conditions: Conditions, *, generator: torch.Generator) -> tuple[Given, Given | None]:
    """What the decoder is told of conditions, and of the negative ones, if there are some.

    The negative ones have the seed's own generator, so that they change nothing of what is drawn for the others.
    """
    given, opposite = system.given(conditions, generator=generator), conditions.opposite()
    if opposite is None:
        return given, None
    return given, system.given(opposite, generator=restarted(generator))


@torch.no_grad()
def draft(system: Drawing, conditions: Conditions, *, generator: torch.Generator) -> Tensor:
    """The decoder's pictures, which no upsampler has seen yet, fp32 [B, 3, S, S] in [-1, 1], S the base size."""
    given, negative = told(system, conditions, generator=generator)
    return draw_given(system, given, count=conditions.count, negative=negative, generator=generator)


@torch.no_grad()
def draw(system: Drawing, conditions: Conditions, *, generator: torch.Generator) -> list[Tensor]:
    """The pictures as the decoder and then each upsampler makes them, fp32 [B, 3, size, size] in [-1, 1]."""
    images = draft(system, conditions, generator=generator)
    return [images, *system.cascade.enlarge(images, generator=generator)]


@torch.no_grad()
def draw_given(
    system: Drawing, given: Given, *, count: int, negative: Given | None = None, generator: torch.Generator
) -> Tensor:
    """The decoder's pictures of what it is told, fp32 [B, 3, S, S] in [-1, 1]; `count` is B."""
    x0 = sample_latents(
        system.decoder,
        given,
        shape=(count, *system.grid),
        diffusion=system.decoder_diffusion,
        sampler=system.decoder_sampler,
        generator=generator,
        negative=negative,
    )
    return system.decode(x0)


def enlarged(system: Drawing, images: Tensor, generator: torch.Generator) -> Tensor:
    """The decoder's pictures [B, 3, S, S] as the last upsampler makes them, [B, 3, size, size] in [-1, 1]."""
    return [images, *system.cascade.enlarge(images, generator=generator)][-1]


def bound(
    system: Drawing,
    given: Given,
    *,
    count: int,
    negative: Given | None = None,
    sampler: SamplerConfig | None = None,
) -> Model:
    """The decoder with the conditions of `count` pictures bound, guided as the system's sampler says, or `sampler`."""
    return guided_decoder(
        system.decoder,
        given,
        count=count,
        diffusion=system.decoder_diffusion,
        sampler=sampler or system.decoder_sampler,
        device=system.device,
        negative=negative,
    )
