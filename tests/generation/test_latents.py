"""Sampling a decoder: guidance, and the nulls that take the place of conditions that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, with_guidance
from genpipe.generation.conditions import Given, Text
from genpipe.generation.latents import Dropped, decoder_model, guided_decoder, sample_latents
from genpipe.models.decoder import Decoder, DecoderConfig

SMALL = DecoderConfig.model_validate({"denoiser": {"patch_size": 2, "width": 32, "depth": 1, "heads": 2}})


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def decoder(*, cfg: DecoderConfig = SMALL, **sizes: int) -> Decoder:
    """One that is not the zero function that it begins as."""
    torch.manual_seed(0)
    made = Decoder(cfg, latent_channels=3, **sizes)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return made.eval()


def sample(model: Decoder, given: Given, *, count: int = 2, **sampler: Any) -> Tensor:
    with torch.no_grad():
        return sample_latents(
            model,
            given,
            shape=(count, 3, 4, 4),
            diffusion=DiffusionConfig(),
            sampler=SamplerConfig(steps=3, **sampler),
            generator=seeded(1),
        )


def test_guidance_extrapolates() -> None:
    """uncond + scale (cond - uncond), Ho & Salimans 2022: here 1 + 3 (2 - 1) = 4 everywhere."""

    def both(x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == len(t) == 4
        return torch.cat([torch.full_like(x[:2], 2.0), torch.full_like(x[2:], 1.0)])

    model = with_guidance(lambda x, t: x, both, cfg=SamplerConfig(guidance_scale=3.0))
    assert torch.equal(model(torch.zeros(2, 5), torch.zeros(2)), torch.full((2, 5), 4.0))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_missing_image_embedding_is_the_learned_null(scale: float) -> None:
    model = decoder(embed_dim=6)
    assert isinstance(model.null_image_D, Tensor)
    null = model.null_image_D.detach().expand(2, -1)
    zeros = torch.zeros(2, 6)
    without = sample(model, Given(), guidance_scale=scale)
    torch.testing.assert_close(without, sample(model, Given(image_embed=null), guidance_scale=scale))
    assert not torch.allclose(without, sample(model, Given(image_embed=zeros), guidance_scale=scale), atol=1e-3)


def test_a_negative_label_is_the_null_class() -> None:
    model = decoder(classes=3)
    keep, drop = (Dropped.everywhere(torch.tensor([dropped, dropped])) for dropped in (False, True))
    x, t = torch.randn(2, 3, 4, 4, generator=seeded(0)), torch.full((2,), 0.5)
    labels = torch.tensor([1, -1])
    with torch.no_grad():
        found = decoder_model(model, Given(labels=labels), keep)(x, t)
        null = decoder_model(model, Given(labels=labels), drop)(x, t)
    assert torch.equal(found[1], null[1]) and not torch.allclose(found[0], null[0], atol=1e-4)


def test_guidance_0_forgets_the_label_and_1_is_the_conditional_model() -> None:
    model = decoder(classes=3)

    def drawn(scale: float, *labels: int) -> Tensor:
        return sample(model, Given(labels=torch.tensor(labels)), guidance_scale=scale)

    torch.testing.assert_close(drawn(0.0, 0, 1), drawn(0.0, 2, 2))
    torch.testing.assert_close(drawn(1.0 + 1e-6, 0, 1), drawn(1.0, 0, 1), atol=1e-4, rtol=0)
    assert not torch.allclose(drawn(1.0, 0, 1), drawn(1.0, 2, 2), atol=1e-3)


def test_a_decoder_may_be_conditioned_on_nothing() -> None:
    assert sample(decoder(), Given(), guidance_scale=2.0).isfinite().all()


def text(*lengths: int) -> Text:
    """Captions of so many tokens, padded to the longest."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    encodings = torch.randn(len(lengths), longest, 5, generator=seeded(sum(lengths)))
    return Text(torch.empty(len(lengths), 0), encodings * mask[..., None], mask)


@pytest.mark.parametrize("null_text", ["learned", "encoder"])
def test_a_missing_caption_or_label_is_its_null(null_text: str) -> None:
    model = decoder(text_width=5, classes=3, cfg=SMALL.model_copy(update={"null_text": null_text}))
    x, t = torch.randn(2, 3, 4, 4, generator=seeded(0)), torch.full((2,), 0.5)
    keep = torch.zeros(2, dtype=torch.bool)
    told = Given(text=text(3, 2), labels=torch.tensor([0, 1]))
    with torch.no_grad():
        null = decoder_model(model, told, Dropped.everywhere(~keep))(x, t)
        without = decoder_model(model, Given(), Dropped.everywhere(keep))(x, t)
        with_both = decoder_model(model, told, Dropped.everywhere(keep))(x, t)
    torch.testing.assert_close(without, null)
    assert not torch.allclose(without, with_both, atol=1e-4)


def test_guidance_leads_away_from_what_is_negative() -> None:
    """negative + scale (conditional - negative), where the negative caption is longer than the other one."""
    model = decoder(text_width=5, classes=3)
    given = Given(text=text(2, 2), labels=torch.tensor([0, 1]))
    negative = Given(text=text(4, 4), labels=torch.tensor([-1, -1]))
    keep, x, t = torch.zeros(2, dtype=torch.bool), torch.randn(2, 3, 4, 4, generator=seeded(0)), torch.full((2,), 0.5)
    with torch.no_grad():
        cond, uncond = (decoder_model(model, one, Dropped.everywhere(keep))(x, t) for one in (given, negative))
        found = guided_decoder(
            model,
            given,
            count=2,
            diffusion=DiffusionConfig(),
            sampler=SamplerConfig(guidance_scale=3.0),
            device=torch.device("cpu"),
            negative=negative,
        )(x, t)
    torch.testing.assert_close(found, uncond + 3.0 * (cond - uncond), atol=1e-4, rtol=0)
