"""The trained parts of systems: whether they fit one another, how they are loaded, and what they are told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from genpipe.artifacts import Artifact, fetch
from genpipe.data.text import clean_text
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, check_sampler
from genpipe.generation.conditions import TOKENIZER_FILE, Conditions, Given, Text
from genpipe.models.clip import CLIP
from genpipe.models.decoder import Decoder
from genpipe.models.text_encoders import load_text_encoder
from genpipe.weights import load_weights

EncodeText = Callable[[Sequence[str]], Text]


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


def load_text_encoding(parts: Mapping[str, Artifact], *, device: torch.device) -> EncodeText:
    """What the decoder among `parts` is told of prompts: by a published text encoder if there is one, else by CLIP."""
    if "text_encoder" not in parts:
        return clip_text(parts["clip"], cast(CLIP, load_part(parts["clip"], device=device)[0]), device=device)
    encoder = load_text_encoder(fetch(parts["text_encoder"]), device=device)

    def encode(prompts: Sequence[str]) -> Text:
        encodings, mask = encoder.encode([clean_text(prompt) for prompt in prompts])
        return Text(encodings.new_empty(len(prompts), 0), encodings, mask)

    return encode


def clip_text(artifact: Artifact, clip: CLIP, *, device: torch.device) -> EncodeText:
    """What CLIP says of prompts: the same as of captions of the same text in the features."""
    tokenizer = CaptionTokenizer.load(fetch(artifact) / TOKENIZER_FILE)
    context_length: int = artifact.meta["context_length"]

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Text:
        tokens = tokenizer.encode_short(list(prompts), context_length=context_length)
        tokens_BL = torch.from_numpy(tokens).to(device)
        embed, encodings = clip.encode_text(tokens_BL)
        return Text(embed, encodings.float(), clip.text_mask(tokens_BL))

    return encode


def given_of(
    conditions: Conditions,
    conditioned_on: Collection[str],
    *,
    encode_text: EncodeText | None = None,
    device: torch.device,
) -> Given:
    """What a decoder is told of a batch of conditions; it is not told what it was not trained on."""
    text = labels = None
    if "text" in conditioned_on:
        assert conditions.texts is not None and encode_text is not None, "the system is conditioned on text"
        text = encode_text(conditions.texts)
    if "label" in conditioned_on:
        assert conditions.labels is not None, "the system is conditioned on class labels"
        labels = torch.tensor(conditions.labels, dtype=torch.int64, device=device)
    return Given(text=text, labels=labels)


def check_conditions(parts: Mapping[str, Artifact]) -> dict[str, Any]:
    """What a system without a prior is conditioned on, and its `classes`: none without labels, absent if not known yet.

    Raises ValueError if the encoder of the decoder's text is not among the parts.
    """
    decoder = parts["decoder"]
    conditioned_on = [name for name in ("text", "label") if name in decoder.meta["conditions"]]
    for source in ("text_encoder", "clip"):
        if source in decoder.meta:
            if "text" in conditioned_on and source not in parts:
                raise ValueError(f"inputs.{source}: required, as inputs.decoder was trained on its encodings; map it")
            break
    if "label" in conditioned_on and "classes" not in decoder.meta:
        return {"conditioned_on": conditioned_on}
    return {"conditioned_on": conditioned_on, "classes": list(classes_of(decoder))}


def classes_of(decoder: Artifact) -> tuple[str, ...]:
    """The names of a decoder's classes, in the order of their labels; none without labels."""
    return tuple(decoder.meta.get("classes", ()))


def check_part_sampler(sampler: SamplerConfig, part: Artifact, *, setting: str) -> None:
    """Raise ValueError, naming the setting, for a sampler that does not fit what a part was trained for."""
    try:
        check_sampler(sampler, DiffusionConfig.model_validate(part.meta["diffusion"]))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def check_latents(parts: Mapping[str, Artifact]) -> int:
    """The side in pixels of what the autoencoder makes of the decoder's latents.

    Raises ValueError for a decoder that draws no latents.
    """
    if "autoencoder" not in parts["decoder"].meta:
        raise ValueError("inputs.decoder draws pixels, not an autoencoder's latents; set model.kind to pixel")
    size: int = parts["autoencoder"].meta["image_size"]
    return size


def latent_shape(autoencoder: Artifact) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a picture."""
    meta: Mapping[str, Any] = autoencoder.meta
    return meta["latent_channels"], meta["latent_size"], meta["latent_size"]
