"""From text to pixels: the prior, the decoder, the autoencoder and the upsampler, one after the other.

Shape legend: B prompts, L tokens, W text width, D embedding width, C H W latents or pixels. Image embeddings are
unit vectors wherever they leave a function; inside the diffusion they are standardised with CLIP's statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from genpipe.artifacts import Artifact, fetch
from genpipe.config import Config
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.diffusion.guidance import guided
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, sample
from genpipe.diffusion.schedules import add_noise
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.models.prior import Prior
from genpipe.models.unclip import Decoder
from genpipe.models.upsampler import Upsampler
from genpipe.weights import load_weights

TOKENIZER_FILE = "tokenizer.json"


class GenerationConfig(Config):
    """How pictures are made from prompts."""

    prior: SamplerConfig = SamplerConfig(steps=25, guidance_scale=1.0)
    candidates: int = Field(2, ge=1, description="prior samples a prompt; the best match with the text is kept")
    decoder: SamplerConfig = SamplerConfig(steps=25, guidance_scale=2.0)
    upsampler: SamplerConfig = SamplerConfig(steps=8)
    noise_aug: float = Field(0.1, ge=0, lt=1, description="noise level on the upsampler's low_res")


class Text(NamedTuple):
    """What CLIP's text tower says of captions: embed [B, D], encodings [B, L, W], mask bool [B, L]."""

    embed: Tensor
    encodings: Tensor
    mask: Tensor

    @classmethod
    def from_cache(cls, batch: Mapping[str, Tensor]) -> Text:
        """From a batch of cached features (`text_embeds`, `text_encodings`, `text_lengths`)."""
        encodings = batch["text_encodings"].float()
        positions = torch.arange(encodings.shape[1], device=encodings.device)
        return cls(batch["text_embeds"].float(), encodings, positions < batch["text_lengths"][:, None])

    def repeated(self, times: int) -> Text:
        return Text(*(part.repeat(times, *[1] * (part.ndim - 1)) for part in self))


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation by channel or dimension: how latents and embeddings are standardised."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], *, axes: int, device: torch.device) -> Statistics:
        """From a manifest's lists, with `axes` trailing axes to broadcast over."""
        shape = (-1, *[1] * axes)
        return cls(torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape))

    def standardise(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def latent_statistics(meta: Mapping[str, list[float]], device: torch.device) -> Statistics:
    """Of the autoencoder's latents, by channel, from a manifest's meta."""
    return Statistics.of(meta["latent_mean"], meta["latent_std"], axes=2, device=device)


def embed_statistics(meta: Mapping[str, list[float]], device: torch.device) -> Statistics:
    """Of CLIP's image embeddings, by dimension, from a manifest's meta."""
    return Statistics.of(meta["image_embed_mean"], meta["image_embed_std"], axes=0, device=device)


def prior_model(prior: Prior, text: Text, *, drop_text: Tensor) -> Model:
    """The prior with its caption bound; `text.embed` is brought to unit variance, as the image embedding is."""
    embed = text.embed * text.embed.shape[-1] ** 0.5
    return lambda x, t: prior(
        x, t=t, text_embed=embed, text_encodings=text.encodings, text_mask=text.mask, drop_text=drop_text
    )


def decoder_model(decoder: Decoder, image_embed: Tensor, text: Text, *, drop_image: Tensor, drop_text: Tensor) -> Model:
    """The decoder with its conditions bound; `image_embed` [B, D] is standardised."""
    return lambda x, t: decoder(
        x,
        t,
        image_embed=image_embed,
        text_encodings=text.encodings,
        text_mask=text.mask,
        drop_image=drop_image,
        drop_text=drop_text,
    )


def with_guidance(conditional: Model, both: Model, *, scale: float) -> Model:
    """Classifier-free guidance; `both` is the model bound to the conditions and then, doubled, to their absence."""
    if scale == 1.0:
        return conditional

    def model(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = both(torch.cat([x, x]), torch.cat([t, t])).float().chunk(2)
        return guided(cond, uncond, scale=scale)

    return model


def sample_image_embeds(
    prior: Prior,
    text: Text,
    *,
    statistics: Statistics,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """Image embeddings for captions, unit vectors [B, D]: of `candidates` samples the best match with the text.

    unCLIP (Ramesh et al. 2022), section 2.2: two samples, the higher dot product with the text embedding is kept.
    """
    count = len(text.embed)
    many = text.repeated(candidates)
    keep = torch.zeros(len(many.embed), dtype=torch.bool, device=many.embed.device)
    model = with_guidance(
        prior_model(prior, many, drop_text=keep),
        prior_model(prior, many.repeated(2), drop_text=torch.cat([keep, ~keep])),
        scale=sampler.guidance_scale,
    )
    noise = torch.randn(many.embed.shape, generator=generator, device=many.embed.device)
    x0 = sample(denoiser(model, diffusion), noise, sampler, schedule=diffusion.schedule)
    embeds = F.normalize(statistics.restore(x0), dim=-1).view(candidates, count, -1)
    best = (embeds * text.embed).sum(-1).argmax(0)
    return embeds[best, torch.arange(count, device=best.device)]


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
    """Standardised latents [B, *shape] for unit image embeddings [B, D] and their captions."""
    embed = statistics.standardise(image_embed)
    keep = torch.zeros(len(embed), dtype=torch.bool, device=embed.device)
    drop = torch.cat([keep, ~keep])
    model = with_guidance(
        decoder_model(decoder, embed, text, drop_image=keep, drop_text=keep),
        decoder_model(decoder, embed.repeat(2, 1), text.repeated(2), drop_image=drop, drop_text=drop),
        scale=sampler.guidance_scale,
    )
    noise = torch.randn((len(embed), *shape), generator=generator, device=embed.device)
    return sample(denoiser(model, diffusion), noise, sampler, schedule=diffusion.schedule)


def enlarge(images: Tensor, *, size: int) -> Tensor:
    """Images [B, C, h, w] in [-1, 1] as [B, C, size, size], bicubic: what the upsampler adds detail to."""
    return F.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)


def upsample(
    upsampler: Upsampler,
    low_res: Tensor,
    *,
    size: int,
    residual_std: float,
    noise_aug: float,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """Images [B, C, h, w] in [-1, 1] as [B, C, size, size]: the enlarged image plus a sampled residual.

    The diffusion runs on the residual in units of its standard deviation (Li et al. 2022, SRDiff), conditioned on
    the image with noise of a known level (Ho et al. 2022, cascaded diffusion, section 4.2).
    """
    large = enlarge(low_res, size=size)
    level = large.new_full((len(large),), noise_aug)
    noisy = augment(large, level=level, generator=generator)
    noise = torch.randn(large.shape, generator=generator, device=large.device)
    model: Model = lambda x, t: upsampler(x, t, low_res=noisy, noise_aug=level)  # noqa: E731
    residual = sample(denoiser(model, diffusion), noise, sampler, schedule=diffusion.schedule)
    return (large + residual_std * residual).clamp(-1, 1)


def augment(images: Tensor, *, level: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise augmentation of level [B] in [0, 1], variance preserving (cosine schedule)."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return add_noise(images, noise=noise, t=level, schedule="cosine")


class Generated(NamedTuple):
    """Pictures of B prompts in [-1, 1]: at base size, upsampled; and the prior's image embeddings [B, D]."""

    images: Tensor
    upsampled: Tensor
    image_embeds: Tensor


class Generator:
    """The trained parts of a text-to-image system, loaded from their artifacts."""

    NEEDS = ("autoencoder", "clip", "features", "prior", "decoder", "upsampler")

    def __init__(self, inputs: Mapping[str, Artifact], *, device: torch.device) -> None:
        check_lineage(inputs)
        self.device = device
        folders = {name: fetch(inputs[name]) for name in self.NEEDS if name != "features"}
        self.autoencoder = cast(Autoencoder, self._load(folders, "autoencoder")[0])
        self.clip = cast(CLIP, self._load(folders, "clip")[0])
        self.tokenizer = CaptionTokenizer.load(folders["clip"] / TOKENIZER_FILE)
        prior, prior_extra = self._load(folders, "prior")
        decoder, decoder_extra = self._load(folders, "decoder")
        upsampler, upsampler_extra = self._load(folders, "upsampler")
        self.prior, self.decoder = cast(Prior, prior), cast(Decoder, decoder)
        self.upsampler = cast(Upsampler, upsampler)
        self.prior_diffusion = DiffusionConfig.model_validate(prior_extra["diffusion"])
        self.decoder_diffusion = DiffusionConfig.model_validate(decoder_extra["diffusion"])
        self.upsampler_diffusion = DiffusionConfig.model_validate(upsampler_extra["diffusion"])
        self.residual_std: float = upsampler_extra["residual_std"]
        self.size: int = inputs["upsampler"].meta["image_size"]
        meta = inputs["features"].meta
        self.context_length: int = meta["context_length"]
        self.latent_shape = (meta["latent_channels"], meta["latent_size"], meta["latent_size"])
        self.latent_statistics = latent_statistics(meta, device)
        self.embed_statistics = embed_statistics(meta, device)

    def _load(self, folders: Mapping[str, Path], kind: str) -> tuple[torch.nn.Module, dict]:
        module, extra = load_weights(folders[kind], kind=kind, device=self.device)
        return module, extra

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        tokens = self.tokenizer.encode_short(list(prompts), context_length=self.context_length)
        tokens_BL = torch.from_numpy(tokens).to(self.device)
        embed, encodings = self.clip.encode_text(tokens_BL)
        return Text(embed, encodings.float(), tokens_BL != 0)

    @torch.no_grad()
    def prior_embeds(self, text: Text, cfg: GenerationConfig, *, generator: torch.Generator) -> Tensor:
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
        return self.autoencoder.decode(self.latent_statistics.restore(latents)).clamp(-1, 1)

    @torch.no_grad()
    def enlarge(self, images: Tensor, cfg: GenerationConfig, *, generator: torch.Generator) -> Tensor:
        return upsample(
            self.upsampler,
            images,
            size=self.size,
            residual_std=self.residual_std,
            noise_aug=cfg.noise_aug,
            diffusion=self.upsampler_diffusion,
            sampler=cfg.upsampler,
            generator=generator,
        )

    def generate(self, prompts: Sequence[str], cfg: GenerationConfig, *, generator: torch.Generator) -> Generated:
        """Pictures for prompts: the same seed and prompts give the same pictures."""
        text = self.encode_text(prompts)
        embeds = self.prior_embeds(text, cfg, generator=generator)
        images = self.decode(embeds, text, cfg, generator=generator)
        return Generated(images, self.enlarge(images, cfg, generator=generator), embeds)


def check_lineage(inputs: Mapping[str, Artifact]) -> None:
    """Whether parts were trained for one another. Raises ValueError that names the two that were not.

    A prior and a decoder speak the language of one CLIP, a decoder draws the latents of one autoencoder: weights of
    another training, even of equal sizes, would give noise without an error.
    """
    for name in ("features", "prior", "decoder"):
        for source in ("clip", "autoencoder", "shard"):
            if name not in inputs or source not in inputs or source not in inputs[name].meta:
                continue
            trained, here = inputs[name].meta[source], inputs[source].fingerprint
            if trained != here:
                raise ValueError(
                    f"{name} was made with {source} {trained[:12]}, but {source} here is {here[:12]}; "
                    f"use the {source} it was made with, or make {name} again"
                )
    if {"upsampler", "autoencoder"} <= inputs.keys():
        low, base = inputs["upsampler"].meta["low_size"], inputs["autoencoder"].meta["image_size"]
        if low != base:
            raise ValueError(f"upsampler.low_size is {low}, but the autoencoder's images are {base} px; set them equal")
