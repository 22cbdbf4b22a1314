"""From text to pixels on the tiny pipeline's trained parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.artifacts import Artifact, fetch
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset
from genpipe.diffusion.process import SamplerConfig, with_guidance
from genpipe.generation.conditions import Statistics, Text
from genpipe.generation.system import GenerationConfig, Generator, check_lineage
from genpipe.generation.upsampling import augment
from genpipe.training.loop import seeded

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue cross", "a large green bar"]
CFG = GenerationConfig(
    prior=SamplerConfig(steps=4), decoder=SamplerConfig(steps=4, guidance_scale=2.0), upsampler=SamplerConfig(steps=2)
)


@pytest.fixture(scope="module")
def inputs(tiny: TinyPipeline) -> dict[str, Artifact]:
    tiny.run("evaluate")
    return {name: planned.artifact for name, planned in tiny.plan().items()}


@pytest.fixture(scope="module")
def system(inputs: dict[str, Artifact]) -> Generator:
    return Generator(inputs, device=CPU)


def seed(number: int) -> torch.Generator:
    return seeded(CPU, number)


def test_pictures_are_decided_by_prompts_and_seed(system: Generator) -> None:
    one, again, other = (system.generate(PROMPTS, CFG, generator=seed(n)) for n in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    renamed = system.generate(["a large black bar", *PROMPTS[1:]], CFG, generator=seed(1))
    assert not torch.equal(one.images[0], renamed.images[0])
    torch.testing.assert_close(one.images[1:], renamed.images[1:], atol=1e-4, rtol=0)


def test_what_comes_out(system: Generator) -> None:
    made = system.generate(PROMPTS, CFG, generator=seed(0))
    assert (made.images.shape, made.upsampled.shape) == ((3, 3, 16, 16), (3, 3, 32, 32))
    assert made.images.abs().max() <= 1 and made.upsampled.abs().max() <= 1
    torch.testing.assert_close(made.image_embeds.norm(dim=-1), torch.ones(3))


def test_prompts_are_encoded_as_the_features_were(system: Generator, inputs: dict[str, Artifact]) -> None:
    shards = ShardDataset(fetch(inputs["shard"]), split="heldout")
    features = FeatureDataset(fetch(inputs["features"]), split="heldout")
    rows = np.arange(5)
    cached = Text.from_cache(features.text(rows, np.zeros_like(rows)))
    fresh = system.encode_text([shards.captions(int(i))[0] for i in rows])
    assert torch.equal(cached.mask, fresh.mask)
    torch.testing.assert_close(cached.embed, fresh.embed, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(cached.encodings[cached.mask], fresh.encodings[fresh.mask], atol=5e-3, rtol=5e-3)


def test_cached_latents_decode_to_the_autoencoders_reconstruction(
    system: Generator, inputs: dict[str, Artifact]
) -> None:
    shards = ShardDataset(fetch(inputs["shard"]), split="train")
    latents = FeatureDataset(fetch(inputs["features"]), split="train").latents(np.arange(4)).float()
    images = to_float(image_batch(shards, np.arange(4), size=16))
    with torch.no_grad():
        expected = system.autoencoder.decode(system.autoencoder.encode(images)[0])
        found = system.autoencoder.decode(system.latent_statistics.restore(latents))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_of_two_candidates_the_better_match_is_kept(system: Generator) -> None:
    text = system.encode_text(PROMPTS * 8)
    size = len(text.embed)

    def candidates(count: int) -> Tensor:
        cfg = CFG.model_copy(update={"candidates": count})
        return system.prior_embeds(text, cfg, generator=seed(3))

    # The generator's first rows are the first candidates, whatever their number.
    noise = {n: torch.randn(n * size, text.embed.shape[1], generator=seed(3)) for n in (1, 3)}
    assert torch.equal(noise[1], noise[3][:size])
    single, best = candidates(1), candidates(3)
    match_single, match_best = ((embeds * text.embed).sum(-1) for embeds in (single, best))
    assert (match_best >= match_single - 1e-5).all()
    assert (match_best > match_single + 1e-5).any()


def test_an_autoregressive_prior_serves_as_well(inputs: dict[str, Artifact], tiny: TinyPipeline) -> None:
    few = "stages.prior.model={kind: autoregressive, width: 32, depth: 1, heads: 2, buckets: 4, dot_buckets: 2}"
    system = Generator({**inputs, "prior": tiny.run("prior", few)}, device=CPU)
    one, again, other = (system.generate(PROMPTS, CFG, generator=seed(n)) for n in (1, 1, 2))
    torch.testing.assert_close(one.image_embeds.norm(dim=-1), torch.ones(3))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)


def test_guidance_0_forgets_the_prompt_and_1_is_the_conditional_model(system: Generator) -> None:
    text = system.encode_text(PROMPTS)
    embeds = F.normalize(torch.randn(3, 16, generator=seed(0)), dim=-1)

    def decode(scale: float, *, order: list[int]) -> Tensor:
        cfg = CFG.model_copy(update={"decoder": SamplerConfig(steps=4, guidance_scale=scale)})
        reordered = Text(*(part[order] for part in text))
        return system.decode(embeds[order], reordered, cfg, generator=seed(5))

    torch.testing.assert_close(decode(0.0, order=[0, 1, 2]), decode(0.0, order=[2, 0, 1]), atol=1e-4, rtol=0)
    near, conditional = decode(1.0 + 1e-6, order=[0, 1, 2]), decode(1.0, order=[0, 1, 2])
    torch.testing.assert_close(near, conditional, atol=1e-4, rtol=0)
    assert not torch.allclose(conditional, decode(1.0, order=[2, 0, 1]), atol=1e-3)


def test_guidance_extrapolates() -> None:
    """uncond + scale (cond - uncond), Ho & Salimans 2022: here 1 + 3 (2 - 1) = 4 everywhere."""

    def both(x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == len(t) == 4
        return torch.cat([torch.full_like(x[:2], 2.0), torch.full_like(x[2:], 1.0)])

    model = with_guidance(lambda x, t: x, both, cfg=SamplerConfig(guidance_scale=3.0))
    assert torch.equal(model(torch.zeros(2, 5), torch.zeros(2)), torch.full((2, 5), 4.0))


def test_statistics_are_undone() -> None:
    statistics = Statistics.of([1.0, -2.0], [0.5, 4.0], axes=2, device=CPU)
    x = torch.randn(3, 2, 4, 4, generator=seed(0))
    torch.testing.assert_close(statistics.restore(statistics.standardize(x)), x)
    torch.testing.assert_close(statistics.standardize(x)[:, 1], (x[:, 1] + 2) / 4)


def test_noise_augmentation_preserves_variance() -> None:
    images = torch.randn(4, 3, 128, 128, generator=seed(0))
    level = torch.tensor([0.0, 0.3, 0.7, 1.0])
    noisy = augment(images, level=level, generator=seed(1))
    assert torch.equal(noisy[0], images[0])
    torch.testing.assert_close(noisy.std((1, 2, 3)), torch.ones(4), atol=0.03, rtol=0)
    kept = F.cosine_similarity(noisy.flatten(1), images.flatten(1))
    torch.testing.assert_close(kept, torch.cos(level * torch.pi / 2), atol=0.03, rtol=0)


def part(kind: str, fingerprint: str, **meta: str | int) -> Artifact:
    return Artifact(kind=kind, uri="", fingerprint=fingerprint * 16, meta=meta)


def test_parts_that_were_not_trained_for_one_another() -> None:
    clip, other = part("clip", "c1"), part("clip", "c2")
    autoencoder = part("autoencoder", "a1", image_size=64)
    features = part("features", "f1", clip=clip.fingerprint, autoencoder=autoencoder.fingerprint)
    decoder = part("decoder", "d1", clip=clip.fingerprint, autoencoder="a2" * 16)
    whole = {"clip": clip, "autoencoder": autoencoder, "features": features}
    check_lineage(whole)
    check_lineage({**whole, "upsampler": part("upsampler", "u1", low_size=64)})
    for inputs, message in (
        (
            {**whole, "clip": other},
            "features was made with clip c1c1c1c1c1c1, but clip here is c2c2c2c2c2c2; use the clip it was made with, "
            "or make features again",
        ),
        (
            {**whole, "decoder": decoder},
            "decoder was made with autoencoder a2a2a2a2a2a2, but autoencoder here is a1a1a1a1a1a1; use the "
            "autoencoder it was made with, or make decoder again",
        ),
        (
            {**whole, "upsampler": part("upsampler", "u1", low_size=32)},
            "upsampler.low_size is 32, but the autoencoder's images are 64 px; set them equal",
        ),
    ):
        with pytest.raises(ValueError) as error:
            check_lineage(inputs)
        assert str(error.value) == message


def test_a_mixed_system_is_refused_before_anything_is_loaded(inputs: dict[str, Artifact]) -> None:
    stranger = inputs["clip"].model_copy(update={"fingerprint": "0" * 64, "uri": "/nowhere"})
    with pytest.raises(ValueError, match="was made with clip"):
        Generator({**inputs, "clip": stranger}, device=CPU)
