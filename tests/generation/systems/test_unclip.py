"""unCLIP on the tiny pipeline's trained parts, and which parts make one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.config import ConfigError
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset
from genpipe.diffusion.process import SamplerConfig, UpsamplerSamplerConfig
from genpipe.generation.conditions import Conditions, Text
from genpipe.generation.latents import sample_latents
from genpipe.generation.systems.unclip import UnclipConfig, UnclipSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue cross", "a large green bar"]
CFG = UnclipConfig(
    prior=SamplerConfig(steps=4),
    decoder=SamplerConfig(steps=4, guidance_scale=2.0),
    upsamplers=(UpsamplerSamplerConfig(steps=2),),
)


@pytest.fixture(scope="module")
def parts(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Those of the tiny pipeline's system."""
    manifest = read_manifest(tiny.run("system").uri)
    assert manifest is not None
    return dict(manifest.inputs)


@pytest.fixture(scope="module")
def system(parts: dict[str, Artifact]) -> UnclipSystem:
    return UnclipSystem(CFG, parts, device=CPU)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_pictures_are_decided_by_prompts_and_seed(system: UnclipSystem) -> None:
    one, again, other = (system.stages(Conditions(3, texts=PROMPTS), generator=seeded(n)) for n in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    others = Conditions(3, texts=["a large black bar", *PROMPTS[1:]])
    renamed = system.stages(others, generator=seeded(1))
    assert not torch.equal(one[0][0], renamed[0][0])
    torch.testing.assert_close(one[0][1:], renamed[0][1:], atol=1e-4, rtol=0)


def test_what_comes_out(system: UnclipSystem) -> None:
    made = system.stages(Conditions(3, texts=PROMPTS), generator=seeded(0))
    assert [images.shape for images in made] == [(3, 3, 16, 16), (3, 3, 32, 32)] and system.size == 32
    assert all(images.abs().max() <= 1 for images in made)
    assert torch.equal(system.sample(Conditions(3, texts=PROMPTS), generator=seeded(0)), made[-1])
    embeds = system.prior_embeds(system.encode_text(PROMPTS), generator=seeded(0))
    assert embeds is not None
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))


def test_prompts_are_encoded_as_the_features_were(system: UnclipSystem, tiny: TinyPipeline) -> None:
    shards = ShardDataset(fetch(tiny.run("shard")), split="heldout")
    features = FeatureDataset(fetch(tiny.run("features")), split="heldout")
    rows = np.arange(5)
    cached = Text.from_cache(features.text(rows, np.zeros_like(rows)))
    fresh = system.encode_text([f" {shards.captions(int(i))[0]}\t" for i in rows])
    assert torch.equal(cached.text_mask, fresh.text_mask)
    close: dict[str, Any] = {"atol": 2e-2, "rtol": 1e-2}  # the cache is of bf16 products where they are fast
    torch.testing.assert_close(cached.embed, fresh.embed, **close)
    torch.testing.assert_close(cached.encodings[cached.text_mask], fresh.encodings[fresh.text_mask], **close)


def test_cached_latents_decode_to_the_autoencoders_reconstruction(system: UnclipSystem, tiny: TinyPipeline) -> None:
    shards = ShardDataset(fetch(tiny.run("shard")), split="train")
    latents = FeatureDataset(fetch(tiny.run("features")), split="train").latents(np.arange(4)).float()
    images = to_float(image_batch(shards, np.arange(4), size=16))
    with torch.no_grad():
        expected = system.autoencoder.decode(system.autoencoder.encode(images)[0])
        found = system.autoencoder.decode(system.latent_statistics.restore(latents))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_guidance_0_forgets_the_prompt_and_1_is_the_conditional_model(parts: dict[str, Artifact]) -> None:
    embeds = F.normalize(torch.randn(3, 16, generator=seeded(0)), dim=-1)

    def decode(scale: float, *, order: list[int]) -> Tensor:
        cfg = CFG.model_copy(update={"decoder": SamplerConfig(steps=4, guidance_scale=scale)})
        system = UnclipSystem(cfg, parts, device=CPU)
        reordered = Text(*(part[order] for part in system.encode_text(PROMPTS)))
        latents = sample_latents(
            system.decoder,
            system.given_embeds(embeds[order], reordered),
            shape=(3, *system.grid),
            diffusion=system.decoder_diffusion,
            sampler=system.decoder_sampler,
            generator=seeded(5),
        )
        return system.decode(latents)

    torch.testing.assert_close(decode(0.0, order=[0, 1, 2]), decode(0.0, order=[2, 0, 1]), atol=1e-4, rtol=0)
    near, conditional = decode(1.0 + 1e-6, order=[0, 1, 2]), decode(1.0, order=[0, 1, 2])
    torch.testing.assert_close(near, conditional, atol=1e-4, rtol=0)
    assert not torch.allclose(conditional, decode(1.0, order=[2, 0, 1]), atol=1e-3)


