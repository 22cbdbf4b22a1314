"""Autoencoder and discriminator: shapes, one-batch overfit, and losses against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from genpipe.models.autoencoder import Autoencoder, AutoencoderConfig, kl_divergence
from genpipe.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)

TINY = AutoencoderConfig(width=16, multipliers=(1, 2), blocks=1, latent_channels=4, patch_size=2, mid_attention=True)


@pytest.mark.parametrize(("patch_size", "multipliers", "factor"), [(1, (1, 1, 1), 4), (2, (1, 2), 4), (4, (1,), 4)])
def test_any_divisible_size(patch_size: int, multipliers: tuple[int, ...], factor: int) -> None:
    cfg = AutoencoderConfig(width=16, multipliers=multipliers, blocks=1, latent_channels=3, patch_size=patch_size)
    assert cfg.factor == factor
    model = Autoencoder(cfg)
    images = torch.zeros(2, 3, 8, 20)
    mean, logvar = model.encode(images)
    assert mean.shape == logvar.shape == (2, 3, 2, 5)
    assert model.decode(mean).shape == images.shape


def test_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="factor 4"):
        Autoencoder(TINY).encode(torch.zeros(1, 3, 10, 8))


def test_fp32_decoding_ignores_autocast() -> None:
    torch.manual_seed(0)
    model = Autoencoder(TINY)
    latents = torch.randn(2, 4, 4, 4)
    plain = model.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.decode(latents, fp32=True), plain)
        rough = model.decode(latents)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, plain)


def test_overfits_one_batch() -> None:
    gen = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Autoencoder(TINY)
    images = torch.rand(4, 3, 2, 2, generator=gen).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        noise = torch.randn(4, 4, 4, 4, generator=gen)
        recon, mean, logvar = model(images, noise=noise)
        loss = (recon - images).abs().mean() + 1e-6 * kl_divergence(mean, logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_kl_equals_torch_distributions() -> None:
    gen = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=gen)
    unit = Normal(torch.zeros(()), torch.ones(()))
    expected = torch_kl(Normal(mean, (0.5 * logvar).exp()), unit).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * (0.25 + 1.0))
    assert generator_loss(fake) == pytest.approx(1.0)


def test_discriminator_scores_patches_and_learns() -> None:
    torch.manual_seed(0)
    model = Discriminator(DiscriminatorConfig(width=8, layers=2))
    real, fake = torch.ones(8, 3, 32, 32), -torch.ones(8, 3, 32, 32)
    assert model(real).shape == (8, 1, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    real, fake = real + 0.1 * torch.randn_like(real), fake + 0.1 * torch.randn_like(fake)
    for _ in range(40):
        loss = discriminator_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_adaptive_weight_is_a_ratio_of_gradient_norms() -> None:
    layer = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3.0, 4.0]])  # d(layer(x)) / d(weight) = x, of norm 5
    out = layer(x).sum()
    weight = adaptive_weight(6.0 * out, 2.0 * out, last_layer=layer.weight)
    assert weight == pytest.approx(3.0, rel=1e-4)
    assert not weight.requires_grad
    assert adaptive_weight(out, 0.0 * out, last_layer=layer.weight, limit=100.0) == 100.0


def test_last_layer_belongs_to_the_decoder() -> None:
    model = Autoencoder(TINY)
    assert model.last_layer.shape[0] == 3 * TINY.patch_size**2
