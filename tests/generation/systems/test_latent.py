"""Latent diffusion without a prior: from text by a trained CLIP or a published encoder, and from nulls."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.data.features import FeatureDataset
from genpipe.data.shard_dataset import open_shards
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.conditions import Conditions, Given, Text
from genpipe.generation.latents import sample_latents
from genpipe.generation.systems import load_system
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
            shape=(2, *system.grid),
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


def write_t5(folder: Path, captions: list[str]) -> dict[str, str]:
    """A T5 encoder of random weights as transformers writes it, with a tokenizer of words; the digests of its files."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": len(vocabulary)}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("config.json", "tokenizer.json", "model.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_a_published_encoder_reads_the_captions(tiny: TinyPipeline, tmp_path: Path) -> None:
    """`configs/pipeline/latent-tiny.yaml`, whole: neither CLIP nor prior is trained."""
    digests = write_t5(tmp_path / "t5", [path.read_text() for path in tiny.shapes.glob("*.txt")])
    latent = type(tiny)(tiny.store, tiny.shapes, Path("configs/pipeline/latent-tiny.yaml"))
    model = {"kind": "t5", "folder": str(tmp_path / "t5"), "width": 32, "sha256": digests, "context_length": 16}
    settings = f"stages.text_encoder.model={json.dumps(model)}"
    samples = latent.run("sample", settings)
    assert samples.meta["samples"] == {"train": 16, "heldout": 4} and samples.meta["image_size"] == 16
    made = latent.run("system", settings)
    assert made.meta["parts"].keys() == {"autoencoder", "text_encoder", "decoder"}
    system = load_system(made, device=CPU)
    assert isinstance(system, LatentSystem) and system.encode_text is not None
    features = FeatureDataset(fetch(latent.run("features", settings)), split="train")
    shards = open_shards(latent.run("shard", settings), split="train")
    cached = Text.from_cache(features.text(np.arange(3), np.zeros(3)))
    fresh = system.encode_text([f"  {shards.captions(i)[0]} " for i in range(3)])
    assert torch.equal(cached.text_mask, fresh.text_mask)
    torch.testing.assert_close(cached.encodings, fresh.encodings, atol=2e-2, rtol=2e-2)
    scores = read_manifest(latent.run("evaluate", settings).uri)
    assert scores is not None and {"autoencoder/psnr", "decoder/loss"} <= scores.metrics.keys()
    one, other = (system.sample(Conditions(1, texts=[prompt]), generator=seeded(0)) for prompt in PROMPTS)
    assert not torch.allclose(one, other, atol=1e-3)