def test_a_priors_own_units_are_those_that_it_was_trained_in(parts: dict[str, Artifact], tiny: TinyPipeline) -> None:
    """Scaled embeddings (unCLIP, appendix C) are brought back by its scale, and standardized for the decoder."""
    prior = tiny.run("prior", "stages.prior.embed_scale=17.2")
    system = UnclipSystem(CFG, {**parts, "prior": prior}, device=CPU)
    torch.testing.assert_close(system.prior_statistics.restore(torch.full((16,), 17.2)), torch.ones(16))
    assert system.prior_diffusion.sigma_data == pytest.approx(17.2 / 16**0.5)
    whole = UnclipSystem(CFG, parts, device=CPU)
    assert torch.equal(system.embed_statistics.std, whole.embed_statistics.std)
    embeds = system.prior_embeds(system.encode_text(PROMPTS), generator=seeded(0))
    assert embeds is not None
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))


def test_an_upsampler_may_draw_latents(parts: dict[str, Artifact], tiny: TinyPipeline) -> None:
    """Of images twice as large as those that the autoencoder was trained on."""
    artifact = tiny.run("upsampler", "stages.upsampler.target=latents", "stages.upsampler.train.samples=32")
    assert artifact.meta["autoencoder"] == parts["autoencoder"].fingerprint
    system = UnclipSystem(CFG, {**parts, "upsamplers.0": artifact}, device=CPU)
    low = torch.rand(2, 3, 16, 16, generator=seeded(0)) * 2 - 1
    [large] = system.cascade.enlarge(low, generator=seeded(0))
    assert large.shape == (2, 3, 32, 32) and large.isfinite().all()


def without(parts: dict[str, Artifact], role: str) -> dict[str, Artifact]:
    return {name: artifact for name, artifact in parts.items() if name != role}


def changed(parts: dict[str, Artifact], role: str, **meta: Any) -> dict[str, Artifact]:
    return {**parts, role: parts[role].model_copy(update={"meta": {**parts[role].meta, **meta}})}


def test_what_is_no_unclip_is_refused(parts: dict[str, Artifact]) -> None:
    with pytest.raises(ValueError, match=r"no prior to draw one; .*model\.kind to latent"):
        CFG.check(without(parts, "prior"))
    CFG.check(changed(without(parts, "prior"), "decoder", conditions=["text"]))
    with pytest.raises(ValueError, match=r"class labels.*model\.kind to latent"):
        CFG.check(changed(parts, "decoder", conditions=["image_embed", "text", "label"]))
    with pytest.raises(ValueError, match=r"text encoder.*model\.kind to latent"):
        CFG.check(changed(parts, "decoder", text_encoder="e" * 64))
    learned = CFG.model_copy(update={"decoder": SamplerConfig(kind="ddpm", variance="learned")})
    with pytest.raises(ValueError, match=r"model\.decoder: .*variance"):
        learned.check(parts)


def test_steps_of_a_cascade_fit_before_anything_is_trained(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError, match=r"stages\.system: inputs\.upsamplers\[0\]: its low_size is 24"):
        tiny.plan("stages.upsampler.low_size=24")
