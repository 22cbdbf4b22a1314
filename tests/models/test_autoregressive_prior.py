"""The autoregressive prior: who reads what, the cache against the whole sequence, and what sampling draws."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.generation.conditions import Text
from genpipe.generation.embeds import code_losses, draw_codes, in_unit_variance
from genpipe.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from genpipe.models.pca_quantizer import principal_components

B, L, D, W, K, N, DOTS = 4, 5, 8, 12, 6, 16, 4
TEXT_MASK = torch.arange(L) < torch.tensor([2, 5, 3, 4])[:, None]
KEEP, DROP = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
SOME = torch.tensor([True, False, False, True])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def prior(*, components: int = K, buckets: int = N, **settings: Any) -> AutoregressivePrior:
    torch.manual_seed(0)
    cfg = AutoregressivePriorConfig.model_validate(
        {"width": 32, "depth": 2, "heads": 2, "buckets": buckets, "dot_buckets": DOTS} | settings
    )
    model = AutoregressivePrior(cfg, embed_dim=D, text_width=W, components=components, null_tokens=2)
    if cfg.null_text == "encoder":
        model.null_encoding_W.copy_(randn(2, W, seed=20))
    return model


def text(**changes: Tensor) -> dict[str, Tensor]:
    return {
        "dot": randint(DOTS, B, seed=3),
        "text_embed": randn(B, D, seed=2),
        "text_encodings": randn(B, L, W, seed=1),
        "text_mask": TEXT_MASK,
        "drop_text": KEEP,
    } | changes


CODES = randint(N, B, K)
DETAILS = [{}, {"qk_norm": False, "null_text": "encoder"}]


def test_a_code_is_predicted_from_those_before_it() -> None:
    model = prior()
    logits = model(CODES, **text())
    assert logits.shape == (B, K, N) and logits.dtype == torch.float32
    for k in range(K):
        changed = CODES.clone()
        changed[:, k] = (changed[:, k] + 1) % N
        same = torch.isclose(model(changed, **text()), logits, atol=1e-6).all(-1)
        assert same[:, : k + 1].all() and not same[:, k + 1 :].any()


@pytest.mark.parametrize("details", DETAILS)
def test_padding_is_ignored_and_the_rest_is_read(details: dict[str, Any]) -> None:
    model, noise = prior(**details), randn(B, L, W, seed=4)
    logits = model(CODES, **text())
    only_padding = torch.where(TEXT_MASK[..., None], text()["text_encodings"], noise)
    torch.testing.assert_close(model(CODES, **text(text_encodings=only_padding)), logits)
    for changed in (
        {"text_encodings": noise},
        {"text_embed": randn(B, D, seed=5)},
        {"dot": (text()["dot"] + 1) % DOTS},
    ):
        assert not torch.isclose(model(CODES, **text(**changed)), logits).all(-1).any()


@pytest.mark.parametrize("details", DETAILS)
def test_a_dropped_text_takes_its_dot_product_along_and_leaves_the_codes(details: dict[str, Any]) -> None:
    model = prior(**details)
    logits = model(CODES, **text(drop_text=SOME))
    other = text(
        drop_text=SOME,
        dot=(text()["dot"] + 1) % DOTS,
        text_embed=randn(B, D, seed=5),
        text_encodings=randn(B, L, W, seed=6),
    )
    same = torch.isclose(model(CODES, **other), logits, atol=1e-6).all(-1).all(-1)
    assert torch.equal(same, SOME)
    later = torch.isclose(model((CODES + 1) % N, **text(drop_text=SOME)), logits).all(-1)
    assert not later[:, 1:].any()


@pytest.mark.parametrize("details", DETAILS)
@pytest.mark.parametrize("drop_text", [KEEP, DROP])
def test_every_parameter_has_a_gradient_whatever_is_dropped(details: dict[str, Any], drop_text: Tensor) -> None:
    model = prior(**details)
    F.cross_entropy(model(CODES, **text(drop_text=drop_text)).flatten(0, 1), CODES.flatten()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("details", DETAILS)
def test_code_by_code_with_a_cache_is_the_whole_sequence_at_once(details: dict[str, Any]) -> None:
    """Teacher-forced, in float64 so that a wrong mask or position cannot hide in rounding."""
    model = prior(**details).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in text(drop_text=SOME).items()}
    with torch.no_grad():
        expected = model(CODES, **inputs)
        logits, drawing = model.start(**inputs)
        found = [logits, *(model.extend(CODES[:, k], drawing) for k in range(K - 1))]
    torch.testing.assert_close(torch.stack(found, dim=1), expected, atol=1e-6, rtol=1e-6)
    assert {(cache.length, cache.tokens) for cache in drawing.caches} == {(L + 2 + K - 1,) * 2}


def identity_codes(model: AutoregressivePrior) -> None:
    """Make decoded embeddings tell their codes: component k is axis k, bucket n is n."""
    with torch.no_grad():
        model.codes.basis_KD.copy_(torch.eye(*model.codes.basis_KD.shape))
        model.codes.centers_KN.copy_(torch.arange(model.codes.centers_KN.shape[1]).expand_as(model.codes.centers_KN))


@pytest.mark.parametrize(("scale", "above"), [(1.0, 0.5), (3.0, 0.5), (0.0, 0.5), (1.0, 0.75), (1.0, 0.0)])
def test_sampling_draws_from_the_distribution_that_the_whole_model_gives(scale: float, above: float) -> None:
    """All nine sequences of two codes: their shares among 20,000 draws against softmax by hand, dot products uniform
    over the buckets that are asked for, guidance on the logits (Ho & Salimans 2022)."""
    count = 20_000
    model = prior(components=2, buckets=3, dot_above=above)
    with torch.no_grad():  # make it opinionated, and the dot product matter
        model.code_out.weight.mul_(4)
        model.dot_in.weight.mul_(60)
    identity_codes(model)
    one = Text(F.normalize(randn(1, D, seed=2), dim=-1), randn(1, L, W, seed=1), TEXT_MASK[1:2])
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))

    def log_probability(dot: int) -> Tensor:
        many = one.repeated(9)
        inputs = {
            "dot": torch.full((9,), dot),
            "text_embed": in_unit_variance(many.embed),
            "text_encodings": many.encodings,
            "text_mask": many.text_mask,
        }
        cond = model(sequences, **inputs, drop_text=torch.zeros(9, dtype=torch.bool))
        uncond = model(sequences, **inputs, drop_text=torch.ones(9, dtype=torch.bool))
        logits = uncond + scale * (cond - uncond)
        return logits.log_softmax(-1).gather(2, sequences[..., None]).squeeze(-1).sum(1)

    with torch.no_grad():
        asked = range(int(above * DOTS), DOTS)
        expected = torch.stack([log_probability(dot).exp() for dot in asked]).mean(0)
        drawn = draw_codes(model, one.repeated(count), guidance_scale=scale, generator=torch.Generator().manual_seed(0))
    codes = drawn[:, :2].round().long()
    shares = torch.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=9) / count
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt() + 1e-4).all()


def test_sampling_runs_in_bf16() -> None:
    model = prior()
    identity_codes(model)
    captions = Text(F.normalize(randn(B, D, seed=2), dim=-1), randn(B, L, W, seed=1), TEXT_MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = draw_codes(model, captions, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn[:, :K], drawn[:, :K].round()) and drawn.min() >= 0 and drawn.max() < N


def train(model: AutoregressivePrior, *, steps: int, lr: float, loss: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(torch.Generator().manual_seed(step)).backward()
        optimizer.step()


def test_a_known_distribution_is_learnt_with_the_text_and_without() -> None:
    """Two captions, each with a random table of p(first) and p(second | first) of four values: the divergence from
    both tables, and from their even mixture where the text is dropped, goes to zero."""
    gen, count = torch.Generator().manual_seed(0), 512
    model = prior(components=2, buckets=4)
    first = (1.5 * torch.randn(2, 4, generator=gen)).softmax(-1)
    second = (1.5 * torch.randn(2, 4, 4, generator=gen)).softmax(-1)
    embeds = randn(2, D, seed=7)

    def inputs(which: Tensor, drop: Tensor) -> dict[str, Tensor]:
        encodings = embeds[which, None, :1].expand(-1, 2, W)
        real = torch.ones(len(which), 2, dtype=torch.bool)
        dot = torch.zeros(len(which), dtype=torch.long)
        return dict(dot=dot, text_embed=embeds[which], text_encodings=encodings, text_mask=real, drop_text=drop)

    def loss(gen: torch.Generator) -> Tensor:
        which = torch.randint(2, (count,), generator=gen)
        one = first[which].multinomial(1, generator=gen).squeeze(1)
        two = second[which, one].multinomial(1, generator=gen).squeeze(1)
        codes = torch.stack([one, two], dim=1)
        drop = torch.rand(count, generator=gen) < 0.3
        return F.cross_entropy(model(codes, **inputs(which, drop)).flatten(0, 1), codes.flatten())

    train(model, steps=250, lr=3e-3, loss=loss)
    sequences = torch.tensor(list(itertools.product(range(4), repeat=2)))
    truth = first[:, :, None] * second  # p(caption's first, second)
    for which, drop in ((0, False), (1, False), (0, True)):
        target = (truth.mean(0) if drop else truth[which]).flatten()
        rows = inputs(torch.full((16,), which), torch.full((16,), drop))
        with torch.no_grad():
            log_p = model(sequences, **rows).log_softmax(-1).gather(2, sequences[..., None]).squeeze(-1).sum(1)
        divergence = (target * (target.log() - log_p)).sum()
        assert 0 <= divergence < 0.02
        assert (target * (target.log() - torch.full((16,), 1 / 16).log())).sum() > 0.2, "the tables are not flat"


def test_eight_pairs_are_learnt_by_heart() -> None:
    """From embeddings to embeddings: components and buckets are fitted, and samples come back as the truth."""
    images, texts = (F.normalize(randn(8, D, seed=s), dim=-1) for s in (1, 2))
    mean, basis = principal_components([images], variance=1.0)
    model = prior(components=len(basis), buckets=8, dot_buckets=2)
    low = torch.tensor([-1.0, -0.99])  # all eight pairs are above: samples are asked for what was trained on
    model.codes.fit(mean, basis, embeds=[images], dot_F=low)
    captions = Text(texts, randn(8, L, W, seed=3), torch.ones(8, L, dtype=torch.bool))
    keep = torch.zeros(8, dtype=torch.bool)
    before = code_losses(model, images, captions, drop_text=keep).mean().item()
    train(model, steps=150, lr=3e-3, loss=lambda _: code_losses(model, images, captions, drop_text=keep).mean())
    assert code_losses(model, images, captions, drop_text=keep).mean() < 0.02 * before
    drawn = draw_codes(model, captions, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    others = F.cosine_similarity(drawn, images.roll(1, 0))
    assert F.cosine_similarity(drawn, images).min() > 0.99 and others.mean() < 0.5
