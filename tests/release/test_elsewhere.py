"""What a release writes for diffusers and transformers, loaded there: the same pictures and the same embeddings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import pytest
import torch

from genpipe.artifacts import fetch
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.generation.conditions import Conditions
from genpipe.generation.released import open_system
from genpipe.generation.systems import load_released
from genpipe.generation.systems.latent import LatentSystem
from genpipe.models.clip import CLIP
from genpipe.weights import load_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
CPU = torch.device("cpu")

UNET = "{kind: unet, width: 16, multipliers: [1, 2], blocks: 1, attention_at: [2], head_width: 8, groups: 8}"
DIFFUSION = "{schedule: scaled_linear, predict: eps, time_sampling: discrete, weighting: none}"
PIXEL = (
    "stages.decoder.train.samples=320",
    "stages.decoder.condition=none",
    f"stages.decoder.model.denoiser={UNET}",
    f"stages.decoder.diffusion={DIFFUSION}",
    "stages.decoder.observe.sampler={steps: 4}",
    "stages.release.rows=1",
    "stages.release.inputs={evaluate: null, sample: null}",
)
SHAPE = (
    "{embed_dim: 16, image_size: 16, patch_size: 4, patch_bias: false, image_pre_norm: true, "
    "image_pooling: class_token, image: {width: 32, depth: 1, heads: 2, qk_norm: false}, "
    "text: {width: 32, depth: 1, heads: 2, qk_norm: false}}"
)
LATENT = (
    *(f"stages.{name}.train.samples=320" for name in ("autoencoder", "clip", "decoder")),
    f"stages.clip.model={SHAPE}",
    "stages.autoencoder.model={kind: ldm, width: 32, multipliers: [1, 1], blocks: 1, mid_attention: false}",
    "stages.autoencoder.model.latent_channels=4",
    f"stages.decoder.model.denoiser={UNET[:-1]}, attention: transformer, modulation: add, resample: conv}}",
    "stages.decoder.model.image_embed=false",
    "stages.system.model={kind: latent, decoder: {kind: ddim, steps: 4}}",
    "stages.system.inputs={upsamplers: []}",
    "stages.release.prompts=[a red circle]",
    "stages.release.inputs={evaluate: null, sample: null}",
)
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMPipeline": ("{kind: ddim, steps: 10}", {"num_inference_steps": 10, "eta": 0.0}),
    "DDPMPipeline": ("{kind: ddpm, steps: 20, threshold: static}", {"num_inference_steps": 20}),
}


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def told(folder: Path) -> str:
    return (folder / "MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_unconditional_system_is_a_pipeline_of_diffusers(pixel_tiny: TinyPipeline, name: str) -> None:
    """As the model card says that it is called; with the noise of the same generator the pictures are the same."""
    import diffusers

    sampler, call = SAMPLERS[name]
    folder = fetch(pixel_tiny.run("release", *PIXEL, f"stages.system.model.decoder={sampler}"))
    arguments = ", ".join(f"{argument}={value}" for argument, value in call.items())
    assert f'`{name}.from_pretrained("diffusers")({arguments})`' in told(folder)
    pipeline = getattr(diffusers, name).from_pretrained(folder / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(batch_size=2, generator=gen(), output_type="np", **call).images
    with torch.no_grad():
        expected = load_released(folder, device=CPU).sample(Conditions(2), generator=gen()) / 2 + 0.5
    torch.testing.assert_close(torch.from_numpy(found).permute(0, 3, 1, 2), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.05


@pytest.fixture(scope="module")
def latent(tiny: TinyPipeline) -> Path:
    """A release of a text-to-image system on latents, whose CLIP is made as OpenAI's."""
    return fetch(tiny.run("release", *LATENT))


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.01, "inputs matter"


@pytest.mark.slow
def test_the_card_says_where_the_parts_are_and_why_the_rest_is_not(latent: Path, tiny: TinyPipeline) -> None:
    text = told(latent)
    for role, where in (
        ("autoencoder", "`diffusers/vae`: diffusers' AutoencoderKL"),
        ("clip", "`diffusers/clip`: transformers' CLIPModel"),
        ("decoder", "`diffusers/unet`: diffusers' UNet2DConditionModel"),
    ):
        assert f"| parts/{role} | {where} |" in text
    assert "| the whole | not there: the pipelines of diffusers on latents" in text
    assert not (latent / "diffusers/model_index.json").exists()
    other = fetch(tiny.run("release", *LATENT[-2:]))
    assert not (other / "diffusers").exists(), "nothing of it has a form there"
    for role in ("autoencoder", "clip", "prior", "decoder", "upsamplers.0"):
        assert f"| parts/{role} | not there: " in told(other), role


@pytest.mark.slow
@torch.no_grad()
def test_clip_is_transformers_clip(latent: Path) -> None:
    """From a caption and a picture, with the tokenizer and the preprocessor that are written beside it."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    folder, part = latent / "diffusers/clip", latent / "parts/clip"
    theirs, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = load_weights(part, kind="clip", device=CPU).module
    assert isinstance(ours, CLIP)
    captions = ["a red circle", "Two blue bars, drawn"]
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=gen())
    images = CLIPImageProcessor.from_pretrained(folder)(
        [Image.fromarray(picture.numpy()) for picture in pixels], return_tensors="pt"
    )
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    expected = theirs(input_ids=tokens["input_ids"], pixel_values=images["pixel_values"])
    own = CaptionTokenizer.load(part / "tokenizer.json").encode_batch(captions, context_length=16)
    same(ours.encode_image(pixels.permute(0, 3, 1, 2) / 127.5 - 1), expected.image_embeds)
    same(ours.encode_text(torch.from_numpy(own))[0], expected.text_embeds)


@pytest.mark.slow
@torch.no_grad()
def test_autoencoder_and_denoiser_are_diffusers(latent: Path) -> None:
    """Latents in the units that the decoder draws, and what it says of them told a caption whose padding is masked."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL.from_pretrained(latent / "diffusers/vae").eval()
    unet = UNet2DConditionModel.from_pretrained(latent / "diffusers/unet").eval()
    ours = load_released(latent, device=CPU)
    assert isinstance(ours, LatentSystem) and vae.config.scaling_factor == 1
    images = 2 * torch.rand(2, 3, 16, 16, generator=gen()) - 1
    latents = ours.encode(images)
    same(vae.encode(images).latent_dist.mean, latents)
    same(vae.decode(latents).sample.clamp(-1, 1), ours.decode(latents))
    text = ours.given(Conditions(2, texts=["a red circle", "two bars"]), generator=gen()).text
    assert text is not None
    mask, drop = text.text_mask, torch.zeros(2, dtype=torch.bool)
    found = ours.decoder(
        latents, torch.tensor([0.3, 0.9]), text_encodings=text.encodings, text_mask=mask, drop_text=drop
    )
    told_there = {"encoder_hidden_states": text.encodings, "encoder_attention_mask": mask}
    same(unet(latents, torch.tensor([300, 900]), **told_there).sample, found)
    assert open_system(latent).model["kind"] == "latent"
