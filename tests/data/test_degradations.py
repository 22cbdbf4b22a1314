"""Degraded small images: blur against scipy, JPEG against libjpeg, and what the generator decides."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut
from torch import Tensor
from torch.nn import functional as F

from genpipe.data import degradations
from genpipe.data.degradations import BSR, Blur, Clean, add_noise, blur, degrade, gaussian_kernels, shrink
from genpipe.data.differentiable_jpeg import jpeg
from genpipe.data.image_batches import to_float, to_uint8

MILD = BSR(kind="bsr", noise=(2.0, 8.0), quality=(80, 95), blur=0.25)
"""Latent diffusion's."""
KINDS: list[Clean | Blur | BSR] = [Clean(), Blur(kind="blur"), BSR(kind="bsr"), MILD]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def photo(side: int, *, count: int = 1) -> Tensor:
    """Crops of a photograph, uint8 values as floats in [-1, 1]."""
    pixels = torch.from_numpy(astronaut().copy()).permute(2, 0, 1)
    return to_float(
        torch.stack([pixels[:, 40 * i + 180 : 40 * i + 180 + side, 120 : 120 + side] for i in range(count)])
    )


def on_8_bits(images: Tensor) -> bool:
    steps = (images + 1) * 127.5
    return bool(torch.isclose(steps, steps.round(), atol=1e-3).all())


@pytest.mark.parametrize("sigma", [0.4, 0.6, 1.7, 3.0])
def test_blur_is_scipys_gaussian_filter(sigma: float) -> None:
    images = photo(48, count=2)
    radius = int(4.0 * sigma + 0.5)  # scipy's
    found = blur(images, gaussian_kernels(torch.tensor([sigma, sigma]), radius=radius))
    expected = gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest")
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_every_image_is_blurred_with_its_own_kernel() -> None:
    images = photo(32, count=2)
    kernels = gaussian_kernels(torch.tensor([0.5, 2.0]), radius=4)
    both = blur(images, kernels)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], blur(images[i : i + 1], kernels[i : i + 1]))


