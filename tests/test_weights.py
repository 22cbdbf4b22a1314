"""Stages that begin with published weights: what they commit, untrained, is the other library's model."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.artifacts import fetch, sha256_file
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.generation.conditions import TOKENIZER_FILE
from genpipe.weights import MODELS, InitialWeights, load_initial_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

VOCABULARY = distribution("open-clip-torch").locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz")


def saved(module: nn.Module, path: Path, *, form: str) -> str:
    """The setting that names the weights of `module`, written to a file."""
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return f"{{weights: {path}, sha256: {sha256_file(path)}, format: {form}}}"


def held_out(tiny: TinyPipeline) -> Tensor:
    """The held-out images at 16 pixels, in [-1, 1]."""
    dataset = ShardDataset(fetch(tiny.run("shard")), split="heldout")
    return to_float(image_batch(dataset, np.arange(len(dataset)), size=16))


def test_features_of_published_encoders_are_theirs(tiny: TinyPipeline, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    widths = [32, 64]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    autoencoder = AutoencoderKL(block_out_channels=widths, latent_channels=4, layers_per_block=2, **blocks).eval()
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**tower, "image_size": 16, "patch_size": 4}, {**tower, "max_position_embeddings": 16}
    ids = {"bos_token_id": 49406, "eos_token_id": 49407}
    clip = CLIPModel(CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=24)).eval()
    ours = "{width: 32, depth: 2, heads: 2, qk_norm: false, activation: quick_gelu}"
    settings = [
        "stages.autoencoder.model={kind: ldm, width: 32, multipliers: [1, 2], latent_channels: 4}",
        "stages.autoencoder.train.samples=0",
        f"stages.autoencoder.initial={saved(autoencoder, tmp_path / 'vae.safetensors', form='diffusers')}",
        "stages.clip.model={image_size: 16, patch_size: 4, embed_dim: 24, pixels: openai, patch_bias: false, "
        f"image_pre_norm: true, image_pooling: class_token, mask_padding: false, image: {ours}, text: {ours}}}",
        f"stages.clip.tokenizer={{kind: clip, vocabulary: {VOCABULARY}}}",
        "stages.clip.train.samples=0",
        f"stages.clip.initial={saved(clip, tmp_path / 'clip.safetensors', form='transformers')}",
        "stages.features.dtype=float32",
        "stages.features.precision=fp32",
    ]
    features = tiny.run("features", *settings)
    cached = FeatureDataset(fetch(features), split="heldout")
    indices, images = np.arange(len(cached)), held_out(tiny)
    with torch.no_grad():
        latents = autoencoder.encode(images).latent_dist.mean
    mean, std = (torch.tensor(features.meta[f"latent_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(cached.latents(indices) * std + mean, latents, atol=1e-4, rtol=1e-4)

    published = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    mean, std = published.view(2, 3, 1, 1)
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(((images + 1) / 2 - mean) / std).pooler_output)
    torch.testing.assert_close(cached.image_embeds(indices), F.normalize(embeds, dim=-1), atol=1e-4, rtol=1e-4)

    dataset = ShardDataset(fetch(tiny.run("shard")), split="heldout")
    tokenizer = CaptionTokenizer.load(fetch(tiny.run("clip", *settings)) / TOKENIZER_FILE)
    captions = [dataset.captions(int(i))[0] for i in indices]
    tokens = torch.from_numpy(tokenizer.encode_batch(captions, context_length=16))
    with torch.no_grad():
        embeds = clip.text_projection(clip.text_model(tokens).pooler_output)
    found = cached.text(indices, np.zeros(len(indices)))["text_embeds"]
    torch.testing.assert_close(found, F.normalize(embeds, dim=-1), atol=1e-4, rtol=1e-4)


def test_weights_of_another_network_are_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    setting = saved(nn.Linear(2, 3), tmp_path / "other.safetensors", form="genpipe")
    with pytest.raises(ValueError, match=r"initial.weights: .*other.safetensors does not fit `model`"):
        tiny.run("autoencoder", f"stages.autoencoder.initial={setting}")
    digest = sha256_file(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"sha256 is {digest}, but the configuration asks for"):
        tiny.run("clip", "stages.clip.initial=" + setting.replace(digest, digest[::-1]))
    with pytest.raises(ValueError, match=r"no upsampler is read from diffusers's names; use one of genpipe"):
        tiny.run("upsampler", "stages.upsampler.initial=" + setting.replace("genpipe", "diffusers"))


@pytest.mark.parametrize(
    ("kind", "model", "sizes", "network"),
    [
        (
            "decoder",
            {},
            {"latent_channels": 4, "embed_dim": 8, "text_width": 8},
            "UNetConfig",
        ),
        (
            "prior",
            {"kind": "autoregressive"},
            {"embed_dim": 8, "text_width": 8, "components": 8},
            "DiffusionPriorConfig",
        ),
    ],
)
def test_networks_that_a_library_has_not_are_refused_before_the_file_is_read(
    kind: str, model: dict[str, Any], sizes: dict[str, int], network: str
) -> None:
    build, config = MODELS[kind]
    module = build(TypeAdapter(config).validate_python(model), **sizes)
    initial = InitialWeights(weights="nowhere.safetensors", sha256="0" * 64, format="diffusers")
    told = f"initial.format: of a {kind} only the network of {network} is read from diffusers"
    with pytest.raises(ValueError, match=told):
        load_initial_weights(module, initial, kind=kind)
