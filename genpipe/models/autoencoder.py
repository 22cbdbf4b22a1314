"""Autoencoders: images to a small grid of latents and back (Rombach et al. 2022, sec. 3.1), of several kinds.

Shapes: B batch, C channels, H and W pixels; latents are [B, latent_channels, H / factor, W / factor].
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, Tag
from torch import Tensor, nn

from genpipe.config import Config, by_kind
from genpipe.models.dc_autoencoder import (
    DeepCompressionConfig,
    deep_compression_decoder,
    deep_compression_encoder,
)
from genpipe.models.ldm_autoencoder import LdmConfig, ldm_decoder, ldm_encoder
from genpipe.models.precision import fp32 as full_precision
from genpipe.models.quantizer import Kl, Plain, Quantizer, Vq
from genpipe.models.space_to_depth_autoencoder import FoldedConfig, folded_decoder, folded_encoder
from genpipe.models.tiling import tiled
from genpipe.models.vqvae2 import (
    HierarchicalConfig,
    HierarchicalDecoder,
    HierarchicalEncoder,
    LevelQuantizer,
    pack,
)

TILE, OVERLAP = 512, 128
"""Pixels of a side of the tiles that large images are cut into, and of what neighbors share."""

TILED_ABOVE = 1024
"""Pixels of the longer side above which images are encoded and decoded in tiles, in eval mode."""

LOGVAR_RANGE = (-30.0, 20.0)


class IdentityConfig(Config):
    """No autoencoder: latents are the image itself, for decoders in pixel space."""

    kind: Literal["identity"]
    image_channels: PositiveInt = Field(3, description="channels of an image")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return 1

    @property
    def latent_channels(self) -> int:
        """The channels of an image."""
        return self.image_channels

    @property
    def bottleneck(self) -> Plain:
        """None: latents are what the image is."""
        return Plain(kind="plain")


AnyConfig = FoldedConfig | LdmConfig | DeepCompressionConfig | HierarchicalConfig | IdentityConfig
AutoencoderConfig = Annotated[
    Annotated[FoldedConfig, Tag("folded")]
    | Annotated[LdmConfig, Tag("ldm")]
    | Annotated[DeepCompressionConfig, Tag("deep_compression")]
    | Annotated[HierarchicalConfig, Tag("hierarchical")]
    | Annotated[IdentityConfig, Tag("identity")],
    by_kind("folded"),
]
"""The config of any kind; without `kind` it is `folded`."""


class Autoencoder(nn.Module):
    """An encoder and a decoder with a bottleneck between them; `quantizer` is there where that is a codebook.

    Latents are what is before the codebook (LDM's VQ-reg), so that diffusion runs on a continuous grid; `decode`
    quantizes first. Nothing here standardizes latents: the statistics are measured over the data after training, and
    applied once, by the stage that writes the features.
    """

    def __init__(
        self,
        cfg: AnyConfig,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        quantizer: Quantizer | LevelQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer

    @property
    def last_layer(self) -> Tensor:
        """Weights of the last convolution, where the adaptive discriminator weight compares gradients."""
        convolutions = [m for m in self.decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        return convolutions[-1].weight

    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], sides divisible by the factor -> (mean, logvar), each a latent grid in fp32.

        A latent sample is mean + exp(logvar / 2) noise; without a KL bottleneck logvar is -30: practically no noise.
        In eval mode large images are encoded in tiles.
        """
        sides, factor = tuple(images_BCHW.shape[-2:]), self.cfg.factor
        if any(side % factor for side in sides):
            raise ValueError(f"images of {sides[0]}x{sides[1]} do not divide by the autoencoder's factor {factor}")
        if self._in_tiles(max(sides)):
            return encode_tiled(self, images_BCHW, tile=_cells(TILE, factor), overlap=_cells(OVERLAP, factor))
        return self._encode(images_BCHW)

    def _encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        moments = self._moments(images_BCHW).float()
        if not isinstance(self.cfg.bottleneck, Kl):
            return moments, torch.full_like(moments, LOGVAR_RANGE[0])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def _moments(self, images_BCHW: Tensor) -> Tensor:
        return self.encoder(images_BCHW)

    def decode(self, latents: Tensor, *, fp32: bool = False) -> Tensor:
        """Latent grid -> fp32 images, about [-1, 1]; `fp32` also computes in fp32, whatever autocast is set to.

        In eval mode large images are decoded in tiles.
        """
        if self._in_tiles(max(latents.shape[-2:]) * self.cfg.factor):
            sizes = {"tile": _cells(TILE, self.cfg.factor), "overlap": _cells(OVERLAP, self.cfg.factor)}
            return decode_tiled(self, latents, fp32=fp32, **sizes)
        return self.render(self.quantized(latents), fp32=fp32)

    def quantized(self, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them: the nearest codes, or the latents themselves without a codebook."""
        return latents if self.quantizer is None else self.quantizer(latents).vectors

    def render(self, vectors: Tensor, *, fp32: bool = False) -> Tensor:
        """The decoder alone, on what `quantized` gives, in one piece."""
        if fp32:
            with full_precision(vectors.device):
                return self.decoder(vectors.float()).float()
        return self.decoder(vectors).float()

    def _in_tiles(self, pixels: int) -> bool:
        return pixels > TILED_ABOVE and not self.training and self.cfg.factor > 1

    def forward(self, images_BCHW: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mean, logvar) through a posterior sample; `noise` has the shape of the latents."""
        mean, logvar = self.encode(images_BCHW)
        return self.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


class HierarchicalAutoencoder(Autoencoder):
    """The bottom level is encoded given the top's codes, or given its means where the bottleneck has no codes."""

    encoder: HierarchicalEncoder

    def _moments(self, images_BCHW: Tensor) -> Tensor:
        features = self.encoder.features(images_BCHW)
        top = self.encoder.top(features)
        pieces = 2 if isinstance(self.cfg.bottleneck, Kl) else 1
        decided = top.chunk(pieces, dim=1)[0]
        if isinstance(self.quantizer, LevelQuantizer):
            decided = self.quantizer.top(decided).vectors
        bottom = self.encoder.bottom(features, decided)
        levels = zip(top.chunk(pieces, dim=1), bottom.chunk(pieces, dim=1), strict=True)
        return torch.cat([pack(above, below) for above, below in levels], dim=1)


def build_autoencoder(cfg: AnyConfig) -> Autoencoder:
    """The autoencoder of any kind, with fresh weights."""
    bottleneck = cfg.bottleneck
    if isinstance(cfg, IdentityConfig):
        return Autoencoder(cfg, encoder=nn.Identity(), decoder=nn.Identity())
    moments = 2 if isinstance(bottleneck, Kl) else 1
    if isinstance(cfg, HierarchicalConfig):
        encoder, decoder = HierarchicalEncoder(cfg, moments=moments), HierarchicalDecoder(cfg)
        levels = LevelQuantizer(cfg, bottleneck) if isinstance(bottleneck, Vq) else None
        return HierarchicalAutoencoder(cfg, encoder=encoder, decoder=decoder, quantizer=levels)
    channels_out = moments * cfg.latent_channels
    networks: tuple[nn.Module, nn.Module]
    if isinstance(cfg, FoldedConfig):
        networks = folded_encoder(cfg, channels_out=channels_out), folded_decoder(cfg)
    elif isinstance(cfg, LdmConfig):
        networks = ldm_encoder(cfg, channels_out=channels_out), ldm_decoder(cfg)
    else:
        networks = deep_compression_encoder(cfg, channels_out=channels_out), deep_compression_decoder(cfg)
    quantizer = Quantizer(bottleneck, cfg.latent_channels) if isinstance(bottleneck, Vq) else None
    return Autoencoder(cfg, encoder=networks[0], decoder=networks[1], quantizer=quantizer)


def decode_tiled(model: Autoencoder, latents: Tensor, *, tile: int, overlap: int, fp32: bool = False) -> Tensor:
    """`model.decode` in tiles of `tile` latent cells that share at least `overlap`, blended where they do."""
    scale = Fraction(model.cfg.factor)
    vectors = model.quantized(latents)
    return tiled(lambda part: model.render(part, fp32=fp32), vectors, tile=tile, overlap=overlap, scale=scale)


def encode_tiled(model: Autoencoder, images_BCHW: Tensor, *, tile: int, overlap: int) -> tuple[Tensor, Tensor]:
    """`model.encode` in tiles whose sides are `tile` latent cells, blended where they share some."""
    factor = model.cfg.factor
    moments = tiled(
        lambda part: torch.cat(model._encode(part), dim=1),
        images_BCHW,
        tile=tile * factor,
        overlap=overlap * factor,
        scale=Fraction(1, factor),
    )
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over each sample's latents [B]; Kingma & Welling 2014."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


def _cells(pixels: int, factor: int) -> int:
    return max(2, pixels // factor)