def test_a_turned_kernel_has_the_widths_and_the_direction_that_it_was_given() -> None:
    """Second moments of the kernel, taken as a distribution over x and y."""
    sigma, other, angle = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.6])
    (kernel,) = gaussian_kernels(sigma, radius=12, other_B=other, angle_B=angle).double()
    span = torch.arange(-12, 13).double()
    points = torch.stack(torch.meshgrid(span, span, indexing="xy"))
    covariance = torch.einsum("iyx,jyx,yx->ij", points, points, kernel)
    axis = torch.tensor([angle.cos(), angle.sin()]).double()
    across = torch.tensor([-axis[1], axis[0]])
    expected = 4.0 * torch.outer(axis, axis) + torch.outer(across, across)
    torch.testing.assert_close(covariance, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("quality", [5, 30, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("side", [160, 150])
def test_jpeg_is_libjpegs(quality: int, side: int) -> None:
    """But for its integer arithmetic, which moves values a level here and there; the images lose more than that."""
    images = photo(side)
    pixels = to_uint8(images)[0].permute(1, 2, 0).numpy()
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=quality)
    expected = np.asarray(Image.open(stored)).astype(np.float64)
    found = to_uint8(jpeg(images, torch.tensor([float(quality)])))[0].permute(1, 2, 0).numpy().astype(np.float64)
    assert np.abs(found - expected).mean() < 0.8 < np.abs(expected - pixels).mean()
    assert np.sqrt(np.square(found - expected).mean()) < 2.2


def test_every_image_is_compressed_with_its_own_quality() -> None:
    images, quality = photo(32, count=3), torch.tensor([10.0, 50.0, 90.0])
    together = jpeg(images, quality)
    alone = torch.cat([jpeg(images[i : i + 1], quality[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1.01 / 127.5, rtol=0)
    errors = (together - images).square().mean((1, 2, 3))
    assert errors[0] > errors[1] > errors[2] > 0


def test_noise_has_its_level_and_is_grey_or_colored() -> None:
    images = torch.zeros(400, 3, 16, 16)
    noisy = add_noise(images, torch.linspace(0.05, 0.4, 400), generator=seeded(0))
    torch.testing.assert_close(noisy.std((1, 2, 3)), torch.linspace(0.05, 0.4, 400), rtol=0.3, atol=0)
    red, green = noisy[:, 0].flatten(1), noisy[:, 1].flatten(1)
    alike = F.cosine_similarity(red, green)
    gray, colored = (alike > 0.999).float().mean().item(), (alike.abs() < 0.25).float().mean().item()
    assert gray == pytest.approx(0.4, abs=0.08) and colored == pytest.approx(0.45, abs=0.08)


@pytest.mark.parametrize("cfg", KINDS)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([8, 12, 16, 20]))
@settings(max_examples=25, deadline=None)
def test_degraded_images_are_images(cfg: Clean | Blur | BSR, seed: int, size: int) -> None:
    small = degrade(photo(48, count=2), cfg, size=size, generator=seeded(seed))
    assert small.shape == (2, 3, size, size) and small.dtype == torch.float32
    assert small.abs().max() <= 1 and on_8_bits(small)


@pytest.mark.parametrize("cfg", KINDS[1:])
def test_the_generator_decides_everything(cfg: Blur | BSR) -> None:
    images = photo(64, count=4)
    one, again, other = (degrade(images, cfg, size=16, generator=seeded(n)) for n in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_only_some_images_are_blurred_and_none_beyond_the_papers_kernel() -> None:
    images = photo(32).repeat(200, 1, 1, 1)
    clean = shrink(images, size=16)
    blurred = (degrade(images, Blur(kind="blur"), size=16, generator=seeded(0)) != clean).flatten(1).any(1)
    assert 0.35 < blurred.float().mean() < 0.65
    assert torch.equal(degrade(images, Blur(kind="blur", share=0.0), size=16, generator=seeded(0)), clean)
    point = torch.full((1, 3, 9, 9), -1.0)
    point[..., 4, 4] = 1.0
    spread = degrade(point, Blur(kind="blur", share=1.0), size=9, generator=seeded(0)) > -1
    assert spread[0, 0].nonzero().tolist() == [[i, j] for i in (3, 4, 5) for j in (3, 4, 5)]


def test_bsr_is_worse_than_blur_and_still_shows_the_image() -> None:
    images = photo(64, count=4)
    clean = shrink(images, size=32)

    def error(cfg: Blur | BSR) -> float:
        return float(
            torch.stack(
                [(degrade(images, cfg, size=32, generator=seeded(n)) - clean).square().mean() for n in range(20)]
            ).mean()
        )

    assert 0 < error(Blur(kind="blur")) < error(MILD) < 0.7 * error(BSR(kind="bsr"))
    assert error(BSR(kind="bsr")) < 0.5 * clean.var().item()


@pytest.mark.parametrize(("factor", "sigma", "variance"), [(1.0, 2.8, 8.0), (0.25, 0.7, 2.0)])
def test_bsr_blurs_as_widely_as_published(
    factor: float, sigma: float, variance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a fourth of the size: BSRGAN's add_blur draws up to 2 + 0.2 x 4 and 4 + 4; bsrgan_light.py up to a fourth."""
    asked = []

    def kernels(sigma_B: Tensor, *, other_B: Tensor, angle_B: Tensor, radius: int) -> Tensor:
        asked.append(torch.stack([sigma_B, other_B]))
        return gaussian_kernels(sigma_B, other_B=other_B, angle_B=angle_B, radius=radius)

    monkeypatch.setattr(degradations, "gaussian_kernels", kernels)
    degrade(photo(16).repeat(4000, 1, 1, 1), BSR(kind="bsr", blur=factor), size=4, generator=seeded(0))
    widths = torch.cat(asked, dim=1)
    isotropic = widths[0] == widths[1]
    assert isotropic.float().mean() == pytest.approx(0.5, abs=0.03)
    assert widths[0, isotropic].max() == pytest.approx(sigma, rel=0.01)
    assert widths[:, ~isotropic].square().max() == pytest.approx(variance, rel=0.01)


def test_unclips_blur_is_the_3_x_3_kernel_of_sigma_0_6() -> None:
    """scipy's weights of that radius, on a point, to the 8-bit grid."""
    point = torch.full((1, 3, 9, 9), -1.0)
    point[..., 4, 4] = 1.0
    found = degrade(point, Blur(kind="blur", share=1.0, sigma=(0.6, 0.6)), size=9, generator=seeded(0))
    expected = gaussian_filter(point.double().numpy(), (0, 0, 0.6, 0.6), mode="nearest", radius=(0, 0, 1, 1))
    np.testing.assert_allclose(found.numpy(), expected, atol=1.01 / 255)


def test_shrinking_is_the_mean_of_boxes_where_they_fit_and_bicubic_elsewhere() -> None:
    images = photo(48)
    boxes = images.unflatten(3, (16, 3)).unflatten(2, (16, 3)).mean((3, 5))
    torch.testing.assert_close(shrink(images, size=16), boxes, atol=1.01 / 255, rtol=0)
    bicubic = F.interpolate(images, (20, 20), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(shrink(images, size=20), bicubic, atol=1.01 / 255, rtol=0)
