"""LPIPS, a learned perceptual distance (Zhang et al. 2018, eq. 1, version 0.1, VGG16 with linear heads).

Shapes: B batch, H and W pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions (Simonyan & Zisserman 2015) between its poolings; each last one is compared."""

SMALLEST = 16
"""Pixels of a side that leave one cell after four poolings."""


class Lpips(nn.Module):
    """The distance of image pairs; frozen once its published weights are loaded (`convs` and `heads`)."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for stage in STAGES for width in stage)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(widths))
        self.heads = nn.ParameterList(torch.ones(stage[-1]) for stage in STAGES)
        # ImageNet's mean and deviation for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """fp32 [B] for RGB images [B, 3, H, W] in [-1, 1], sides at least 16; 0 for equal ones."""
        distances = [
            ((one - other).square() * head[:, None, None]).sum(1).mean((1, 2))
            for one, other, head in zip(self._features(images), self._features(reference), self.heads, strict=True)
        ]
        return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """The activations of each stage in fp32, as unit vectors over channels."""
        h = (images - self.shift) / self.scale
        features: list[Tensor] = []
        convs = iter(self.convs)
        for stage in STAGES:
            h = F.max_pool2d(h, 2) if features else h
            for _ in stage:
                h = F.relu(next(convs)(h))
            # Where nothing is active the norm has no gradient: the clamp keeps NaN out of it.
            square = h.float().square().sum(1, keepdim=True).clamp(min=1e-20)
            features.append(h.float() / (square.sqrt() + 1e-10))
        return features
