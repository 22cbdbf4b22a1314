"""LPIPS with its published weights against plain numpy; where its gradient is hard; the package's own names."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from published_lpips import ArraysOnly, converted, published
from torch import Tensor

from genpipe.models.interop.lpips import SLICES, from_lpips
from genpipe.models.lpips import Lpips


@pytest.fixture(scope="module")
def flax() -> dict[str, Any]:
    return published()


@pytest.fixture(scope="module")
def model(flax: dict[str, Any]) -> Lpips:
    lpips = Lpips()
    lpips.load_state_dict(converted(flax))
    return lpips.eval().requires_grad_(False)


def numpy_features(flax: dict[str, Any], image_HWC: np.ndarray) -> list[np.ndarray]:
    """VGG16 in channels-last fp64: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
    h = (image_HWC - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    features = []
    for i in range(13):
        if i in (2, 4, 7, 10):
            h = h.reshape(h.shape[0] // 2, 2, h.shape[1] // 2, 2, -1).max((1, 3))
        conv = flax["VGG16_0"][f"Conv_{i}"]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(h, ((1, 1), (1, 1), (0, 0))), (3, 3), axis=(0, 1))
        h = np.maximum(
            np.tensordot(windows, conv["kernel"].astype(np.float64), ((2, 3, 4), (2, 0, 1))) + conv["bias"], 0
        )
        if i in (1, 3, 6, 9, 12):
            features.append(h)
    return features


def numpy_lpips(flax: dict[str, Any], one: np.ndarray, other: np.ndarray) -> float:
    total = 0.0
    for i, pair in enumerate(zip(numpy_features(flax, one), numpy_features(flax, other), strict=True)):
        x, y = (h / (np.sqrt((h**2).sum(-1, keepdims=True)) + 1e-10) for h in pair)
        total += ((x - y) ** 2 @ flax[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0, :, 0]).mean()
    return float(total)


def images(seed: int, *, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distances_are_those_of_plain_numpy(flax: dict[str, Any], model: Lpips) -> None:
    one, other = images(0), (images(0) + 0.3 * images(1)).clamp(-1, 1)
    found = model(one, other)
    channels_last = [x.double().permute(0, 2, 3, 1).numpy() for x in (one, other)]
    expected = [numpy_lpips(flax, x, y) for x, y in zip(*channels_last, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert (model(one, one) == 0).all()
    torch.testing.assert_close(model(other, one), found)


def test_it_is_perceptual(model: Lpips) -> None:
    """Noise of a strength looks further away than a change of brightness of the same mean square error."""
    smooth = torch.nn.functional.interpolate(images(0), scale_factor=0.125, mode="area")
    smooth = 0.5 * torch.nn.functional.interpolate(smooth, size=(32, 48), mode="bicubic")
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    assert (model(smooth + 0.2 * noise / noise.square().mean().sqrt(), smooth) > 2 * model(smooth + 0.2, smooth)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-25])
def test_its_gradient_is_finite_where_nothing_is_active(model: Lpips, scale: float) -> None:
    """All activations are 0, or so small that their squares are."""
    silent = Lpips()
    silent.load_state_dict(model.state_dict())
    with torch.no_grad():
        silent.convs[0].weight *= scale
        for conv in silent.convs:
            conv.bias.zero_()
    image = images(0).requires_grad_()
    (silent(image, images(1)).sum() + model(image, images(1)).sum()).backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().max() > 0


def test_half_precision_stays_near(model: Lpips) -> None:
    one, other = images(0), images(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(one, other)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, model(one, other), rtol=0.05, atol=0)


def test_names_of_the_lpips_package(model: Lpips) -> None:
    """Its state_dict: torchvision's VGG16 in slices, heads as 1x1 convolutions under two names, two constants."""
    ours = model.state_dict()
    theirs = {f"scaling_layer.{name}": torch.zeros(1, 3, 1, 1) for name in ("shift", "scale")}
    flat = [(number, index) for number, indices in enumerate(SLICES, 1) for index in indices]
    for i, (number, index) in enumerate(flat):
        theirs |= {f"net.slice{number}.{index}.{part}": ours[f"convs.{i}.{part}"] for part in ("weight", "bias")}
    for i in range(5):
        head = ours[f"heads.{i}"].view(1, -1, 1, 1)
        theirs |= {f"lin{i}.model.1.weight": head, f"lins.{i}.model.1.weight": head}
    found = from_lpips(theirs)
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)
    with pytest.raises(ValueError, match=r"no place here: lin5\.model\.1\.weight"):
        from_lpips({**theirs, "lin5.model.1.weight": torch.zeros(1)})


def test_torchvisions_layout_of_vgg16() -> None:
    """Convolutions stand at these places when each is followed by a ReLU and each stage by a pooling."""
    places, index = [], 0
    for stage in SLICES:
        places.append(tuple(range(index, index + 2 * len(stage), 2)))
        index += 2 * len(stage) + 1
    assert tuple(places) == SLICES


def test_a_pickle_of_anything_but_arrays_is_refused() -> None:
    import io

    with pytest.raises(pickle.UnpicklingError, match="is no part of an array"):
        ArraysOnly(io.BytesIO(pickle.dumps(print))).load()
