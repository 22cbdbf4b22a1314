"""The `lpips` package's weights (version 0.1, net="vgg") as `genpipe.models.lpips.Lpips`'s."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from genpipe.models.interop.tensors import joined

SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of the convolutions among torchvision's VGG16 features, slice by slice."""


def from_lpips(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`lpips.LPIPS(net="vgg").state_dict()` by our names. Raises ValueError naming keys missing or unknown."""
    left = {k: v for k, v in state.items() if not k.startswith(("scaling_layer.", "lins."))}  # constants, and aliases
    places = [f"slice{slice}.{index}" for slice, indices in enumerate(SLICES, 1) for index in indices]
    names = {
        f"convs.{i}.{part}": (f"net.{place}.{part}",) for i, place in enumerate(places) for part in ("weight", "bias")
    }
    names |= {f"heads.{i}": (f"lin{i}.model.1.weight",) for i in range(len(SLICES))}
    ours = joined(left, names)
    return {name: tensor.flatten() if name.startswith("heads.") else tensor for name, tensor in ours.items()}
