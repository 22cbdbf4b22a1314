"""Prior, DiT, decoder and upsampler: shapes, masks, dropped conditions and one-batch overfit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from genpipe.models.dit import DiT, DiTConfig
from genpipe.models.prior import Prior, PriorConfig
from genpipe.models.unclip import Decoder, DecoderConfig
from genpipe.models.upsampler import Upsampler, UpsamplerConfig

B, L, D, W = 4, 5, 8, 12
DIT = DiTConfig(patch_size=2, width=32, depth=2, heads=2)
TEXT_MASK = torch.arange(L) < torch.tensor([2, 5, 3, 4])[:, None]
KEEP, DROP = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wake(model: nn.Module) -> None:
    """Give zero-initialised layers values, so that outputs depend on everything that they can depend on."""
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=gen))


def prior() -> Prior:
    torch.manual_seed(0)
    return Prior(PriorConfig(width=32, depth=2, heads=2), embed_dim=D, text_width=W)


def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(dit=DIT, embed_tokens=2), latent_channels=3, embed_dim=D, text_width=W)
    wake(model)
    return model


def text(seed: int = 1) -> dict[str, Tensor]:
    return {"text_encodings": randn(B, L, W, seed=seed), "text_mask": TEXT_MASK}


def overfit(model: nn.Module, *, predict: Callable[[], Tensor], goal: Tensor, lr: float, steps: int) -> float:
    """Loss after training on one batch, as a share of the loss before."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = (predict() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def run_prior(model: Prior, **changes: Tensor) -> Tensor:
    inputs = {"t": torch.linspace(0, 1, B), "text_embed": randn(B, D, seed=2), "drop_text": KEEP}
    inputs |= text() | changes
    return model(inputs.pop("noised_embed", randn(B, D)), **inputs)


def test_prior_ignores_padding_and_reads_the_rest() -> None:
    model, out = prior(), run_prior(prior())
    assert out.shape == (B, D) and out.dtype == torch.float32
    noise = randn(B, L, W, seed=3)
    only_padding = torch.where(TEXT_MASK[..., None], text()["text_encodings"], noise)
    torch.testing.assert_close(run_prior(model, text_encodings=only_padding), out)
    for changed in (
        {"text_encodings": noise},
        {"text_embed": randn(B, D, seed=4)},
        {"noised_embed": randn(B, D, seed=5)},
        {"t": torch.full((B,), 0.4)},
    ):
        assert not torch.isclose(run_prior(model, **changed), out).all(1).any()


def test_prior_without_its_text_does_not_depend_on_it() -> None:
    model = prior()
    out = run_prior(model, drop_text=DROP)
    other = {"text_encodings": randn(B, L, W, seed=3), "text_embed": randn(B, D, seed=4)}
    torch.testing.assert_close(run_prior(model, drop_text=DROP, **other), out)
    torch.testing.assert_close(run_prior(model, drop_text=DROP, text_mask=~TEXT_MASK), out)
    assert not torch.isclose(run_prior(model, drop_text=DROP, noised_embed=randn(B, D, seed=5)), out).all(1).any()


def test_prior_overfits_one_batch() -> None:
    model = prior()
    assert overfit(model, predict=lambda: run_prior(model), goal=randn(B, D, seed=9), lr=3e-3, steps=40) < 0.05


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_dit_takes_any_grid(positions: Literal["absolute", "relative"]) -> None:
    cfg = DIT.model_copy(update={"positions": positions})
    model = DiT(cfg, in_channels=3, out_channels=5)
    for height, width in ((4, 4), (6, 8), (2, 10)):
        out = model(randn(2, 3, height, width), torch.tensor([0.2, 0.9]))
        assert out.shape == (2, 5, height, width)
    with pytest.raises(ValueError, match="patches of 2"):
        model(randn(2, 3, 5, 4), torch.zeros(2))


def test_dit_starts_at_zero_and_knows_where_its_tokens_are() -> None:
    torch.manual_seed(0)
    model = DiT(DIT, in_channels=3, out_channels=3)
    x = torch.ones(1, 3, 4, 4)
    assert not model(x, torch.tensor([0.5])).any()
    wake(model)
    out = model(x, torch.tensor([0.5]))
    assert not torch.allclose(out[..., :2, :2], out[..., 2:, 2:])


