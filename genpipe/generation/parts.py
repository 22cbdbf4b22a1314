"""The trained parts of systems: whether they fit one another, and how each is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from genpipe.artifacts import Artifact, fetch
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, check_sampler
from genpipe.generation.conditions import TOKENIZER_FILE, Text
from genpipe.models.clip import CLIP
from genpipe.models.decoder import Decoder
from genpipe.weights import load_weights


class LoadedDecoder(NamedTuple):
    """A decoder and the diffusion that it was trained for."""

    model: Decoder
    diffusion: DiffusionConfig


def load_part(artifact: Artifact, *, device: torch.device) -> tuple[nn.Module, DiffusionConfig]:
    """The module of a trained part, in eval mode, and the diffusion that it was trained for, if it was for one."""
    module, extra = load_weights(fetch(artifact), kind=artifact.kind, device=device)
    return module, DiffusionConfig.model_validate(extra.get("diffusion", {}))


def load_decoder(artifact: Artifact, *, device: torch.device) -> LoadedDecoder:
    """A trained decoder, in eval mode."""
    module, diffusion = load_part(artifact, device=device)
    return LoadedDecoder(cast(Decoder, module), diffusion)


class ClipText:
    """CLIP's text tower with its tokenizer: from prompts to what the parts are told of them."""

    def __init__(self, artifact: Artifact, clip: CLIP, *, device: torch.device) -> None:
        self.clip, self.device = clip, device
        self.tokenizer = CaptionTokenizer.load(fetch(artifact) / TOKENIZER_FILE)
        self.context_length: int = artifact.meta["context_length"]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Text:
        """What CLIP says of prompts, the same as of captions of the same text in the features."""
        tokens = self.tokenizer.encode_short(list(prompts), context_length=self.context_length)
        tokens_BL = torch.from_numpy(tokens).to(self.device)
        embed, encodings = self.clip.encode_text(tokens_BL)
        return Text(embed, encodings.float(), self.clip.text_mask(tokens_BL))


def conditions_of(decoder: Artifact) -> list[str]:
    """What a decoder was trained to be conditioned on: some of image_embed, text and label."""
    conditions: list[str] = decoder.meta["conditions"]
    return conditions


def check_part_sampler(sampler: SamplerConfig, part: Artifact, *, setting: str) -> None:
    """Raise ValueError, naming the setting, for a sampler that does not fit what a part was trained with."""
    try:
        check_sampler(sampler, DiffusionConfig.model_validate(part.meta["diffusion"]))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def check_latents(parts: Mapping[str, Artifact]) -> int:
    """The side in pixels of what the autoencoder makes of the decoder's latents.

    Raises ValueError for a decoder that draws no latents.
    """
    decoder = parts["decoder"]
    if "autoencoder" not in decoder.meta:
        raise ValueError("inputs.decoder draws pixels, not an autoencoder's latents; set model.kind to pixel")
    size: int = parts["autoencoder"].meta["image_size"]
    return size


def latent_shape(autoencoder: Artifact, *, count: int) -> tuple[int, int, int, int]:
    """[B, C, H, W] of the latents of so many pictures."""
    meta: Mapping[str, Any] = autoencoder.meta
    return count, meta["latent_channels"], meta["latent_size"], meta["latent_size"]
