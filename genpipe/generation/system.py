"""From text to pixels: the prior, the decoder, the autoencoder and the upsamplers, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, fetch, several
from genpipe.config import Config
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig
from genpipe.generation.conditions import TOKENIZER_FILE, Text, embed_statistics, latent_statistics
from genpipe.generation.embeds import sample_image_embeds
from genpipe.generation.latents import sample_latents
from genpipe.generation.upsampling import Space, space_of, upsample
from genpipe.lineage import check_lineage
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.models.decoder import Decoder
from genpipe.models.prior import Prior
from genpipe.models.upsampler import Upsampler
from genpipe.weights import load_weights


class GenerationConfig(Config):
    """How pictures are made from prompts."""

    prior: SamplerConfig = SamplerConfig(steps=25, guidance_scale=1.0)
    candidates: int = Field(2, ge=1, description="prior samples a prompt; the best match with the text is kept")
    decoder: SamplerConfig = SamplerConfig(steps=25, guidance_scale=2.0)
    upsamplers: tuple[SamplerConfig, ...] = Field((), description="one for each upsampler; default: 8 steps")
    noise_aug: float = Field(0.1, ge=0, lt=1, description="noise level on the upsamplers' low_res")


class Generated(NamedTuple):
    """Pictures of B prompts in [-1, 1]: at base size, and at the end of the cascade; and image embeddings [B, D]."""

    images: Tensor
    upsampled: Tensor
    image_embeds: Tensor


class Enlarger(NamedTuple):
    """A trained upsampler and where it draws."""

    model: Upsampler
    diffusion: DiffusionConfig
    space: Space
    size: int


class Generator:
    """The trained parts of a text-to-image system, loaded from their artifacts: those of `inputs`, by stage."""

    def __init__(self, inputs: Mapping[str, Artifact], *, device: torch.device) -> None:
        check_lineage(inputs)
        self.device = device
        meta = inputs["features"].meta
        self.context_length: int = meta["context_length"]
        self.latent_shape = (meta["latent_channels"], meta["latent_size"], meta["latent_size"])
        self.latent_statistics = latent_statistics(meta, device)
        self.embed_statistics = embed_statistics(meta, device)
        self.autoencoder = cast(Autoencoder, self._load(inputs["autoencoder"])[0])
        self.clip = cast(CLIP, self._load(inputs["clip"])[0])
        self.tokenizer = CaptionTokenizer.load(fetch(inputs["clip"]) / TOKENIZER_FILE)
        decoder, decoder_diffusion = self._load(inputs["decoder"])
        self.decoder, self.decoder_diffusion = cast(Decoder, decoder), decoder_diffusion
        self.prior: Prior | None = None
        if "prior" in inputs:
            prior, self.prior_diffusion = self._load(inputs["prior"])
            self.prior = cast(Prior, prior)
        self.enlargers = [self._enlarger(artifact) for artifact in several(inputs, "upsamplers")]

    @property
    def size(self) -> int:
        """Side of the pictures that come out."""
        return self.enlargers[-1].size if self.enlargers else self.latent_shape[1] * self.autoencoder.cfg.factor

    def _load(self, artifact: Artifact) -> tuple[torch.nn.Module, DiffusionConfig]:
        module, extra = load_weights(fetch(artifact), kind=artifact.kind, device=self.device)
        return module, DiffusionConfig.model_validate(extra.get("diffusion", {}))

    def _enlarger(self, artifact: Artifact) -> Enlarger:
        module, extra = load_weights(fetch(artifact), kind="upsampler", device=self.device)
        size = artifact.meta["image_size"]
        space = space_of(extra, autoencoder=self.autoencoder, statistics=self.latent_statistics)
        return Enlarger(cast(Upsampler, module), DiffusionConfig.model_validate(extra["diffusion"]), space, size)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        tokens = self.tokenizer.encode_short(list(prompts), context_length=self.context_length)
        tokens_BL = torch.from_numpy(tokens).to(self.device)
        embed, encodings = self.clip.encode_text(tokens_BL)
        return Text(embed, encodings.float(), self.clip.text_mask(tokens_BL))

    @torch.no_grad()
    def prior_embeds(self, text: Text, cfg: GenerationConfig, *, generator: torch.Generator) -> Tensor:
        """Image embeddings for captions, unit vectors [B, D]; zeros where the decoder is not told of any."""
        if self.prior is None:
            return torch.zeros_like(text.embed)
        return sample_image_embeds(
            self.prior,
            text,
            statistics=self.embed_statistics,
            diffusion=self.prior_diffusion,
            sampler=cfg.prior,
            candidates=cfg.candidates,
            generator=generator,
        )

    @torch.no_grad()
    def decode(self, image_embeds: Tensor, text: Text, cfg: GenerationConfig, *, generator: torch.Generator) -> Tensor:
        """Base-size images in [-1, 1] for unit image embeddings and their captions."""
        latents = sample_latents(
            self.decoder,
            image_embeds,
            text,
            shape=self.latent_shape,
            statistics=self.embed_statistics,
            diffusion=self.decoder_diffusion,
            sampler=cfg.decoder,
            generator=generator,
        )
        return self.autoencoder.decode(self.latent_statistics.restore(latents), fp32=True).clamp(-1, 1)

    @torch.no_grad()
    def enlarge(self, images: Tensor, cfg: GenerationConfig, *, generator: torch.Generator) -> list[Tensor]:
        """The images at the end of each step of the cascade."""
        made: list[Tensor] = []
        for i, enlarger in enumerate(self.enlargers):
            images = upsample(
                enlarger.model,
                images,
                size=enlarger.size,
                space=enlarger.space,
                noise_aug=cfg.noise_aug,
                diffusion=enlarger.diffusion,
                sampler=cfg.upsamplers[i] if i < len(cfg.upsamplers) else SamplerConfig(steps=8),
                generator=generator,
            )
            made.append(images)
        return made

    def generate(self, prompts: Sequence[str], cfg: GenerationConfig, *, generator: torch.Generator) -> Generated:
        """Pictures for prompts: the same seed and prompts give the same pictures."""
        text = self.encode_text(prompts)
        embeds = self.prior_embeds(text, cfg, generator=generator)
        images = self.decode(embeds, text, cfg, generator=generator)
        return Generated(images, [images, *self.enlarge(images, cfg, generator=generator)][-1], embeds)
