"""Latent diffusion without a prior: from text by a trained CLIP or a published encoder, and from nulls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from genpipe.artifacts import Artifact, read_manifest
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.conditions import Conditions, Given
from genpipe.generation.latents import sample_latents
from genpipe.generation.systems.latent import LatentConfig, LatentSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue cross"]
CFG = LatentConfig(kind="latent", decoder=SamplerConfig(steps=3, guidance_scale=2.0))


@pytest.fixture(scope="module")
def parts(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Those of the tiny pipeline, whose decoder was trained with image embeddings as well."""
    manifest = read_manifest(tiny.run("system").uri)
    assert manifest is not None
    return {role: manifest.inputs[role] for role in ("autoencoder", "clip", "decoder")}


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def changed(parts: dict[str, Artifact], role: str, **meta: Any) -> dict[str, Artifact]:
    return {**parts, role: parts[role].model_copy(update={"meta": {**parts[role].meta, **meta}})}


def test_a_decoder_of_image_embeddings_draws_with_its_null(parts: dict[str, Artifact]) -> None:
    """Not with a vector of zeros."""
    system = LatentSystem(CFG, parts, device=CPU)
    drawn = system.sample(Conditions(2, texts=PROMPTS), generator=seeded(0))
    assert system.encode_text is not None and isinstance(system.decoder.null_image_D, torch.Tensor)
    null = system.decoder.null_image_D.detach().expand(2, -1)
    with torch.no_grad():
        latents = sample_latents(
            system.decoder,
            Given(image_embed=null, text=system.encode_text(PROMPTS)),
            shape=(2, *system.latent_shape),
            diffusion=system.decoder_diffusion,
            sampler=CFG.decoder,
            generator=seeded(0),
        )
        expected = system.autoencoder.decode(system.latent_statistics.restore(latents)).clamp(-1, 1)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


def test_what_is_promised(parts: dict[str, Artifact]) -> None:
    assert CFG.check(parts) == {"size": 16, "conditioned_on": ["text"], "classes": []}
    labeled = changed(parts, "decoder", conditions=["text", "label"], classes=["cat", "dog"])
    assert CFG.check(labeled)["conditioned_on"] == ["text", "label"]
    assert CFG.check(labeled)["classes"] == ["cat", "dog"]


def test_the_encoder_of_the_text_must_be_there(parts: dict[str, Artifact]) -> None:
    alone = {role: artifact for role, artifact in parts.items() if role != "clip"}
    with pytest.raises(ValueError, match=r"inputs\.clip: required"):
        CFG.check(alone)
    with pytest.raises(ValueError, match=r"inputs\.text_encoder: required"):
        CFG.check(changed(parts, "decoder", text_encoder="e" * 64))
    assert CFG.check(changed(alone, "decoder", conditions=[]))["conditioned_on"] == []


def test_a_decoder_of_pixels_is_refused(parts: dict[str, Artifact]) -> None:
    meta = {name: value for name, value in parts["decoder"].meta.items() if name != "autoencoder"}
    pixels = {**parts, "decoder": parts["decoder"].model_copy(update={"meta": {**meta, "image_size": 16}})}
    with pytest.raises(ValueError, match=r"inputs\.decoder draws pixels.*model\.kind to pixel"):
        CFG.check(pixels)


def test_captions_to_pixels_without_prior_or_autoencoder(tiny: TinyPipeline) -> None:
    """An identity autoencoder, whose latents are pixels, and a decoder of captions alone."""
    settings = [
        *(f"stages.{name}.train.samples=64" for name in ("clip", "decoder")),
        "stages.autoencoder.model={kind: identity}",
        "stages.autoencoder.train.samples=0",
        "stages.decoder.model.image_embed=false",
        "stages.decoder.model.null_text=encoder",
        "stages.system.inputs={upsamplers: []}",
        "stages.system.model={kind: latent, decoder: {steps: 2}}",
    ]
    made = tiny.run("system", *settings)
    assert made.meta["conditioned_on"] == ["text"] and made.meta["size"] == 16
    assert made.meta["parts"].keys() == {"autoencoder", "clip", "decoder"}
    samples = tiny.run("sample", *settings)
    assert samples.meta["image_size"] == 16 and samples.meta["samples"] == {"train": 16, "heldout": 4}
