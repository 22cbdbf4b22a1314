"""The upsamplers' networks: what they read, sizes they run at, published sizes, and that they learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genpipe.models.upsampler import ConvolutionalConfig, UNetUpsamplerConfig, Upsampler, build_upsampler

CONVOLUTIONAL = ConvolutionalConfig(width=32, depth=2, patch_size=2)
UNET = UNetUpsamplerConfig(width=16, multipliers=(1, 2), blocks=1, groups=8)
CONFIGS = pytest.mark.parametrize("cfg", [CONVOLUTIONAL, UNET], ids=["convolutional", "unet"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(cfg: ConvolutionalConfig | UNetUpsamplerConfig, **sizes: int) -> Upsampler:
    torch.manual_seed(0)
    return build_upsampler(cfg, **sizes)


def wake(model: nn.Module) -> None:
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=gen))


def run(model: Upsampler, *, size: int, channels: int = 3, **changes: Tensor) -> Tensor:
    inputs = {"low_res": randn(2, 3, size, size, seed=1), "noise_aug": torch.tensor([0.1, 0.4])} | changes
    return model(randn(2, channels, size, size), torch.tensor([0.3, 0.8]), **inputs)


@CONFIGS
def test_upsampler_takes_crops_and_whole_images_and_reads_its_conditions(
    cfg: ConvolutionalConfig | UNetUpsamplerConfig,
) -> None:
    model = build(cfg)
    assert run(model, size=16).shape == (2, 3, 16, 16)
    wake(model)
    out = run(model, size=8)
    assert out.shape == (2, 3, 8, 8) and out.dtype == torch.float32
    assert not torch.allclose(run(model, size=8, low_res=randn(2, 3, 8, 8, seed=2)), out)
    assert not torch.allclose(run(model, size=8, noise_aug=torch.tensor([0.9, 0.9])), out)
    with pytest.raises(ValueError, match=r"low_res \(4, 4\) is not enlarged to the target's \(8, 8\)"):
        run(model, size=8, low_res=randn(2, 3, 4, 4))


@CONFIGS
def test_upsampler_of_latents_sees_an_image_and_may_give_more_channels(
    cfg: ConvolutionalConfig | UNetUpsamplerConfig,
) -> None:
    model = build(cfg, channels=4, out_channels=8)
    assert run(model, size=8, channels=4).shape == (2, 8, 8, 8)
    run(model, size=8, channels=4).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_unet_starts_at_zero() -> None:
    assert not run(build(UNET), size=8).any()


@CONFIGS
def test_upsampler_learns_eight_images_by_their_small_ones(cfg: ConvolutionalConfig | UNetUpsamplerConfig) -> None:
    """From noise alone, new in every step."""
    model, generator = build(cfg), torch.Generator().manual_seed(0)
    goal = randn(8, 3, 8, 8, seed=9).clamp(-1, 1)
    low = nn.functional.interpolate(nn.functional.avg_pool2d(goal, 2), scale_factor=2.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        noise = torch.randn(goal.shape, generator=generator)
        out = model(noise, torch.ones(8), low_res=low, noise_aug=torch.zeros(8))
        loss = (out - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * (goal - low).square().mean()


@pytest.mark.parametrize(
    ("width", "multipliers", "blocks", "published"),
    [(320, (1, 2, 3, 4), 3, 700e6), (192, (1, 1, 2, 2, 4, 4), 2, 300e6)],
)
def test_unclips_upsamplers_have_their_published_sizes(
    width: int, multipliers: tuple[int, ...], blocks: int, published: float
) -> None:
    """Ramesh et al. 2022, table 3: 64 to 256 and 256 to 1024 pixels, without attention."""
    cfg = UNetUpsamplerConfig(width=width, multipliers=multipliers, blocks=blocks)
    with torch.device("meta"):
        model = build_upsampler(cfg, out_channels=6)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.1)
    assert "attention" not in " ".join(name for name, _ in model.named_modules())