def test_dit_ignores_masked_context() -> None:
    torch.manual_seed(0)
    model = DiT(DIT, in_channels=3, out_channels=3, context_dim=W, vector_dim=D)
    wake(model)
    x, t, vector = randn(B, 3, 4, 4), torch.linspace(0, 1, B), randn(B, D, seed=2)
    context, noise = randn(B, L, W, seed=1), randn(B, L, W, seed=3)
    out = model(x, t, context=context, context_mask=TEXT_MASK, vector=vector)
    only_padding = torch.where(TEXT_MASK[..., None], context, noise)
    torch.testing.assert_close(model(x, t, context=only_padding, context_mask=TEXT_MASK, vector=vector), out)
    for changed in (
        model(x, t, context=noise, context_mask=TEXT_MASK, vector=vector),
        model(x, t, context=context, context_mask=TEXT_MASK, vector=-vector),
        model(x, 1 - t, context=context, context_mask=TEXT_MASK, vector=vector),
    ):
        assert not torch.isclose(changed, out).flatten(1).all(1).any()


def run_decoder(model: Decoder, **changes: Tensor) -> Tensor:
    inputs = {"image_embed": randn(B, D, seed=2), "drop_image": KEEP, "drop_text": KEEP} | text() | changes
    return model(randn(B, 3, 4, 4), torch.linspace(0.1, 0.9, B), **inputs)


def test_decoder_drops_image_and_text_independently() -> None:
    model = decoder()
    new_image, new_text = {"image_embed": randn(B, D, seed=3)}, {"text_encodings": randn(B, L, W, seed=4)}
    for drop_image in (KEEP, DROP):
        for drop_text in (KEEP, DROP):
            drops = {"drop_image": drop_image, "drop_text": drop_text}
            out = run_decoder(model, **drops)
            assert out.shape == (B, 3, 4, 4) and out.dtype == torch.float32
            for change, dropped in ((new_image, drop_image), (new_text, drop_text)):
                same = torch.isclose(run_decoder(model, **drops, **change), out, atol=1e-6).flatten(1).all(1)
                assert torch.equal(same, dropped)


def test_decoder_ignores_padding_and_the_length_of_a_dropped_caption() -> None:
    model = decoder()
    only_padding = torch.where(TEXT_MASK[..., None], text()["text_encodings"], randn(B, L, W, seed=4))
    torch.testing.assert_close(run_decoder(model, text_encodings=only_padding), run_decoder(model))
    torch.testing.assert_close(
        run_decoder(model, drop_text=DROP, text_mask=~TEXT_MASK), run_decoder(model, drop_text=DROP)
    )


@pytest.mark.parametrize(("drop_image", "drop_text"), [(KEEP, KEEP), (DROP, DROP), (KEEP, DROP)])
def test_every_decoder_parameter_has_a_gradient_whatever_is_dropped(drop_image: Tensor, drop_text: Tensor) -> None:
    model = decoder()
    run_decoder(model, drop_image=drop_image, drop_text=drop_text).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_decoder_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(dit=DIT), latent_channels=3, embed_dim=D, text_width=W)
    goal = randn(B, 3, 4, 4, seed=9)
    assert overfit(model, predict=lambda: run_decoder(model), goal=goal, lr=5e-3, steps=60) < 0.05


def upsampler() -> Upsampler:
    torch.manual_seed(0)
    return Upsampler(UpsamplerConfig(width=32, depth=2, patch_size=2))


def run_upsampler(model: Upsampler, *, size: int, **changes: Tensor) -> Tensor:
    inputs = {"low_res": randn(2, 3, size, size, seed=1), "noise_aug": torch.tensor([0.1, 0.4])} | changes
    return model(randn(2, 3, size, size), torch.tensor([0.3, 0.8]), **inputs)


def test_upsampler_takes_crops_and_whole_images_and_reads_its_conditions() -> None:
    model = upsampler()
    assert run_upsampler(model, size=16).shape == (2, 3, 16, 16)
    wake(model)
    out = run_upsampler(model, size=8)
    assert out.shape == (2, 3, 8, 8) and out.dtype == torch.float32
    assert not torch.allclose(run_upsampler(model, size=8, low_res=randn(2, 3, 8, 8, seed=2)), out)
    assert not torch.allclose(run_upsampler(model, size=8, noise_aug=torch.tensor([0.9, 0.9])), out)
    with pytest.raises(ValueError, match="enlarged"):
        run_upsampler(model, size=8, low_res=randn(2, 3, 4, 4))


def test_upsampler_overfits_one_batch() -> None:
    model = upsampler()
    goal = randn(2, 3, 8, 8, seed=9)
    share = overfit(model, predict=lambda: run_upsampler(model, size=8), goal=goal, lr=5e-3, steps=60)
    assert share < 0.05
