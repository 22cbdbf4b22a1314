"""unCLIP (Ramesh et al. 2022): a prior from the caption to an image embedding, a decoder from both to a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.cascade import Cascade, CascadeConfig, check_cascade
from genpipe.generation.conditions import Conditions, Given, Text, embed_statistics, latent_statistics
from genpipe.generation.drawing import OnLatents, draw
from genpipe.generation.embeds import sample_image_embeds
from genpipe.generation.parts import (
    check_latents,
    check_part_sampler,
    clip_text,
    latent_shape,
    load_decoder,
    load_part,
)
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.models.prior import Prior


class UnclipConfig(CascadeConfig):
    """Text to an image embedding to latents to pixels; without a prior, text to latents to pixels."""

    kind: Literal["unclip"] = "unclip"
    prior: SamplerConfig = Field(SamplerConfig(steps=25, guidance_scale=1.0), description="sampler of the prior")
    candidates: int = Field(2, ge=1, description="prior samples a prompt; the best match with the text is kept")
    decoder: SamplerConfig = Field(SamplerConfig(steps=25, guidance_scale=2.0), description="sampler of the decoder")

    def roles(self) -> dict[str, Role]:
        """The trained parts that it joins."""
        return {
            "autoencoder": Role("autoencoder"),
            "clip": Role("clip"),
            "prior": Role("prior", optional=True),
            "decoder": Role("decoder"),
            "upsamplers": Role("upsampler", optional=True, several=True),
        }

    def check(self, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Its `size` and `conditioned_on`. Raises ValueError for parts that do not fit."""
        size = check_latents(parts)
        decoder = parts["decoder"]
        conditions = decoder.meta["conditions"]
        for role in ("prior", "decoder"):
            if role in parts and "text_encoder" in parts[role].meta:
                raise ValueError(
                    f"inputs.{role} was trained on the encodings of a text encoder, and unCLIP gives it CLIP's; train "
                    "it on features without text_encoder, or set model.kind to latent"
                )
        if "label" in conditions:
            raise ValueError("inputs.decoder takes class labels, which unCLIP does not give; set model.kind to latent")
        if "prior" in parts:
            check_part_sampler(self.prior, parts["prior"], setting="model.prior")
        elif "image_embed" in conditions:
            raise ValueError(
                "inputs.decoder takes an image embedding, and there is no prior to draw one; name it in inputs.prior, "
                "or set model.kind to latent to condition on the decoder's null embedding"
            )
        check_part_sampler(self.decoder, decoder, setting="model.decoder")
        return {"size": check_cascade(self, parts, size=size), "conditioned_on": ["text"], "classes": []}

    def load(self, parts: Mapping[str, Artifact], *, device: torch.device) -> UnclipSystem:
        """The system with its parts in memory."""
        return UnclipSystem(self, parts, device=device)


class UnclipSystem(OnLatents):
    """The trained parts of unCLIP, loaded."""

    conditioned_on = frozenset({"text"})
    classes: tuple[str, ...] = ()

    def __init__(self, cfg: UnclipConfig, parts: Mapping[str, Artifact], *, device: torch.device) -> None:
        self.cfg, self.device, self.decoder_sampler = cfg, device, cfg.decoder
        self.size: int = cfg.check(parts)["size"]
        self.base_size = check_latents(parts)
        self.grid = latent_shape(parts["autoencoder"])
        self.latent_statistics = latent_statistics(parts["decoder"].meta, device)
        self.embed_statistics = embed_statistics(parts["clip"].meta, device)
        self.autoencoder = cast(Autoencoder, load_part(parts["autoencoder"], device=device)[0])
        self.clip = cast(CLIP, load_part(parts["clip"], device=device)[0])
        self.encode_text = clip_text(parts["clip"], self.clip, device=device)
        self.decoder, self.decoder_diffusion = load_decoder(parts["decoder"], device=device)
        self.prior: Prior | None = None
        if "prior" in parts:
            scale = parts["prior"].meta.get("embed_scale")
            self.prior_statistics = embed_statistics(parts["clip"].meta, device, scale=scale)
            prior, self.prior_diffusion = load_part(parts["prior"], device=device)
            self.prior = cast(Prior, prior)
        self.cascade = Cascade(cfg, parts, device=device, autoencoder=self.autoencoder)

    def sample(self, conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        """Pictures [B, 3, size, size] in [-1, 1] of the conditions' texts."""
        return self.stages(conditions, generator=generator)[-1]

    def stages(self, conditions: Conditions, *, generator: torch.Generator) -> list[Tensor]:
        """The pictures as the decoder and then each upsampler makes them, [B, 3, S, S] in [-1, 1]."""
        return draw(self, conditions, generator=generator)

    @torch.no_grad()
    def given(self, conditions: Conditions, *, generator: torch.Generator) -> Given:
        """What the decoder is told: the texts, and the image embeddings that the prior draws for them."""
        assert conditions.texts is not None, "unCLIP is conditioned on text"
        text = self.encode_text(conditions.texts)
        return self.given_embeds(self.prior_embeds(text, generator=generator), text)

    def given_embeds(self, image_embeds: Tensor | None, text: Text | None = None) -> Given:
        """What the decoder is told of unit image embeddings [B, D] and of captions, either of which may be missing."""
        embed = None if image_embeds is None else self.embed_statistics.standardize(image_embeds)
        return Given(image_embed=embed, text=text)

    @torch.no_grad()
    def prior_embeds(self, text: Text, *, generator: torch.Generator) -> Tensor | None:
        """Image embeddings for captions, unit vectors [B, D]; None without a prior."""
        if self.prior is None:
            return None
        return sample_image_embeds(
            self.prior,
            text,
            statistics=self.prior_statistics,
            diffusion=self.prior_diffusion,
            sampler=self.cfg.prior,
            candidates=self.cfg.candidates,
            generator=generator,
        )

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """CLIP's image embeddings, unit vectors [B, D], of pictures [B, 3, S, S] in [-1, 1] of CLIP's own size."""
        return self.clip.encode_image(images)
