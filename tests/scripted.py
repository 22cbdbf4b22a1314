"""TorchScript files that stand in for published networks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gallery import SIDE, picture
from torch import Tensor, nn


class Projection(nn.Module):
    """A picture's pixels by a random matrix: [B, 3, size, size] to [B, dims]."""

    def __init__(self, size: int, dims: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3 * size**2, dims, generator=generator) / size)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.matrix


def network_file(folder: Path, module: nn.Module, *, size: int, name: str = "other", **settings: Any) -> dict[str, Any]:
    """The settings of a network that is this module, written to a file."""
    path = folder / f"{name}.pt"
    torch.jit.trace(module, torch.zeros(1, 3, size, size)).save(str(path))  # type: ignore[no-untyped-call]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"kind": "torchscript", "weights": str(path), "sha256": digest, "name": name, "size": size, **settings}


PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
"""Settings with which a network is shown pixels in [0, 1]."""


def projected(seeds: Sequence[int], *, dims: int) -> Tensor:
    """What `Projection` says, [N, dims], of the gallery's pictures of these seeds."""
    stacked = torch.from_numpy(np.stack([picture(seed) for seed in seeds])).permute(0, 3, 1, 2)
    with torch.no_grad():
        features: Tensor = Projection(SIDE, dims)(stacked.float() / 255)
    return features
